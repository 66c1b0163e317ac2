#!/usr/bin/env bash
# Several nodes without ssh: called once on each, within ten minutes, with the same arguments:
#   launch_scripts/train_no_ssh.sh HOSTFILE train --config run.yaml [--section.key value ...]
# HOSTFILE has a line `HOST slots=RANKS` for each node; rank 0 runs on the first.
# NODE_RANK=n     this node's line, from 0, where its name is not what `hostname` says
# MASTER_ADDR     of the first node, if its name in HOSTFILE is not known to the others
# MASTER_PORT     29500; nobody can ask the first node for a free one
set -euo pipefail

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}
[ $# -ge 2 ] || fail "usage: $0 HOSTFILE COMMAND [--config run.yaml] [--section.key value ...]"
hostfile=$1
shift
[ -r "$hostfile" ] || fail "$hostfile: no such hostfile; it has a line 'HOST slots=RANKS' for each node"
wrong=$(grep -nvE '^[[:space:]]*(#.*)?$|^[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$' "$hostfile" | head -n 1 || true)
[ -z "$wrong" ] || fail "$hostfile:$wrong: not of the form 'HOST slots=RANKS'"
mapfile -t hosts < <(sed -nE 's/^([^#[:space:]]+)[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$/\1/p' "$hostfile")
[ "${#hosts[@]}" -gt 0 ] || fail "$hostfile: names no host"
for i in "${!hosts[@]}"; do
    [ "${hosts[$i]%%.*}" != "$(hostname -s)" ] || NODE_RANK=${NODE_RANK:-$i}
done
[ -n "${NODE_RANK:-}" ] || fail "$hostfile does not name this node, $(hostname -s); give NODE_RANK=0 to $((${#hosts[@]} - 1))"
if [ -z "$(nvidia-smi --list-gpus 2>/dev/null || true)" ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # else the launcher warns that it found nothing
fi

set -x
exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:-${hosts[0]}}" \
    --master_port "${MASTER_PORT:-29500}" --log_level critical --module dpo_ds "$@"
