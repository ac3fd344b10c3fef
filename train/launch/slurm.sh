#!/bin/bash
# A training under SLURM that may be preempted or reach its time limit any number of times:
#
#     sbatch train/launch/slurm.sh train/recipes/full.yaml model.name=… data.train=birds.csv train.output_dir=runs/birds
#
# Signals:
#   * 120 seconds before the time limit SLURM sends USR1 to this shell alone (B:); the shell passes it on to srun, and
#     srun to every process. Each finishes its step, one saves a checkpoint, all end with code 75.
#   * On preemption SLURM sends TERM to the processes themselves. The shell must not pass that on: a second signal ends
#     a process at once, without a checkpoint.
#   * Code 75 means "interrupted, can be resumed": the job returns to the queue under its own number, and --resume auto
#     finds its checkpoint. Any other code is final.
#
# The 120 seconds must be longer than a step and a save; `timing.jsonl` and the log show how long yours take. This script
# does not use torchrun, which would turn code 75 into 1: SLURM starts one process for each GPU itself.
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

# One process a task: its rank is the number of the task. With --gpus-per-task each sees one GPU, as number 0.
# Without --kill-on-bad-exit=0, srun would end the other processes when the first has saved its checkpoint. With --wait=25
# they end at most 25 seconds after the first.
# shellcheck disable=SC2016  # the variables are those of the task
srun --wait=25 --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=0
    exec clipkit train "$@" --resume auto
' clipkit "$@" &
job=$!

wait "$job"
code=$?
while [ "$again" = 1 ]; do # a signal ends `wait`, not the job
    again=0
    wait "$job"
    code=$?
done

if [ "$code" = 75 ]; then
    echo "interrupted after a checkpoint; back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
