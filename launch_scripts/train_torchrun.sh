#!/usr/bin/env bash
# The same through torchrun, on one node or, started once on each, on several:
#   launch_scripts/train_torchrun.sh train --config run.yaml
#   NODES=4 HEAD=node1:29500 launch_scripts/train_torchrun.sh train --config run.yaml
# torchrun returns 1 for whatever a rank returned: read OUTPUT_DIR/STATUS.json.
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: $0 COMMAND [--config run.yaml] [--section.key value ...]   (RANKS=n, NODES, HEAD)" >&2
    exit 2
fi
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
nodes=${NODES:-1}
if [ "$nodes" -gt 1 ]; then
    where=(--nnodes "$nodes" --rdzv_backend c10d --rdzv_id dpo_ds --rdzv_endpoint "${HEAD:?host:port of the first node}")
else
    where=(--standalone)
fi

set -x
exec torchrun "${where[@]}" --nproc_per_node "$ranks" -m dpo_ds "$@"
