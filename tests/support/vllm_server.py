"""One attention layer served as vLLM serves it, and the sizes that the tests of vLLM share."""

import itertools
from types import SimpleNamespace

import torch

from flashsfa import reference, topk_codes
from flashsfa.decode import FEW_QUERIES
from flashsfa.mask import Mask

HKV, D, DV, TOPK, DENSE, PAGE = 2, 32, 24, 5, 4, 16
CODING = {"topk": TOPK, "dense_dims": DENSE}
STEPS = [
    {"a": 5},  # a short prompt
    {"a": 1, "b": 40},  # decoding beside a prompt
    {"a": 1, "b": 20, "c": 7},  # the prompt's second chunk, beside a new one
    {"c": 1, "a": 1, "b": 1},
    {"b": 1, "c": 33, "a": 2},  # several tokens for requests that have decoded
    {"a": 1, "b": 1, "c": 1},
]


class Server:
    """One attention layer with its pages, requests and steps, as vLLM's scheduler and model runner would have them."""

    def __init__(
        self, vllm, config, *, hq=2 * HKV, hkv=HKV, window=None, layout="LBHNC", dtype=torch.float32, pages=24
    ):
        from flashsfa.vllm.backend import SparseFeatureBackend as Backend

        self.vllm, self.hq, self.hkv, self.window, self.dtype = vllm, hq, hkv, window, dtype
        spec = {"block_size": PAGE, "num_kv_heads": hkv, "head_size": D, "head_size_v": DV, "dtype": dtype}
        kind = vllm.FullAttentionSpec if window is None else vllm.SlidingWindowSpec
        spec = Backend.customize_spec(kind(**spec, **({} if window is None else {"sliding_window": window})))
        assert Backend.customize_spec(spec) is spec
        assert PAGE in Backend.get_supported_kernel_block_sizes(spec)
        assert vllm.KVCacheLayout[layout] in Backend.supported_kv_cache_layouts()
        self.kv_cache = cache_views(spec, pages, vllm.KVCacheLayout[layout])[1]
        self.builder = Backend.get_builder_cls()(
            spec, ["model.layers.1.self_attn.attn"], config, torch.get_default_device()
        )
        assert self.builder.reorder_batch_threshold == FEW_QUERIES
        self.impl = Backend.get_impl_cls()(hq, D, D**-0.5, hkv, None, window, "auto", None, "decoder", None)
        self.layer = SimpleNamespace(layer_name="model.layers.1.self_attn.attn")
        self.free = torch.randperm(pages - 1).add(1).tolist()  # block 0 is vLLM's null block
        self.requests = {}  # name: (q, k, v, pages), the tokens seen so far and [T, H, D] each
        self.metadata = None  # of the last step

    def step(self, new, padding=0, empty=0):
        """`new` maps requests to numbers of new tokens; `empty` ones without any follow. Returns what each request's new tokens get."""
        # those with one new token first, then those with a few, as the builder asks
        new = dict(sorted(new.items(), key=lambda item: (item[1] > 1) + (item[1] > FEW_QUERIES)))
        rows, slots, tables, held = [], [], [], []
        for name, n in new.items():
            fresh = [torch.randn(n, h, w, dtype=self.dtype) for h, w in ((self.hq, D), (self.hkv, D), (self.hkv, DV))]
            *story, pages = self.requests.get(name, (*(x[:0] for x in fresh), []))
            start, end = len(story[0]), len(story[0]) + n
            while len(pages) * PAGE < end:
                pages.append(self.free.pop())
            if self.window is not None:  # pages that the window of the first new token has left are gone
                for i in range(max(0, start - self.window + 1) // PAGE):
                    pages[i] = 0
            self.requests[name] = (*(torch.cat(x) for x in zip(story, fresh, strict=True)), pages)
            rows.append(fresh)
            slots += [pages[i // PAGE] * PAGE + i % PAGE for i in range(start, end)]
            tables.append(torch.tensor(pages, dtype=torch.int32))
            held.append(end)
        query, key, value = (
            torch.cat((*x, torch.randn(padding, *x[0].shape[1:], dtype=self.dtype))) for x in zip(*rows, strict=True)
        )
        bounds = torch.tensor([0, *itertools.accumulate([*new.values(), *[0] * empty])], dtype=torch.int32)
        slots = torch.tensor(slots + [-1] * padding)
        lengths = torch.tensor(held + [0] * empty, dtype=torch.int32)
        tables += [torch.zeros(0, dtype=torch.int32)] * empty
        width = max(map(len, tables)) + 2
        common = self.vllm.CommonAttentionMetadata(
            query_start_loc=bounds, query_start_loc_cpu=bounds.cpu(), seq_lens=lengths, num_reqs=len(lengths),
            num_actual_tokens=int(bounds[-1]), max_query_len=max(new.values()), max_seq_len=max(held),
            block_table_tensor=torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in tables]),
            slot_mapping=slots, seq_lens_cpu_upper_bound=lengths.cpu(),
        )  # fmt: skip
        self.metadata = self.builder.build(0, common)
        output = self.run(query, key, value, self.metadata)[: int(bounds[-1])]
        return dict(zip(new, output.split(list(new.values())), strict=True))

    def run(self, query, key, value, metadata):
        output = torch.full((len(query), self.hq, DV), 7.0, dtype=self.dtype)
        self.impl.forward(self.layer, query, key, value, self.kv_cache, metadata, output=output)
        decoding = sum(len(decode.seq_lens) for decode in metadata.decodes)
        assert (output[max(metadata.tokens, decoding) :] == 7).all()
        return output

    def assert_attends(self, out, **coding):
        """Each request's output within twice the error of the plain operator in the same dtype, over its whole story."""
        for name, rows in out.items():
            truth, plain = (self.expected(name, len(rows), dtype, **coding) for dtype in (torch.float64, self.dtype))
            assert not rows.isnan().any()
            rounding = torch.finfo(self.dtype).eps * truth.abs().max()
            assert (rows - truth).abs().max() <= 2 * (plain - truth).abs().max() + 2 * rounding

    def expected(self, name, n, dtype, topk=TOPK, dense_dims=DENSE, topk_query=None, basis=None, query_pattern=None):
        q, k, v = (x.transpose(0, 1)[None] for x in self.requests[name][:3])
        if basis is not None:
            q, k = basis.transform_query(q), basis.transform_key(k)
        k = topk_codes(k, topk, dense_dims=dense_dims).to_dense()
        if topk_query != D:
            q = topk_codes(q, topk_query or topk, dense_dims=dense_dims, pattern=query_pattern).to_dense()
        q, k, v = (x.to(dtype) for x in (q[:, :, -n:], k, v))
        mask = Mask(is_causal=True, window=self.window)
        return reference.attention(q, k, v, mask=mask, scale=D**-0.5)[0][0].transpose(0, 1)


def cache_views(spec, blocks, layout, layers=2):
    """[blocks, kv heads, tokens, C] of each layer in a buffer of 255s in the memory order of `layout`."""
    shape = (layers, blocks, spec.num_kv_heads, spec.block_size, spec.state_content_size_bytes)
    raw = torch.full([shape[i] for i in layout.value], 255, dtype=torch.uint8)
    logical = raw.permute([layout.value.index(i) for i in range(5)])
    assert spec.page_size_bytes == spec.num_kv_heads * spec.block_size * spec.state_content_bytes
    return [x.view(spec.dtype) for x in logical]
