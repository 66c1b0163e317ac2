#!/usr/bin/env bash
# sft -> precompute -> train -> evaluate as Slurm jobs, each after the one before has come to its end:
#   launch_scripts/slurm_pipeline.sh RUN.YAML OUT [options of sbatch: --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 ...]
# RUN.YAML is one file for all four, with the base model in model.path; a command leaves out sections that are not its own.
# OUT gets sft/, cache/, dpo/ and evaluation/. A job that fails cancels those after it; one that is requeued keeps them
# waiting. Run it again to go on after a failure: what is finished ends at once.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 RUN.YAML OUT [options of sbatch]" >&2
    exit 2
fi
config=$1 out=$2
shift 2
script=$(dirname "$0")/slurm_train.sbatch
options=("$@")
after=""

submit() { # STAGE [--section.key value ...]
    local stage=$1
    local dependency=(${after:+"--dependency=afterok:$after" --kill-on-invalid-dep=yes})
    local job=(sbatch --parsable "--job-name=$stage" "${dependency[@]}" "${options[@]}" "$script" "$@" --config "$config")
    echo "+ ${job[*]}"
    after=$("${job[@]}")
    after=${after%%;*} # sbatch adds the cluster's name where there are several
    echo "$stage is job $after"
}

submit sft --output_dir "$out/sft"
submit precompute --model.path "$out/sft/final" --reference.cache "$out/cache"
submit train --model.path "$out/sft/final" --reference.kind cached --reference.cache "$out/cache" --output_dir "$out/dpo"
submit evaluate --evaluate.policy "$out/dpo/final" --evaluate.against "$out/sft/final" --output_dir "$out/evaluation"
