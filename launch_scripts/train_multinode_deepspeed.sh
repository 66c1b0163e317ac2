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
for host in "${hosts[@]}" ${MASTER_ADDR:+"$MASTER_ADDR"}; do
    [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9._:-]*$ ]] || fail "'$host' is no host: names have letters, digits and . _ : - alone"
done
twice=$(printf '%s\n' "${hosts[@]}" | sort | uniq -d)
[ -z "$twice" ] || fail "$hostfile: names ${twice//$'\n'/, } twice"
command -v pdsh >/dev/null || fail "pdsh is not installed here"

# The launcher itself writes these two into the remote command as they are.
python=$(command -v python)
for path in "$PWD" "$python"; do
    [[ $path =~ ^[A-Za-z0-9_@+=:,./-]+$ ]] || fail "'$path': the launcher can start nothing there, only in folders whose" \
        "names have letters, digits and _ @ + = : , . - alone; call it elsewhere, with whole paths"
done

# All at once: a node that is down costs 10 s, however many there are.
silent=$(for host in "${hosts[@]}"; do
    (ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$host" test -x "$python" 2>/dev/null || echo "$host") &
done; wait)
[ -z "$silent" ] || fail "no ssh without a password to, or no $python on: ${silent//$'\n'/ }; see: ssh ${silent%%$'\n'*}"
bind='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
port=$(ssh -n "${hosts[0]}" "$python -c '$bind'")
if [ -z "$(nvidia-smi --list-gpus 2>/dev/null || true)" ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi

# What a shell reads between double quotes as the text itself, and pdsh, which replaces %h and its like, as well.
quoted() { # TEXT
    local text=${1//\\/\\\\}
    text=${text//\$/\\\$}
    text=${text//\`/\\\`}
    printf %s "${text//%/%%}"
}

# pdsh starts ranks in a bare environment; the launcher exports what stands in this file, and puts quotes around it where
# it needs them. No secrets: ps would show them. The launcher exports some variables unasked, so it does not see the rest.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
secret='TOKEN|SECRET|KEY|PASSWORD'
travels='^((PATH|LD_LIBRARY_PATH|OMP_NUM_THREADS)$|(DPO_DS|DS|NCCL|GLOO|UCX|FI|TORCH|HF|TRANSFORMERS|TOKENIZERS|TRITON)_|PYTHON|MLFLOW|MV2)'
DS_ENV_FILE=$(mktemp -t deepspeed_env.XXXXXX)
export DS_ENV_FILE
while IFS= read -r name; do
    [[ $name =~ $travels && $name != DS_ENV_FILE ]] || continue
    if [[ ${name//TOKENIZERS/} =~ $secret ]]; then
        unset "$name"
    elif [[ ${!name} == *$'\n'* ]]; then
        echo "$(basename "$0"): $name has several lines; it stays here" >&2
        unset "$name"
    else
        value=$(quoted "${!name}")
        printf '%s=%s\n' "$name" "${value//\"/\\\"}" >>"$DS_ENV_FILE"
    fi
done < <(compgen -e)

# The launcher quotes arguments with a space, and their quotes; the others are quoted here.
arguments=()
for argument; do
    text=$(quoted "$argument"; printf .) # $(...) drops line ends at the end
    text=${text%.}
    [[ $argument == *" "* ]] || text="\"${text//\"/\\\"}\""
    arguments+=("$text")
done

# pdsh's launcher hands --log_level to itself alone; its reports from the nodes are taken out of what the ranks print.
# Where nobody reads this any more (`| head`), the ranks go on.
exec > >(grep --line-buffered -v '\[launch\.py:[0-9]*:' || cat >/dev/null)
set -x
exec deepspeed --hostfile "$hostfile" --launcher pdsh --master_port "$port" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
    --force_multi --no_ssh_check --log_level critical --module dpo_ds "${arguments[@]}"
