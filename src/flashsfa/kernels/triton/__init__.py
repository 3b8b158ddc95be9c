"""Triton kernels; imported only where they run, so that `import flashsfa` needs no Triton."""
