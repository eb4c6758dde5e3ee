#!/bin/bash
# One task of a step: tells the program which one it is, and launch.sh how the program ended.
#   task.sh LOGS PROGRAM [ARGUMENT ...]
logs=$1
shift
trap : USR1 TERM # the program's own: this shell only waits for it
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"

"$@"
code=$?
# A file per node: on NFS, lines that several nodes append to one file can be lost.
echo "$(date +%FT%T.%3N) $RANK $code" >>"$logs/$SLURMD_NODENAME.ends"
case $code in
    75) exit 0 ;;        # saved together: no task is to be killed because another was faster
    2 | 3) sleep 5 ;;    # the others say what they found before srun kills them
esac
exit "$code"
