#!/usr/bin/env bash
# One node, every GPU on it (or RANKS of them), through the deepspeed launcher:
#   launch_scripts/train_single_node.sh train --config run.yaml [--section.key value ...]
# The script becomes the launcher (exec), so what stops the script stops the ranks. To save and stop, signal a rank:
#   kill -TERM "$(cat OUTPUT_DIR/pids/* | head -n 1)"
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: $0 COMMAND [--config run.yaml] [--section.key value ...]   (RANKS=n for n ranks)" >&2
    exit 2
fi
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # else the launcher warns that it found nothing
fi
port=$(python -c 'from dpo_ds.cluster.launch import free_port; print(free_port())')

set -x
exec deepspeed --num_gpus "$ranks" --master_port "$port" --log_level critical --module dpo_ds "$@"
