#!/usr/bin/env bash
# Several nodes, started from any one of them over ssh, through the deepspeed launcher and pdsh:
#   launch_scripts/train_multinode_deepspeed.sh HOSTFILE train --config run.yaml [--section.key value ...]
# HOSTFILE has a line `HOST slots=RANKS` for each node; rank 0 runs on the first. All nodes need this folder, this python
# and the output_dir under the same path, and ssh without a password.
# MASTER_ADDR=address   of the first node, if others cannot reach what its `hostname -I` names first
# NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=eth0   if the nodes have interfaces that do not lead to each other
# To save and stop, signal one rank where it runs: kill -TERM PID, with the PID from OUTPUT_DIR/pids/HOST-RANK.
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
mapfile -t hosts < <(sed -E '/^[[:space:]]*(#|$)/d; s/^([^[:space:]]+).*/\1/' "$hostfile")
[ "${#hosts[@]}" -gt 0 ] || fail "$hostfile: names no host"
twice=$(printf '%s\n' "${hosts[@]}" | sort | uniq -d)
[ -z "$twice" ] || fail "$hostfile: names ${twice//$'\n'/, } twice"
command -v pdsh >/dev/null || fail "pdsh is not installed here"

# All at once: a node that is down costs 10 s, however many there are.
python=$(command -v python)
silent=$(for host in "${hosts[@]}"; do
    (ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$host" test -x "$python" 2>/dev/null || echo "$host") &
done; wait)
[ -z "$silent" ] || fail "no ssh without a password to, or no $python on: ${silent//$'\n'/ }; see: ssh ${silent%%$'\n'*}"
bind='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
port=$(ssh -n "${hosts[0]}" "$python -c '$bind'")

# pdsh starts ranks in a bare environment; the launcher exports what stands in this file. No tokens: ps would show them.
if [ -z "$(nvidia-smi --list-gpus 2>/dev/null || true)" ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
travels='^(PATH|LD_LIBRARY_PATH|OMP_NUM_THREADS|(DPO_DS|DS|NCCL|GLOO|UCX|FI|TORCH|HF|TRANSFORMERS|TOKENIZERS|TRITON)_[A-Z0-9_]*)='
DS_ENV_FILE=$(mktemp -t deepspeed_env.XXXXXX)
export DS_ENV_FILE
env | grep -E "$travels" | grep -vE '^[A-Z_]*(TOKEN|KEY|SECRET)=' >"$DS_ENV_FILE"

# Remote shells read the arguments again; the launcher itself quotes those with a space.
arguments=()
for argument; do
    [[ $argument == *" "* ]] || printf -v argument %q "$argument"
    arguments+=("$argument")
done

# pdsh's launcher hands --log_level to itself alone; its reports from the nodes are taken out of what the ranks print.
exec > >(grep --line-buffered -v '\[launch\.py:[0-9]*:')
set -x
exec deepspeed --hostfile "$hostfile" --launcher pdsh --master_port "$port" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
    --force_multi --no_ssh_check --log_level critical --module dpo_ds "${arguments[@]}"
