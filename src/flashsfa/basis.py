"""`FeatureBasis`: a change of coordinates per kv head that makes a dense checkpoint's queries and keys sparse.

q' = q Q and k' = k K with KᵀQ = 1, so q'·k' = q·k: before top-k no score changes. Q and K are chosen so that
what top-k drops matters least. Then Q is enlarged by a gain for what is dropped. In place of top-k each axis may have a fixed
number of bits (`AxisBits`); such a basis has no gain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .axes import AxisBits, AxisErrors
from .checks import FLOAT_DTYPES, require, require_float
from .codes import topk_codes
from .files import whole_file
from .ops.transform import transform

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_log = logging.getLogger("flashsfa")

KINDS = ("dictionary", "balanced", "whitened", "scaled", "pca", "identity")
SHARED = ("scaled", "whitened")  # in these an error of a key counts the same on each axis, so bits can be shared out
_SIDES, _AXES = ("query", "key"), ("axes.bits", "axes.step", "axes.centre")  # tensors of a file
_TOPK = "topk"  # in a file's metadata
_MAX_CONDITION = 1e8
_SAMPLE_KEYS = 4096  # keys a head that the dictionary is fitted to
_DICTIONARY_ROUNDS = 15
_ROUNDING = 1e-4  # of a product of columns, far above float32's
_GAIN_POWER = 0.75  # 0.5 keeps the size of scores, 1 their mean for given dense ones; docs/explanation/method.md


def default_kind(topk_query: int, head_dim: int) -> str:
    """The best kind where none is asked for: a dictionary for dense queries, a balanced basis for sparse ones."""
    return "dictionary" if topk_query == head_dim else "balanced"


@dataclass(frozen=True, eq=False)
class FeatureBasis:
    """Coordinates of H kv heads, for one layer or stacked for many (leading `...`).

    Attributes:
        query: [..., H, D, D] Q.
        key: [..., H, D, D] K, with KᵀQ the diagonal matrix of gains: 1 for the dense channel.
        axes: the bits [..., H, D] of each axis of a key; None for keys that top-k codes.
        topk: the budget that it is fitted to, for its gain; None for no gain, and for files that do not say it.
    """

    query: Tensor
    key: Tensor
    axes: AxisBits | None = None
    topk: int | None = None

    def __getitem__(self, layer: int) -> FeatureBasis:
        axes = None if self.axes is None else self.axes[layer]
        return FeatureBasis(self.query[layer], self.key[layer], axes, self.topk)

    def transform_query(self, q: Tensor) -> Tensor:
        """q [B, Hq, N, D] in the coordinates of its kv head."""
        return transform((q, self.query))[0]

    def transform_key(self, k: Tensor) -> Tensor:
        """k [B, H, N, D] in the coordinates of its head."""
        return transform((k, self.key))[0]

    def transform(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`transform_query(q)` and `transform_key(k)`, on a GPU in one launch."""
        one, other = transform((q, self.query), (k, self.key))
        return one, other

    @classmethod
    def identity(cls, num_kv_heads: int, head_dim: int) -> FeatureBasis:
        """The coordinates the model already has."""
        one = torch.eye(head_dim).expand(num_kv_heads, -1, -1)
        return cls(one.clone(), one.clone())

    @classmethod
    def from_moments(
        cls,
        moments: Moments,
        kind: str = "dictionary",
        *,
        topk: int | None = None,
        dense_dims: int = 0,
        key_bytes: int | None = None,
    ) -> FeatureBasis:
        """The basis of one layer from its calibration moments. docs/explanation/method.md derives the kinds.

        Args:
            moments: what calibration gathered.
            kind: "dictionary": "whitened", then rotated so that codes of `topk` and `dense_dims` lose least: the
                best for dense queries. "balanced": a feature counts equally on both sides: for queries that are
                sparse too. "whitened": the largest entries of a key are the ones whose loss costs a dense query's
                scores most; keys on their principal axes, largest first. "scaled": the model's own features, each as large as
                the queries that meet it make it count. "pca": principal axes of the keys alone.
                "identity": no change.
            topk, dense_dims: the key code that a dictionary is fitted to, and the gain; without topk there is none.
            key_bytes: in place of topk, bytes of a key whose axes are kept in a fixed number of bits each (`AxisBits.fit`). For
                "scaled" and "whitened", where the error of an axis is that of scores; the axes of the latter are then the principal
                ones of keys about their mean. They are ordered by their bits.

        Raises `ValueError` for an unknown kind, a dictionary without `topk`, `key_bytes` that do not fit, or moments of no token or
        with NaN; a nearly singular moment matrix is regularised, with a warning.
        """
        require(kind in KINDS, f"basis must be one of {', '.join(KINDS)}; got {kind!r}")
        require(
            key_bytes is None or (kind in SHARED and topk is None and dense_dims == 0),
            f"key_bytes go with a basis {' or '.join(SHARED)} and without topk and dense_dims; got {kind!r}, topk={topk}, "
            f"dense_dims={dense_dims}",
        )
        require(moments.count > 0, "no token was seen: calibrate on some text first")
        moments.require_finite()
        if key_bytes is not None:
            if kind not in moments.axes:  # of many numbers of bytes, the first takes the time
                query, key = _coordinates(moments, kind, about_mean=True)
                moments.axes[kind] = query, key, AxisErrors.of(moments.sample @ key.float())
            query, key, errors = moments.axes[kind]
            order, axes = AxisBits.shared_out(errors, key_bytes)
            columns = order[:, None].expand_as(key)
            return cls(query.gather(-1, columns).float(), key.gather(-1, columns).float(), axes)
        if kind == "identity":
            heads, head_dim, _ = moments.key_outer.shape
            return cls.identity(heads, head_dim)
        query, key = _coordinates(moments, kind)
        if kind == "dictionary":
            if topk is None:
                raise ValueError("a dictionary is fitted to a budget: give topk and dense_dims")
            rotation = _dictionary(moments.sample.double() @ key, topk, dense_dims)
            query, key = query @ rotation, key @ rotation
        if topk is not None:
            query = query * _gain(moments.sample.double() @ key, topk, dense_dims)
        return cls(query.float(), key.float(), topk=topk)

    @classmethod
    def from_layers(
        cls,
        moments: list[Moments],
        kind: str = "dictionary",
        *,
        topk: int | None = None,
        dense_dims: int = 0,
        key_bytes: int | None = None,
        fitted: Callable[[], object] = lambda: None,
    ) -> FeatureBasis:
        """One basis of many layers, with the layer as leading dimension; arguments as in `from_moments`. `fitted` is called after each layer."""

        def fit(layer: Moments) -> FeatureBasis:
            return cls.from_moments(layer, kind, topk=topk, dense_dims=dense_dims, key_bytes=key_bytes)

        layers = []
        for basis in _in_threads(fit, moments):
            layers.append(basis)
            fitted()
        query, key = (torch.stack([getattr(x, name) for x in layers]) for name in ("query", "key"))
        axes = [x.axes for x in layers if x.axes is not None]
        return cls(query, key, AxisBits.stack(axes) if axes else None, layers[0].topk)

    def check(self, topk: int | None = None, dense_dims: int = 0) -> None:
        """Raise `ValueError` unless the two sides undo one another, up to the gain of codes of this budget. Without topk there is
        no gain; a basis with bits per axis takes none.

        Their entries may be as large as a condition number of 1e8 makes them, and are rounded to float32.
        """
        require_float("the basis", self.query)
        require_float("the basis", self.key)
        require(
            self.query.ndim in (3, 4)
            and self.query.shape == self.key.shape
            and self.key.shape[-1] == self.key.shape[-2],
            f"the sides of a basis must both be [..., H, D, D], got {tuple(self.query.shape)} and {tuple(self.key.shape)}",
        )
        if self.axes is not None:
            bits, expected = tuple(self.axes.bits.shape), tuple(self.key.shape[:-1])
            require(bits == expected, f"the bits per axis of the basis must be [..., H, D] = {expected}, got {bits}")
            require(
                topk is None,
                f"the basis has bits per axis, {self.axes.key_bytes} bytes of a key, and fits no topk={topk}: calibrate for that",
            )
        require(
            self.topk in (None, topk),
            f"the basis is fitted to codes of topk={self.topk}, and fits none of topk={topk}: calibrate for that",
        )
        query, key = (x.detach().to("cpu", torch.float64) for x in (self.query, self.key))
        require(bool(query.isfinite().all() and key.isfinite().all()), "the basis holds NaN or infinity")
        sizes = key.norm(dim=-2)[..., :, None] * query.norm(dim=-2)[..., None, :]  # [..., H, D, D] of the columns
        product, slack = key.mT @ query, _ROUNDING * sizes
        gain, room = product.diagonal(dim1=-2, dim2=-1), slack.diagonal(dim1=-2, dim2=-1)  # [..., H, D]
        sparse, apart = gain[..., dense_dims:], room[..., dense_dims:]
        share = 1 if topk is None else topk / sparse.shape[-1]  # of a key's square, which codes keep at least
        largest = (1 / share) ** _GAIN_POWER
        sound = (
            ((product - torch.diag_embed(gain)).abs() <= slack).all()
            and ((gain - 1).abs() <= room)[..., :dense_dims].all()
            and ((sparse - sparse.mean(-1, keepdim=True)).abs() <= apart.amax(-1, keepdim=True)).all()
            and (sparse >= 1 - apart).all()
            and (sparse <= largest + apart).all()
        )
        gained = (
            "have a gain, which is for top-k alone"
            if topk is None
            else f"its gain is that of another budget than topk={topk}, dense_dims={dense_dims}"
        )
        require(
            bool(sound), f"the two sides of the basis do not undo one another, or {gained}: calibrate the model again"
        )

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name) for name in _SIDES}
        if self.axes is not None:
            tensors |= dict(zip(_AXES, self.axes.tensors(), strict=True))
        fitted = None if self.topk is None else {_TOPK: str(self.topk)}
        with whole_file(path) as beside:
            save_file({name: x.contiguous() for name, x in tensors.items()}, beside, metadata=fitted)

    @classmethod
    def load(cls, path: str | Path) -> FeatureBasis:
        """Read what `save` wrote. Raises `ValueError` for a file that holds no basis: other tensors, integers, NaN."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                names, said = file.keys(), file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} holds no feature basis: the file is damaged ({error})") from error
        require(
            set(tensors) in ({*_SIDES}, {*_SIDES, *_AXES}),
            lambda: (
                f"{path} holds no feature basis, which is two tensors key and query, or these and {', '.join(_AXES)}, but "
                f"{', '.join(sorted(tensors)) or 'none'}"
            ),
        )
        sides = {name: tensors[name] for name in _SIDES}
        for name, x in sides.items():
            require(
                x.dtype in FLOAT_DTYPES and x.ndim in (3, 4) and x.shape == tensors["key"].shape,
                f"{path} holds no feature basis: {name} is {tuple(x.shape)} of {x.dtype}",
            )
            require(bool(x.isfinite().all()), f"{path} holds no feature basis: NaN or infinity stands in {name}")
        fitted = said.get(_TOPK)
        require(fitted is None or fitted.isdecimal(), f"{path} holds no feature basis: it says {_TOPK}={fitted!r}")
        if len(tensors) == len(sides):
            return cls(**sides, topk=None if fitted is None else int(fitted))
        try:
            axes = AxisBits(*(tensors[name] for name in _AXES))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no feature basis: {error}") from error
        require(
            axes.bits.shape == sides["key"].shape[:-1],
            f"{path} holds no feature basis: {_AXES[0]} is {tuple(axes.bits.shape)} but key {tuple(sides['key'].shape)}",
        )
        return cls(**sides, axes=axes)


class Moments:
    """Second moments of a layer's queries and keys and the sum of its keys, streamed in float64, and a uniform sample of keys.

    Memory a head is O(D²) and 4096 keys, for any amount of text.
    """

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        square = (num_kv_heads, head_dim, head_dim)
        self.key_outer = torch.zeros(square, dtype=torch.float64, device="cpu")
        self.query_outer = torch.zeros(square, dtype=torch.float64, device="cpu")
        self.key_sum = torch.zeros(num_kv_heads, head_dim, dtype=torch.float64, device="cpu")
        self.count = self.query_count = 0
        self.sample = torch.zeros(num_kv_heads, 0, head_dim, dtype=torch.float32, device="cpu")  # [H, S, D] keys
        self._lots = torch.zeros(0, dtype=torch.float32, device="cpu")  # [S] each token draws one, the highest stay
        self.axes: dict[str, tuple[Tensor, Tensor, AxisErrors]] = {}  # Q, K and what axes lose, by the kind of a basis
        self._generator = torch.Generator().manual_seed(0)

    def require_finite(self) -> None:
        """Raise `ValueError` if NaN or infinity was among the tokens."""
        require(
            bool(self.key_outer.isfinite().all() and self.query_outer.isfinite().all()),
            "the model's queries or keys hold NaN or infinity: its weights are damaged, or overflow in their dtype",
        )

    def update(self, q: Tensor, k: Tensor) -> None:
        """Add the tokens of q [B, Hq, N, D] and k [B, H, N, D]."""
        self.axes.clear()
        heads = self.key_outer.shape[0]
        keys = k.detach().transpose(0, 1).flatten(1, 2)  # [H, B·N, D]
        queries = q.detach().unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3).double()  # [H, B·G·N, D]
        self.key_outer += (keys.mT.double() @ keys.double()).cpu()
        self.key_sum += keys.double().sum(1).cpu()
        self.query_outer += (queries.mT @ queries).cpu()
        self.count += keys.shape[1]
        self.query_count += queries.shape[1]
        new = torch.rand(keys.shape[1], generator=self._generator, dtype=torch.float32, device="cpu")
        lots = torch.cat((self._lots, new))
        self._lots, kept = lots.topk(min(_SAMPLE_KEYS, len(lots)))
        self.sample = torch.cat((self.sample, keys.float().cpu()), dim=1)[:, kept]


def _in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """`function` of each, several at a time, of which each computes in one thread: many threads gain little on matrices of a head, and where
    other programs want the cores they wait for one another most of the time."""
    threads, contexts = torch.get_num_threads(), [copy_context() for _ in items]  # a thread begins without checked mode
    try:
        with ThreadPoolExecutor(
            min(threads, len(items)) or 1, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield from pool.map(lambda context, item: context.run(function, item), contexts, items)
    finally:
        torch.set_num_threads(threads)  # what threads to come begin with


def _coordinates(moments: Moments, kind: str, *, about_mean: bool = False) -> tuple[Tensor, Tensor]:
    """Q and K [H, D, D] of a kind, without what codes change in them. With `about_mean` the mean of each axis is kept beside: what is left are
    the keys around it."""
    key_moment = moments.key_outer / moments.count
    if about_mean:
        mean = moments.key_sum / moments.count
        key_moment = key_moment - mean[:, :, None] * mean[:, None, :]
    key_moment = _regularised(key_moment, "key")
    if kind == "pca":
        axes = torch.linalg.eigh(key_moment).eigenvectors.flip(-1)
        return axes, axes
    if kind == "scaled":
        size = (moments.query_outer / moments.query_count).diagonal(dim1=-2, dim2=-1).sqrt()  # [H, D]
        largest = size.amax(-1, keepdim=True)
        size = size.clamp(min=largest.where(largest > 0, 1) / _MAX_CONDITION**0.5)
        return torch.diag_embed(1 / size), torch.diag_embed(size)
    query_moment = _regularised(moments.query_outer / moments.query_count, "query")
    root = torch.linalg.cholesky(query_moment)  # L, E[qqᵀ] = L Lᵀ
    # Whitened queries are q L⁻ᵀ, and their keys k L: the principal axes of these diagonalise both sides.
    spectrum, axes = torch.linalg.eigh(root.mT @ key_moment @ root)
    spectrum, axes = spectrum.flip(-1), axes.flip(-1)  # [H, D] descending, [H, D, D]
    query, key = torch.linalg.solve_triangular(root.mT, axes, upper=True), root @ axes
    if kind == "balanced":
        scale = spectrum.clamp(min=torch.finfo(spectrum.dtype).tiny)[..., None, :] ** 0.25
        return query * scale, key / scale
    return query, key


def _dictionary(keys: Tensor, topk: int, dense_dims: int) -> Tensor:
    """[H, D, D] rotation R of keys [H, S, D] that makes the codes of their rows x R nearest to them, squared.

    Alternates between the best codes of a rotation and the best rotation of codes (orthogonal Procrustes); neither
    step can increase the error.
    """
    rotation = torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device).expand(keys.shape[0], -1, -1)
    for _ in range(_DICTIONARY_ROUNDS):
        codes = topk_codes(keys @ rotation, topk, dense_dims=dense_dims).to_dense()
        left, _, right = torch.linalg.svd(keys.mT @ codes)
        rotation = left @ right
    return rotation


def _gain(keys: Tensor, topk: int, dense_dims: int) -> Tensor:
    """[H, 1, D] factors that make up for what the codes of keys [H, S, D] drop: scores of too few features are too flat."""
    whole = keys[..., dense_dims:].square().sum((1, 2))
    kept = topk_codes(keys, topk, dense_dims=dense_dims).values.square().sum((1, 2))
    gain = keys.new_ones(len(keys), 1, keys.shape[-1])
    gain[..., dense_dims:] = (whole / kept.where(kept > 0, whole)).where(whole > 0, 1)[:, None, None] ** _GAIN_POWER
    return gain


def _regularised(moment: Tensor, side: str) -> Tensor:
    """`moment` [H, D, D] with a multiple of the identity added where its condition number is past 1e8."""
    values = torch.linalg.eigvalsh(moment)  # [H, D] ascending
    largest = values[..., -1]
    floor = largest.where(largest > 0, 1) / _MAX_CONDITION  # a head that only saw zeros gets the identity
    lift = (floor - values[..., 0]).clamp(min=0)  # [H]
    if bool((lift > 0).any()):
        _log.warning(
            "%d of %d %s moment matrices are nearly singular and were regularised; calibrate on more text",
            int((lift > 0).sum()), lift.numel(), side,
        )  # fmt: skip
    return moment + lift[..., None, None] * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
