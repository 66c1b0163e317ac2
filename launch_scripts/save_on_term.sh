#!/usr/bin/env bash
# Runs a launcher so that SIGTERM, which a pod gets that is evicted, and Ctrl-C have all ranks save and exit with 75:
#   launch_scripts/save_on_term.sh launch_scripts/train_single_node.sh train --config run.yaml
# DeepSpeed's launcher and torchrun would end their ranks at once. Here one rank of this node is handed SIGUSR1 instead.
set -uo pipefail

if [ $# -eq 0 ]; then
    echo "usage: $0 LAUNCHER [argument ...]" >&2
    exit 2
fi
"$@" &
launcher=$!

first_rank() { # a launcher's nearest descendant that knows its local rank
    local generation=("$launcher") pid
    while [ "${#generation[@]}" -gt 0 ]; do
        mapfile -t generation < <(for pid in "${generation[@]}"; do cat "/proc/$pid/task/"*/children; done 2>/dev/null | xargs -n 1)
        for pid in "${generation[@]}"; do
            if tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -q '^LOCAL_RANK='; then
                echo "$pid"
                return
            fi
        done
    done
}

# shellcheck disable=SC2317 # called by the trap
save() {
    local rank
    rank=$(first_rank)
    if [ -n "$rank" ]; then
        kill -USR1 "$rank"
    else
        kill -TERM "$launcher"
    fi
}
trap save TERM INT # what runs in the background ignores Ctrl-C

while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait`, not the launcher
    wait "$launcher"
done
wait "$launcher"
