"""One call of a decode backend, in the words of its tests."""

from dataclasses import dataclass

import torch

from flashsfa.budget import FeatureBudget
from flashsfa.decode import attend_cached as attend
from flashsfa.mask import Mask
from flashsfa.scores import ScoreRules
from flashsfa.stored import KVView


@dataclass(frozen=True)
class DecodeRules:
    """Where a sequence's keys are and which of them its queries see."""

    kv_lens: torch.Tensor | None = None
    window: int | None = None
    key_padding_mask: torch.Tensor | None = None
    page_table: torch.Tensor | None = None

    @property
    def mask(self):
        return Mask(True, self.window, self.key_padding_mask, kv_lens=self.kv_lens)

    def visible(self, m, n, device):
        """[B or 1, M, N] bool, or None when every query sees every key."""
        return None if self.mask.shows_all(m) else self.mask.to_bool(m, n, device)[:, 0]


def attend_cached(q, codes, v, *, v_scale=None, value_tolerance=0.0):
    """What a model's attention over a cache calls."""
    budget = FeatureBudget.of(q.shape[-1], codes.topk, dense_dims=codes.dense_dims)
    return attend(q, KVView(codes, v, v_scale), budget, value_tolerance=value_tolerance)


def decode(backend, q, codes, v, rules, scale, tolerance, *, topk_query=None, v_scale=None, softcap=None):
    """out and lse of `backend.decode`."""
    kv = KVView(codes, v, v_scale, rules.kv_lens, rules.page_table)
    return backend.decode(q, kv, rules.mask, ScoreRules(scale, softcap), tolerance, topk_query)


def assert_graph_follows(step, lens):
    """A CUDA graph of `step` gives what a call gives, bit for bit, whatever the lengths [2] on the device become."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for new in ([3000, 1], [17, 2900], [0, 64]):
        lens.copy_(torch.tensor(new))
        graph.replay()
        torch.testing.assert_close(captured, step(), rtol=0, atol=0)
