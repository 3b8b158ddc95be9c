#!/usr/bin/env bash
# What some training after a conversion takes back: a dense Qwen3 of recipes/scale.sh is converted to codes of several widths, and
# each is trained on, beside the dense model itself. From the repository's root:
#
#   recipes/heal.sh runs/heal runs/scale/qwen3-dense/model TEXT [KEY=VALUE ...]
#
# TEXT calibrates, so it must not be evaluated on. Each row's log ends with the perplexity of the dense model, and of the codes
# before and after; all are of codes as they are trained, in 16 bits and none exact. recipes/queue.sh trains them, and further
# settings are for every run. ROWS="dense|16.*" makes those rows alone whose names match; the dense one is what others are compared with.
set -euo pipefail
out=$1 model=$2 text=$3

rows() {
    cat << END
dense  --topk 1 --dense-dims 127 --basis identity --cache-dtype int8
16+16  --topk 16 --dense-dims 16
32+16  --topk 16 --dense-dims 32
40+16  --topk 16 --dense-dims 40
16+8   --topk 8 --dense-dims 16
k16    --topk 16 --dense-dims 0
END
}

plain="--recent 0 --first 0 --prefill coded --cache-dtype auto"
rows | { grep -E "^(${ROWS:-.*}) " || true; } | while read -r name code; do
    # shellcheck disable=SC2086
    [[ -d $out/converted/$name ]] || flashsfa convert "$model" -o "$out/converted/$name" $plain $code --calibrate "$text" >&2 < /dev/null
    echo "$name qwen3-d128-distill model=$out/converted/$name"
done | COMMAND=distill recipes/queue.sh "$out" "" "${@:4}"
