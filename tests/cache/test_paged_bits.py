"""Pages of fewer bits, with and without exact tokens beside, against a list of tokens each of which is exact or coded."""

import math

import pytest
import torch

from flashsfa import PagedSparseKVCache, SparseKVCache, sparse_feature_decode
from flashsfa.axes import AxisBits
from flashsfa.coder import Coder
from flashsfa.formats import CodeFormat
from flashsfa.reference import sparse_rows

HKV, GROUP, D, DV, TOPK, DENSE, PAGE = 2, 2, 16, 32, 3, 4, 16
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
CLOSE_IN_FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # in which int8 is read
EXACT = [(0, 0), (5, 3), (0, 2), (4, 0), (99, 2)]
KINDS = ["int8", "d8s4v4", "d16s8v16", "d8s4v8-bitmap", "d8s8v8-packed", "d8s4v3", "rows", "axes"]


def draw(n, batch=1, dtype=torch.float64):
    return torch.randn(batch, HKV, n, D, dtype=dtype), torch.randn(batch, HKV, n, DV, dtype=dtype)


def options(kind):
    """How a cache keeps its tokens: by topk in the widths that `kind` names, by every feature in 4 bits, or in bits per axis."""
    if kind == "axes":
        sample = torch.randn(HKV, 64, D, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
        return {"axes": AxisBits.fit(sample, 6)[1], "dtype": CodeFormat()}
    if kind == "rows":
        return {"topk": D, "dtype": CodeFormat()}
    return {"topk": TOPK, "dense_dims": DENSE, "dtype": torch.int8 if kind == "int8" else CodeFormat.named(kind)}


class Tokens:
    """The plain model of one sequence: keys and values [Hkv, ...] in a list, those that are coded as decode reads them."""

    def __init__(self, kind, recent, first, held=()):
        given = options(kind)
        self.kind, self.recent, self.first, self.held = kind, recent, first, list(held)
        self.coder = Coder(given.get("topk"), given.get("dense_dims", 0), given["dtype"], given.get("axes"))

    def append(self, k, v):
        self.held += [(k[:, i], v[:, i]) for i in range(k.shape[1])]

    def fork(self):
        return Tokens(self.kind, self.recent, self.first, self.held)

    def attend(self, q):
        """out and lse of q [Hq, M, D]."""
        m, n = q.shape[1], len(self.held)
        keys, values = [], []
        position = torch.arange(n)
        is_exact = (position < self.first) | (position >= n - self.recent)
        for (k, v), exact in zip(self.held, is_exact.tolist(), strict=True):
            if not exact:
                rows = self.coder.encode(k[None, :, None], v[None, :, None]).rows(torch.float64)
                k, v = rows.k[0, :, 0], rows.v[0, :, 0]
            keys.append(k)
            values.append(v)
        k, v = (torch.stack(x, 1).repeat_interleave(GROUP, 0) for x in (keys, values))
        thin = q if self.kind in ("rows", "axes") else sparse_rows(q, TOPK, dense_dims=DENSE)
        s = D**-0.5 * (q @ k.mT).where(is_exact, thin @ k.mT)
        s = s.masked_fill(position > torch.arange(n - m, n)[:, None], -math.inf)
        return s.softmax(-1).nan_to_num() @ v, s.logsumexp(-1)  # a query before the first token sees nothing


def poison(cache):
    """Whatever may stand where nothing was written."""
    buffers = [*cache.codes.tensors(), *(cache.v.tensors() if hasattr(cache.v, "tensors") else [cache.v])]
    for buffer in (*buffers, *([] if cache.view([]).v_scale is None else [cache.view([]).v_scale])):
        if buffer.is_floating_point():
            buffer.fill_(math.nan)
        else:
            buffer.view(torch.uint8).copy_(torch.randint(0, 256, buffer.shape))


@pytest.mark.parametrize(("recent", "first"), EXACT)
@pytest.mark.parametrize("kind", KINDS)
def test_pages_hold_what_lists_hold(kind, recent, first):
    torch.manual_seed(recent)
    cache = PagedSparseKVCache(pages=40, page_size=PAGE, recent=recent, first=first, **options(kind))
    models = {cache.add(): Tokens(kind, recent, first) for _ in range(3)}
    cache.append(list(models), *draw(0, 3))
    poison(cache)
    for step in range(9):
        names = list(models)
        if step == 4:
            models[cache.fork(names[0])] = models[names[0]].fork()
        elif step == 7:
            cache.free(names[1])
            del models[names[1]]
        order = list(models)[step % 2 :: 1 + step % 3]
        k, v = draw((2, 1, 13, 20)[step % 4], len(order))
        cache.append(order, k, v)
        for i, name in enumerate(order):
            models[name].append(k[i], v[i])
        held = [name for name in models if models[name].held]
        q = torch.randn(len(held), HKV * GROUP, 1 + step % 3, D, dtype=torch.float64)
        found = sparse_feature_decode(q, cache.view(held), return_lse=True)
        for b, name in enumerate(held):
            for x, y in zip(found, models[name].attend(q[b]), strict=True):
                torch.testing.assert_close(x[b], y, **(CLOSE_IN_FLOAT32 if kind == "int8" else CLOSE))
    for name in models:
        cache.free(name)
    assert (cache.free_pages, cache.nbytes) == (40, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_a_contiguous_cache(kind):
    cache = PagedSparseKVCache(pages=4, page_size=PAGE, recent=3, first=2, **options(kind))
    whole, (k, v) = SparseKVCache(**options(kind)), draw(2 * PAGE, dtype=torch.float32)
    cache.append([cache.add()], k, v)
    whole.append(k, v)
    slots = 5 * HKV * 4 * (D + DV)
    assert cache.nbytes == whole.nbytes + slots
    cache.fork(0)
    assert cache.nbytes == whole.nbytes + slots
    cache.append([1], *draw(1, dtype=torch.float32))
    assert cache.nbytes == 3 * whole.nbytes // 2 + 2 * slots


@pytest.mark.parametrize("kind", KINDS)
def test_fused_kernels(kind, monkeypatch):
    pytest.importorskip("triton")
    from flashsfa import decode as module
    from flashsfa.ops.plan import DecodePlan

    cache = PagedSparseKVCache(pages=8, page_size=PAGE, recent=5, first=3, **options(kind))
    names = [cache.add(), cache.add()]
    cache.append(names, *draw(7, 2, torch.float32))
    cache.append(names[:1], *draw(20, 1, torch.float32))
    q = torch.randn(2, HKV * GROUP, 2, D)
    expected = sparse_feature_decode(q, cache.view(names))
    monkeypatch.setattr(
        module, "plan_decode", lambda q, kv: DecodePlan("triton", "asked for")
    )  # its interpreter on a CPU
    torch.testing.assert_close(sparse_feature_decode(q, cache.view(names)), expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a CodeFormat or None"):
        PagedSparseKVCache(TOPK, pages=2, dtype=torch.float16)
    with pytest.raises(ValueError, match="one of them must be given"):
        PagedSparseKVCache(pages=2)
    cache = PagedSparseKVCache(TOPK, pages=2, dtype=CodeFormat())
    name = cache.add()
    k, v = draw(3)
    with pytest.raises(ValueError, match="multiple of 16"):
        cache.append([name], k, v[..., :12])
    other = PagedSparseKVCache(pages=2, **options("axes"))
    other.add()
    with pytest.raises(ValueError, match="fit axes"):
        other.append([0], k[:, :1], v[:, :1])
    cache.append([name], k, v)
    with pytest.raises(TypeError, match="cast"):
        cache.append([name], k.float(), v.float())
    assert cache.length(name) == 3
