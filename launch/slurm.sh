#!/usr/bin/env bash
# The pretraining job on a Slurm cluster, requeued until it is complete:
#
#   sbatch --nodes=4 --gpus-per-node=8 --exclusive --time=24:00:00 launch/slurm.sh CONFIG [--key ...]
#
# (or, where nodes are shared, --cpus-per-task in the place of --exclusive: ranks need CPUs, too)
# One torchrun a node; where and how many follows from the allocation. Ranks per node: NPROC, else
# the node's GPUs, else its tasks. Two minutes before the time limit, and when it is preempted, the
# job saves a checkpoint and goes back into the queue; it goes on from there when it starts again.
# A job that fails is not requeued. The checkout, its .venv and the output must be on a file system
# that all nodes share; make .venv on the login node: bash -c 'source launch/setup_env.sh'
#
#SBATCH --job-name=conda_dist
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -uo pipefail

# sbatch runs a copy of this file that lies somewhere else.
root=${SLURM_SUBMIT_DIR:-$PWD}
[ -f "$root/launch/slurm.sh" ] || { echo "error: sbatch this from the checkout" >&2; exit 2; }
[ -x "$root/.venv/bin/python" ] || {
    echo "error: no $root/.venv: make it with  bash -c 'source launch/setup_env.sh'" >&2
    exit 2
}
cd "$root" || exit 2
PATH=$root/.venv/bin:$PATH

nodes=${SLURM_JOB_NUM_NODES:?error: sbatch this file, or set the variables that Slurm sets}
ranks=${NPROC:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
[ -n "$first" ] || { echo "error: scontrol names no host of $SLURM_JOB_NODELIST" >&2; exit 1; }
# Jobs that share a node need ports of their own.
port=$((10000 + SLURM_JOB_ID % 20000))  # below those that systems give out

echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $nodes nodes x $ranks ranks," \
    "rendezvous at $first:$port"

patience=$(python -m conda_dist.launch.cluster.launcher 100)  # nothing from a torchrun without it

# The ranks' own exit codes do not come through torchrun: a stop is asked for of this script, or (by a
# preemption with a grace time) of what srun has started. Ranks that train say so in a note; a
# torchrun that has not started them dies of the signal.
stopping= limit= step= interrupted=
# Slurm signals this script alone (B:); srun passes SIGTERM on to the torchruns of all nodes.
trap 'stopping=1 interrupted=1; kill -TERM $step 2>/dev/null' TERM
trap 'stopping=1 interrupted=1 limit=1; kill -TERM $step 2>/dev/null' USR1
export CONDA_DIST_STOP_NOTE=$root/.stopped-$SLURM_JOB_ID
rm -f "$CONDA_DIST_STOP_NOTE"
srun --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \
    torchrun --nnodes="$nodes" --nproc-per-node="$ranks" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 $patience \
    -m conda_dist.launch.pretrain "$@" --resume &
step=$!
[ -z "$stopping" ] || kill -TERM "$step"  # the signal came before the step had a number

# A signal ends a wait early, and the wait then returns the signal's code, not the step's.
interrupted=1
while [ -n "$interrupted" ]; do
    interrupted=
    wait "$step"
    code=$?
done

if [ -e "$CONDA_DIST_STOP_NOTE" ] || [ "$code" -eq 143 ]; then stopping=1; fi  # 128 + SIGTERM
rm -f "$CONDA_DIST_STOP_NOTE"
# Slurm still calls a job running in the grace time of a preemption. One that it ends itself is
# completing: it was cancelled, is requeued by Slurm, or took longer than its limit to save.
state=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z]*')
if [ "$code" -eq 0 ]; then
    echo "job $SLURM_JOB_ID is complete"
elif [ -n "$stopping" ] && { [ "$state" = JobState=RUNNING ] || [ -n "$limit" ]; }; then
    echo "job $SLURM_JOB_ID has stopped, and goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
elif [ -n "$stopping" ]; then
    echo "job $SLURM_JOB_ID has stopped (${state:-no state}): cancelled, or Slurm's to requeue"
fi
exit "$code"
