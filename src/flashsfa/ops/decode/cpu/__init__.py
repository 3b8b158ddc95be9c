"""Decode on the CPU, compiled by numba: codes and V are read once, as they are kept, by all cores.

Three passes over a scratch array [rows, N] of float32, small beside the cache (4 bytes a key and query row):

1. `keys`: scores of a chunk of keys for all rows (query heads x query tokens) of a kv head.
2. `softmax`: each row's maximum, weights and log-sum-exp, with the tokens that are held as they came and, with a tolerance, the cut
   below which weights may be left out.
3. `values`: the weighted sum over the V rows that any query row of the kv head needs.

Before them `queries` lays the queries out. Passes one and three are parallel over chunks of keys (`tasks`), so that one head uses all cores. The host hands
a cache over by its addresses (`ops/cpu/parts`); what the loops keep in registers is in `vectors`. numba is optional
(`pip install flashsfa[cpu]`). The first call with a dtype compiles for some seconds, once a machine (`ops/cpu/threads`).
"""

from ...cpu.threads import is_available, manner
from .host import decode, obstacle, prepared

__all__ = ["decode", "is_available", "manner", "obstacle", "prepared"]
