#!/usr/bin/env bash
# The rows of docs/notes/2026-11-26-quality.md, the most telling first, those of docs/notes/2026-11-27-prefill.md last, and their comparison. From the
# repository's root:
#
#   recipes/quality.sh runs/quality                       one run at a time on each GPU
#   JOBS=5 recipes/quality.sh runs/quality                five side by side: a model this small does not fill an H100
#   recipes/quality.sh runs/quality training.tokens=9_633_792       further settings, for every run
#
# recipes/queue.sh trains them: a script that was stopped goes on where it was.
set -euo pipefail

rows() {
    k8="attention.kind=sfa attention.topk=8"
    best="attention.topk_query=64 attention.gradient=all"
    equal="$k8 $best attention.equalize=true"
    pairs="$k8 attention.topk_query=32 attention.query_pattern=2:4 attention.gradient=all"
    half_pairs="$k8 attention.dense_dims=32 attention.topk_query=16 attention.query_pattern=2:4 attention.gradient=all"
    plain="attention.temperature=1 attention.sparse_temperature=null"
    whole="attention.positions=full attention.dense_dims=0"
    dense="attention.kind=dense attention.topk=null attention.topk_query=null attention.gradient=kept attention.sparse_temperature=null"
    full="$dense $whole attention.temperature=1"
    short="attention.kind=short attention.width"
    theta="model.config.rope_parameters.rope_theta=1000"
    cat << END
gpt2-dense                  gpt2-27m
gpt2-k8-denseq-all-equal    gpt2-27m  $equal
gpt2-short32                gpt2-27m  $short=32
gpt2-short12                gpt2-27m  $short=12
gpt2-k8-denseq-all          gpt2-27m  $k8 $best
gpt2-k8                     gpt2-27m  $k8
qwen3-full                  qwen3-29m $full
qwen3-full-warm             qwen3-29m $dense $whole
qwen3-24+8-denseq-all-warm  qwen3-29m
qwen3-24+8-denseq-all       qwen3-29m $plain
qwen3-24-dense              qwen3-29m $dense attention.temperature=1
gpt2-k8-denseq              gpt2-27m  $k8 attention.topk_query=64
gpt2-k8-all                 gpt2-27m  $k8 attention.gradient=all
gpt2-k8-q16-all             gpt2-27m  $k8 attention.topk_query=16 attention.gradient=all
gpt2-k8-denseq-all-anneal   gpt2-27m  $k8 $best attention.anneal.share=0.5
qwen3-24+8-denseq-all-warm-theta qwen3-29m $theta
qwen3-24+8-denseq-all-theta qwen3-29m $plain $theta
qwen3-32+4-denseq-all       qwen3-29m $plain attention.dense_dims=32 attention.topk=4
qwen3-16+14-denseq-all-full qwen3-29m $plain attention.positions=full attention.dense_dims=16 attention.topk=14
qwen3-k25-denseq-all        qwen3-29m $plain $whole attention.topk=25
qwen3-k25-denseq            qwen3-29m $plain $whole attention.topk=25 attention.gradient=kept
qwen3-k8-denseq-all         qwen3-29m $plain $whole
qwen3-short36               qwen3-29m $full $short=36
gpt2-dense-1                gpt2-27m  training.seed=1
gpt2-dense-2                gpt2-27m  training.seed=2
gpt2-k8-denseq-all-equal-1  gpt2-27m  $equal training.seed=1
gpt2-k8-denseq-all-equal-2  gpt2-27m  $equal training.seed=2
gpt2-short32-1              gpt2-27m  $short=32 training.seed=1
gpt2-short32-2              gpt2-27m  $short=32 training.seed=2
gpt2-k8-denseq-all-1        gpt2-27m  $k8 $best training.seed=1
gpt2-k8-denseq-all-2        gpt2-27m  $k8 $best training.seed=2
qwen3-full-1                qwen3-29m $full training.seed=1
qwen3-full-2                qwen3-29m $full training.seed=2
qwen3-full-warm-1           qwen3-29m $dense $whole training.seed=1
qwen3-full-warm-2           qwen3-29m $dense $whole training.seed=2
qwen3-24+8-denseq-all-warm-1 qwen3-29m training.seed=1
qwen3-24+8-denseq-all-warm-2 qwen3-29m training.seed=2
qwen3-24+8-denseq-all-1     qwen3-29m $plain training.seed=1
gpt2-dense-equal            gpt2-27m  attention.equalize=true
gpt2-short32-equal          gpt2-27m  $short=32 attention.equalize=true
gpt2-window                 gpt2-27m  attention.window=256
gpt2-window-k8-denseq-all-equal gpt2-27m $equal attention.window=256
gpt2-int8                   gpt2-27m  attention.kind=int8
gpt2-low-rank               gpt2-27m  attention.kind=low_rank attention.width=256
gpt2-performer              gpt2-27m  attention.kind=performer attention.width=256 training.micro_batch=8
gpt2-k8-anneal              gpt2-27m  $k8 attention.anneal.share=0.5
gpt2-k8-denseq-all-equal-first gpt2-27m $equal attention.layers=[1,2,3,4,5]
qwen3-32+8-denseq-all-warm  qwen3-29m attention.dense_dims=32
qwen3-32+8-denseq-all-warm-1 qwen3-29m attention.dense_dims=32 training.seed=1
qwen3-32+8-denseq-all-warm-2 qwen3-29m attention.dense_dims=32 training.seed=2
qwen3-32+16-denseq-all-warm qwen3-29m attention.dense_dims=32 attention.topk=16
qwen3-32+16-denseq-all-warm-1 qwen3-29m attention.dense_dims=32 attention.topk=16 training.seed=1
qwen3-32+16-denseq-all-warm-2 qwen3-29m attention.dense_dims=32 attention.topk=16 training.seed=2
qwen3-int8-warm             qwen3-29m $dense $whole attention.kind=int8
qwen3-int8-warm-1           qwen3-29m $dense $whole attention.kind=int8 training.seed=1
qwen3-int8-warm-2           qwen3-29m $dense $whole attention.kind=int8 training.seed=2
qwen3-short36-warm          qwen3-29m $dense $whole $short=36
gpt2-k8-q24-all             gpt2-27m  $pairs
gpt2-k8-q32+24-all          gpt2-27m  $half_pairs
gpt2-k8-q24-all-1           gpt2-27m  $pairs training.seed=1
gpt2-k8-q24-all-2           gpt2-27m  $pairs training.seed=2
gpt2-k8-q32+24-all-1        gpt2-27m  $half_pairs training.seed=1
gpt2-k8-q24-all-equal       gpt2-27m  $pairs attention.equalize=true
gpt2-k8-m32-denseq-all      gpt2-27m  $k8 attention.dense_dims=32 $best
END
}

rows | recipes/queue.sh "$1" "gpt2-dense qwen3-full qwen3-full-warm" "${@:2}"
