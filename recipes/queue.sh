#!/usr/bin/env bash
# Trains rows of recipes side by side, one run on each GPU, and puts them beside one another. From the repository's root:
#
#   rows | recipes/queue.sh OUT "BASELINE ..." [KEY=VALUE ...]
#
# Rows come on standard input, a line each: NAME RECIPE [KEY=VALUE ...]. Further settings are for every run; a row's processes=2
# trains it on the first two GPUs, so give those rows alone, with JOBS=1. What is finished is not run again, and what was stopped
# goes on from its last checkpoint: the same command goes on where it was. At the end, or without any rows, what is finished is
# compared with each BASELINE: the runs whose names begin as its own does, up to the first hyphen.
#
#   COMMAND  of `flashsfa train`, pretrain by default
#   JOBS     runs side by side, one per GPU by default; small models do not fill one
#   GPUS     to spread them over, all by default
set -euo pipefail
export OUT=$1 SETTINGS="${*:3}" GPUS=${GPUS:-$(nvidia-smi -L 2> /dev/null | wc -l)}
# accelerate then compiles one block of a model instead of all in a row
export ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=true

train() {
    local name=$1 recipe=$2 set=() start=(flashsfa) began=$SECONDS
    [[ -f $OUT/$name/result.json ]] && return
    ((GPUS < 2)) || export CUDA_VISIBLE_DEVICES=$((SLOT % GPUS))
    for setting in "${@:3}" $SETTINGS; do
        if [[ $setting == processes=* ]]; then
            start=(torchrun --standalone --nproc-per-node "${setting#*=}" -m flashsfa.cli)
            unset CUDA_VISIBLE_DEVICES
        else
            set+=(--set "$setting")
        fi
    done
    if "${start[@]}" train "${COMMAND:-pretrain}" "recipes/$recipe.yaml" -o "$OUT/$name" ${set[@]+"${set[@]}"} > "$OUT/$name.log" 2>&1; then
        echo "$name: $((SECONDS - began)) s, $(grep '^validation perplexity' "$OUT/$name.log" | tail -n 1)"
    else
        echo "failed: $name: $(tail -n 1 "$OUT/$name.log")"
    fi
}
export -f train

mkdir -p "$OUT"
xargs -r -P "${JOBS:-$((GPUS > 1 ? GPUS : 1))}" --process-slot-var=SLOT -L 1 bash -c 'train "$@"' train
for first in $2; do
    runs=("$OUT/$first")
    for result in "$OUT/${first%%-*}"-*/result.json; do
        [[ $result == "$OUT/$first/result.json" ]] || runs+=("${result%/result.json}")
    done
    [[ ! -f $OUT/$first/result.json ]] || flashsfa train compare "${runs[@]}" -o "$OUT/compared"
done
