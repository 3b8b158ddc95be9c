"""Backends of the operator, one module each; `dispatch` notes what runs, and `topk` puts the GPU's selection in place."""

from . import topk as topk
