"""What prefill runs on a GPU beside the fused kernels of torch."""

from ...triton import first_use as first_use
