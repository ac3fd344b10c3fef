#!/bin/bash
# Several GPUs, on one node or several, with torchrun. On one node:
#
#     GPUS=4 bash train/launch/torchrun.sh train/recipes/full.yaml model.name=… data.train=birds.csv \
#         train.output_dir=runs/birds
#
# On several nodes, the same command on each, with the name of one of them; all need the same data and output_dir:
#
#     NODES=2 HEAD=node0 GPUS=4 bash train/launch/torchrun.sh train/recipes/full.yaml …
#
# Signals: Ctrl-C and `kill -TERM` of torchrun reach every process once, through torchrun. They finish their step, save
# a checkpoint and end; torchrun waits 30 seconds for that, then kills them, and the steps after the last checkpoint are
# lost. torchrun does not handle USR1 and would die of it: send USR1 to the processes themselves
# (`pkill -USR1 -P PID_OF_TORCHRUN`). torchrun returns 1 for any code of theirs: the same command resumes the run.
#
# When a process dies, torchrun ends the others within 30 seconds. RESTARTS=3 starts all of them again up to three times,
# each time from the newest checkpoint.
set -eu

nodes=${NODES:-1}
if [ "$nodes" = 1 ]; then
    meeting=(--standalone)
else
    meeting=(--rdzv_backend c10d --rdzv_endpoint "${HEAD:?the name of one of the nodes}:${PORT:-29500}" --rdzv_id "${RUN:-clipkit}")
fi
exec torchrun "${meeting[@]}" --nnodes "$nodes" --nproc_per_node "${GPUS:-1}" --max_restarts "${RESTARTS:-0}" \
    -m clipkit train "$@" --resume auto
