# shellcheck shell=bash disable=SC2034  # launch.sh reads them
# What differs between clusters. Copy to slurm/site.sh and edit. `megatron-srpo submit` reads it at
# submission, every job when it starts; a plain sbatch knows of SBATCH_... only after
# `source slurm/site.sh`. Another file: export MEGATRON_SRPO_SITE=PATH.

# One task for each GPU of a node.
TASKS_PER_NODE=8

# Options of sbatch (man sbatch, INPUT ENVIRONMENT VARIABLES); those on its command line win.
export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=project SBATCH_QOS=normal
export SBATCH_GPUS_PER_NODE=$TASKS_PER_NODE # remove it where Slurm does not count GPUs
export SBATCH_EXCLUSIVE=exclusive SBATCH_MEM_PER_NODE=0
export SBATCH_TIMELIMIT=24:00:00
# A run is asked to stop so many seconds before its time limit (Slurm: up to a minute earlier). It
# needs them to end what it is generating and to save.
# export SBATCH_SIGNAL=B:USR1@300

# The program, one word each. In a container: its path there.
MEGATRON_SRPO=("$here/../.venv/bin/megatron-srpo")

# Nothing (the processes run as they are), pyxis:IMAGE or apptainer:IMAGE.
CONTAINER=
# What a container sees beside the folder of submission and this one: FROM:TO,FROM:TO
MOUNTS=/shared:/shared

# A job that was started more often than this ends instead of being requeued.
MAX_RESTARTS=20

# Run once in the job, on its first node, before the tasks start; they get its environment.
prepare() {
    # module load cuda
    # export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
    :
}
