#!/bin/bash
# One task of a step: tells the program which one it is, and launch.sh how the program ended.
#   task.sh LOGS PROGRAM [ARGUMENT ...]
logs=$1
shift
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"

# Slurm signals the processes that it has started itself (proctrack/cgroup), which is this shell. The
# program's own helpers, such as writers of checkpoints, must not get what the program gets.
program=''
trap '[[ $program ]] && kill -USR1 "$program" 2>/dev/null' USR1
trap '[[ $program ]] && kill -TERM "$program" 2>/dev/null' TERM
"$@" &
program=$!
while wait "$program"; kill -0 "$program" 2>/dev/null; do :; done
wait "$program" # the last one may have been interrupted by a signal too
code=$?
# A file per node: on NFS, lines that several nodes append to one file can be lost.
echo "$(date +%FT%T.%3N) $RANK $code" >>"$logs/$SLURMD_NODENAME.ends"
case $code in
    75) exit 0 ;;        # saved together: no task is to be killed because another was faster
    2 | 3) sleep 5 ;;    # the others say what they found before srun kills them
esac
exit "$code"
