#!/usr/bin/env bash
# GPT-2 124M (150M tokens) and a Qwen3 of 125M with heads of 128 (98M tokens), the most telling rows first, and their comparison. From
# the repository's root:
#
#   recipes/scale.sh runs/scale                                    one run at a time on each GPU
#   recipes/scale.sh runs/scale training.tokens=9_830_400          further settings, for every run
#
# ROWS="qwen3-.*" trains those rows alone whose names match. recipes/queue.sh trains them: a script that was stopped goes on where it was. A row takes five to seven minutes of one H200.
#
# What RoPE on a quarter of each head saves a model that is converted afterwards, at equal bytes, is the loss of these two:
#   for name in dense dense-quarter; do flashsfa convert runs/scale/qwen3-$name/model -o runs/converted-$name --topk 16 \
#     --dense-dims 32 --calibrate TRAIN --eval VALIDATION; done
set -euo pipefail

rows() {
    k8="attention.kind=sfa attention.topk=8"
    best="$k8 attention.topk_query=64 attention.gradient=all attention.equalize=true"
    mixed="attention.kind=sfa attention.topk=4 attention.dense_dims=6 attention.topk_query=64 attention.score_scale=3"
    plain="attention.topk_query=null attention.gradient=kept attention.sparse_temperature=null"
    late="attention.kind=sfa attention.dense_share=0.5 attention.topk_query"
    dense="attention.kind=dense attention.topk=null $plain"
    full="attention.positions=full attention.dense_dims=0"
    short="attention.kind=short attention.width"
    cat << END
qwen3-dense         qwen3-d128 $dense $full
qwen3-32+16         qwen3-d128
gpt2-dense          gpt2-124m
gpt2-k8-best        gpt2-124m  $best
qwen3-32+16-scaled  qwen3-d128 attention.score_scale=2
qwen3-k16-map       qwen3-d128 $plain $full attention.train_basis=true
qwen3-short64       qwen3-d128 $dense $full $short=64
qwen3-40+16         qwen3-d128 attention.dense_dims=40
qwen3-16+8          qwen3-d128 attention.dense_dims=16 attention.topk=8
qwen3-dense-quarter qwen3-d128 $dense
gpt2-short12        gpt2-124m  $short=12
gpt2-k8             gpt2-124m  $k8
gpt2-short32        gpt2-124m  $short=32
gpt2-dense-1        gpt2-124m  training.seed=1
gpt2-k8-best-1      gpt2-124m  $best training.seed=1
qwen3-dense-1       qwen3-d128 $dense $full training.seed=1
qwen3-32+16-1       qwen3-d128 training.seed=1
gpt2-k8-scaled      gpt2-124m  $k8 attention.topk_query=64 attention.score_scale=3
gpt2-6+4-scaled     gpt2-124m  $mixed
gpt2-6+4-early      gpt2-124m  $mixed attention.gradient=all attention.gradient_share=0.1
gpt2-dense-scaled   gpt2-124m  attention.score_scale=2
gpt2-int8           gpt2-124m  attention.kind=int8
gpt2-6+4-late       gpt2-124m  $late=64 attention.topk=4 attention.dense_dims=6
gpt2-k8-late        gpt2-124m  $late=64 attention.topk=8
qwen3-16+8-late     qwen3-d128 $plain $full $late=128 attention.topk=8 attention.dense_dims=16
qwen3-32+16-late    qwen3-d128 $plain $full $late=128 attention.dense_dims=32
qwen3-k16           qwen3-d128 $plain $full
gpt2-k8-scaled-all  gpt2-124m  $k8 attention.topk_query=64 attention.score_scale=3 attention.gradient=all
END
}

rows | { grep -E "^(${ROWS:-.*}) " || true; } | recipes/queue.sh "$1" "gpt2-dense qwen3-dense" "${@:2}"
