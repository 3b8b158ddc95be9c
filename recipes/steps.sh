#!/usr/bin/env bash
# What a training step takes, and its peak memory: GPT-2 124M dense and by the best recipe; and GPT-2 medium (354M), each on one GPU and
# sharded over two by FSDP2. 60 steps each, the runs on one GPU side by side. From the repository's root:
#
#   recipes/steps.sh runs/steps
#
# The table's "ms per step" is the median over groups of ten steps; "peak MiB" is that of the first GPU.
set -euo pipefail

best="attention.kind=sfa attention.topk=8 attention.topk_query=64 attention.gradient=all attention.equalize=true"
medium="model.config.n_embd=1024 model.config.n_layer=24 model.config.n_head=16"
short="training.tokens=2_949_120 training.save_every=1000 training.evaluate_every=1000 data.validation_windows=48"

recipes/queue.sh "$1" "" "${@:2}" << END
124m-dense       gpt2-124m $short
124m-best        gpt2-124m $short $best
354m-dense       gpt2-124m $short $medium
354m-best        gpt2-124m $short $medium $best
END

JOBS=1 recipes/queue.sh "$1" "124m-dense 354m-dense" "${@:2}" << END
354m-dense-fsdp  gpt2-124m $short $medium processes=2 training.fsdp=true
354m-best-fsdp   gpt2-124m $short $medium $best processes=2 training.fsdp=true
END
