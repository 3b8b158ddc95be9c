#!/usr/bin/env bash
# What some training after a conversion takes back: a dense model of recipes/scale.sh is converted to codes of several widths, and
# each is trained on, beside the dense model itself. From the repository's root:
#
#   recipes/heal.sh runs/heal runs/scale/qwen3-dense/model TEXT [KEY=VALUE ...]
#
# TEXT calibrates, so it must not be evaluated on. Each row's log ends with the perplexity of the dense model, and of the codes
# before and after; all are of codes as they are trained: features in 16 bits, bits per axis as they are cached, and none exact.
# recipes/queue.sh trains them, and further settings are for every run. ROWS="dense|16.*" makes those rows alone whose names match; the
# dense one is what others are compared with. HEAD_DIM=64 is for a GPT-2.
set -euo pipefail
out=$1 model=$2 text=$3

rows() {
    cat << END
dense       --topk 1 --dense-dims $((${HEAD_DIM:-128} - 1)) --basis identity --cache-dtype int8
16+16       --topk 16 --dense-dims 16
32+16       --topk 16 --dense-dims 32
40+16       --topk 16 --dense-dims 40
16+8        --topk 8 --dense-dims 16
k16         --topk 16 --dense-dims 0
axes48-int4 --key-bytes 48 --basis scaled --cache-dtype int4
axes48-int3 --key-bytes 48 --basis scaled --cache-dtype d8s4v3
axes48-int3-whitened --key-bytes 48 --basis whitened --cache-dtype d8s4v3
axes40-int3-whitened --key-bytes 40 --basis whitened --cache-dtype d8s4v3
axes40-int4 --key-bytes 40 --basis scaled --cache-dtype int4
axes32-int4 --key-bytes 32 --basis scaled --cache-dtype int4
axes24-int4 --key-bytes 24 --basis scaled --cache-dtype int4
axes24      --key-bytes 24 --basis scaled
axes32-int4-whitened --key-bytes 32 --basis whitened --cache-dtype int4
axes24-whitened --key-bytes 24 --basis whitened
axes24-int8-whitened --key-bytes 24 --basis whitened --cache-dtype int8
axes24-int3-whitened --key-bytes 24 --basis whitened --cache-dtype d8s4v3
12+4        --topk 4 --dense-dims 12
6+4         --topk 4 --dense-dims 6
k8          --topk 8 --dense-dims 0
END
}

plain="--recent 0 --first 0 --prefill coded --cache-dtype auto"
rows | { grep -E "^(${ROWS:-.*}) " || true; } | while read -r name code; do
    # shellcheck disable=SC2086
    [[ -d $out/converted/$name ]] || flashsfa convert "$model" -o "$out/converted/$name" $plain $code --calibrate "$text" >&2 < /dev/null
    echo "$name heal model=$out/converted/$name"
done | COMMAND=distill recipes/queue.sh "$out" "" "${@:4}"
