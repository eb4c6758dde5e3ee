#!/bin/bash
# What a batch job does: one task per GPU, signals passed on, and another start where one helps.
#   launch.sh train|eval CONFIG [key=value ...]

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
attempt=${SLURM_RESTART_COUNT:-0}
step='' # process id of srun
asked='' # to stop

say() { echo "$(date +%FT%T) job $SLURM_JOB_ID, attempt $attempt: $*"; }

end() { # CODE WORDS
    say "${@:2}"
    exit "$1"
}

read_site() {
    local site=${MEGATRON_SRPO_SITE:-$here/site.sh}
    [[ -f $site ]] || end 2 "$site: no such file; copy $here/site.example.sh there and edit it"
    CONTAINER='' MOUNTS='' MAX_RESTARTS=20 MEGATRON_SRPO=(megatron-srpo)
    prepare() { :; }
    # shellcheck source=/dev/null
    source "$site" || end 2 "$site: failed"
    tasks_per_node=${SLURM_NTASKS_PER_NODE:-${TASKS_PER_NODE:?is not set in $site}}
    ((SLURM_CPUS_ON_NODE >= tasks_per_node)) || end 2 "$SLURM_CPUS_ON_NODE CPUs of a node are too \
few for $tasks_per_node tasks: give sbatch --exclusive, or --ntasks-per-node"
    prepare
}

# A singleton starts as soon as the one before it is told to end: that one may still be saving.
wait_for_namesakes() {
    local tries
    for ((tries = 0; tries < 60; tries++)); do
        [[ $(squeue -h -u "$SLURM_JOB_USER" -n "$SLURM_JOB_NAME" -t COMPLETING -o %i) ]] || return
        sleep 2
    done
}

set_environment() { # the tasks inherit it
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node -o "$first" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export MASTER_ADDR MASTER_PORT PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
}

make_command() { # sets `command`: what srun starts
    local mounts=$PWD:$PWD,$here:$here${MOUNTS:+,$MOUNTS} image=${CONTAINER#*:}
    local task=(bash "$here/task.sh" "$logs")
    case $CONTAINER in
        '') command=("${task[@]}" "${MEGATRON_SRPO[@]}") ;;
        pyxis:*) command=(--container-image="$image" --container-mounts="$mounts"
            --container-workdir="$PWD" --no-container-mount-home
            "${task[@]}" "${MEGATRON_SRPO[@]}") ;;
        apptainer:*) command=("${task[@]}" apptainer exec --nv --bind "$mounts" --pwd "$PWD"
            "$image" "${MEGATRON_SRPO[@]}") ;;
        *) end 2 "CONTAINER=$CONTAINER: must be empty, pyxis:IMAGE or apptainer:IMAGE" ;;
    esac
}

# In the background: bash runs a trap only between commands, and `wait` is one that it interrupts.
run_tasks() { # returns srun's exit code
    srun --ntasks=$((SLURM_JOB_NUM_NODES * tasks_per_node)) --ntasks-per-node="$tasks_per_node" \
        --cpus-per-task=$((SLURM_CPUS_ON_NODE / tasks_per_node)) --mpi=none \
        --kill-on-bad-exit=1 --label --open-mode=append --output="$logs/%N.log" \
        "${command[@]}" "$@" &
    step=$!
    while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done
    wait "$step" # the last one may have been interrupted by a signal too
}

find_cause() { # SRUN_CODE: sets `cause` to the exit code of the program that explains the step's end
    # Not the first that ended: 2 and 3 are no consequences of another task's end, all others may be.
    cause=$(sort "$logs"/*.ends 2>/dev/null | awk '
        $3 == 2 || $3 == 3 { known = $3; exit }
        $3 && !first { first = $3 }
        END { print (known ? known : first + 0) }')
    if ((cause == 0 && $1 != 0)); then cause=1; fi
}

requeue() { # exits
    local record tries=0
    until record=$(scontrol show job "$SLURM_JOB_ID"); do # the controller may be down for a while
        ((++tries < 60)) || end "$cause" "the controller does not answer"
        sleep 10
    done
    # Not what was cancelled or has passed its time limit, nor what Slurm has requeued by itself:
    # this shell may even have outlived its attempt, on a node that was given up for dead.
    [[ $record == *"JobState=RUNNING "* && $record == *"Restarts=$attempt "* ]] ||
        end "$cause" "Slurm itself has ended this attempt"
    ((attempt < MAX_RESTARTS)) ||
        end "$cause" "is not requeued: it was restarted $attempt times (MAX_RESTARTS)"
    say "is requeued"
    scontrol requeue "$SLURM_JOB_ID" || end "$cause" "could not be requeued"
    exit "$cause"
}

trap 'say "is asked to stop"; asked=1; [[ $step ]] && kill -USR1 "$step"' USR1 # srun tells all tasks
# Slurm has sent it to the tasks too; a second signal would make them leave without saving.
trap 'say "is ended by Slurm"' TERM

read_site
logs=$PWD/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID/attempt-$attempt
mkdir -p "$logs"
set_environment
make_command
say "$SLURM_JOB_NODELIST, $tasks_per_node tasks each, $MASTER_ADDR:$MASTER_PORT; logs in $logs"
wait_for_namesakes
if [[ $asked ]]; then cause=75 && requeue; fi # nothing has begun that could save itself
run_tasks "$@"
srun_code=$?
find_cause "$srun_code"
say "srun ended with $srun_code; the cause is $cause"
case $cause in
    0) end 0 "done" ;;
    2 | 3) end "$cause" "another start would end the same: see $logs" ;;
    *) requeue ;;
esac
