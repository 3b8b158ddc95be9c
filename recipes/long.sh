#!/usr/bin/env bash
# Goes on with finished runs at a context of 8192, eight times that of recipes/scale.sh: 24.6M tokens, a third of the learning rate. A run keeps
# its recipe but for this, and so its attention; the size of its scores is in its weights. One that began dense goes on with codes, in its basis. From the repository's root:
#
#   recipes/long.sh runs/scale/qwen3-dense runs/scale/qwen3-32+16
#
# SETTINGS="KEY=VALUE ..." are further settings: data.train=data/facts.npy, say, for a text with facts that are asked for later in it
# (recipes/facts.py).
#
# The models are then in runs/scale/qwen3-dense-8k/model and so on: flashsfa eval frontier and eval needle measure them at --lengths 1024,8192.
# Not for GPT-2, whose positions are learned. A run that was stopped goes on where it was.
set -euo pipefail

for run in "$@"; do
    [[ -f $run-8k/result.json ]] && continue
    flashsfa train pretrain "$run/recipe.yaml" -o "$run-8k" --set "model.start=$run" --set data.context=8192 --set training.batch=6 \
        --set training.micro_batch=3 --set training.tokens=24_576_000 --set training.learning_rate=3.0e-4 --set training.warmup=50 \
        --set attention.score_scale=1 --set attention.temperature=1 --set attention.sparse_temperature=null \
        --set attention.dense_share=0 ${SETTINGS:+$(printf -- '--set %s ' $SETTINGS)}
done
