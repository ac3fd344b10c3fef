#!/bin/bash
# A training with `accelerate launch`, for machines that an `accelerate config` describes:
#
#     bash train/launch/accelerate.sh train/recipes/full.yaml model.name=… data.train=birds.csv \
#         train.output_dir=runs/birds
#     ACCELERATE="--num_processes 4 --multi_gpu" bash train/launch/accelerate.sh …
#
# clipkit uses the number of processes, machines and ports of that config; precision comes from `train.precision`. FSDP
# and DeepSpeed are refused where clipkit does not support them.
#
# Signals: several processes run under torchrun, so see torchrun.sh. A single one is a child of `accelerate launch`:
# Ctrl-C reaches both. `kill` ends the launcher and leaves the child running, so send signals to the child
# (`pkill -TERM -P PID_OF_ACCELERATE`), or start a single process as plain `clipkit train`, which returns code 75.
set -eu

# shellcheck disable=SC2086  # several options in one variable
exec accelerate launch ${ACCELERATE:-} -m clipkit train "$@" --resume auto
