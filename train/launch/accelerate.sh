#!/bin/bash
# The same with `accelerate launch`, for those who keep their machines in an `accelerate config`:
#
#     bash train/launch/accelerate.sh train/recipes/full.yaml model.name=… data.train=birds.csv \
#         train.output_dir=runs/birds
#     ACCELERATE="--num_processes 4 --multi_gpu" bash train/launch/accelerate.sh …
#
# Of that config, the number of processes, machines and ports counts; precision comes from `train.precision`. FSDP and
# DeepSpeed are refused where they would not do what they promise.
#
# How the signals go: several processes run under torchrun, so read torchrun.sh. A single one is a child of
# `accelerate launch`: Ctrl-C reaches both. `kill` ends the launcher and leaves the child behind, so send signals to the
# child (`pkill -TERM -P PID_OF_ACCELERATE`), or start a single process as plain `clipkit train`, whose code 75 is seen.
set -eu

# shellcheck disable=SC2086  # several options in one variable
exec accelerate launch ${ACCELERATE:-} -m clipkit train "$@" --resume auto
