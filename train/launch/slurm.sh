#!/bin/bash
# A training under SLURM that may be preempted, or be longer than its time limit, as often as you like:
#
#     sbatch train/launch/slurm.sh train/recipes/full.yaml model.name=… data.train=birds.csv train.output_dir=runs/birds
#
# How the signals go:
#   * 120 seconds before the time limit SLURM sends USR1 to this shell alone (B:); the shell passes it on to srun, and
#     srun to every process. Each finishes its step, one saves a checkpoint, all end with code 75.
#   * On preemption SLURM sends TERM to the processes themselves. The shell must not pass that on: a second signal ends
#     a process at once, without a checkpoint.
#   * Code 75 says "interrupted, go on later": the job goes back into the queue under its own number. It finds its
#     checkpoint by --resume auto. Any other code is final.
#
# The 120 seconds must be longer than a step and a save; `timing.jsonl` and the log say how long yours take. There is no
# torchrun here, for it would turn code 75 into 1: SLURM starts one process for each GPU itself.
#
#SBATCH --job-name=clipkit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

again=0
trap 'again=1; kill -USR1 "$job"' USR1
trap 'again=1' TERM

# One process a task: its rank is its task's number. With --gpus-per-task each sees one GPU, which is its number 0.
# --kill-on-bad-exit=0: or srun would end the other processes when the first of them is done with saving. --wait=25: but
# none goes on for longer than that when one of them is gone.
# shellcheck disable=SC2016  # the variables are those of the task
srun --wait=25 --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=0
    exec clipkit train "$@" --resume auto
' clipkit "$@" &
job=$!

wait "$job"
code=$?
while [ "$again" = 1 ]; do # a signal ends `wait`, not what it waits for
    again=0
    wait "$job"
    code=$?
done

if [ "$code" = 75 ]; then
    echo "interrupted after a checkpoint; back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
