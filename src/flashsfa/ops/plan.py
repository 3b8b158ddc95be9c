"""Which form runs, and why. A plan is made once for calls that look alike, kept for their backward pass, and read by `explain()`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..budget import FeatureBudget
from ..checks import has_values
from ..extras import install_hint
from ..mask import Mask
from ..scores import ScoreRules
from ..stored import KVView
from . import nvrtc, record
from .decode.held import Held
from .prefill import fused
from .prefill.hopper import prefill as hopper
from .select import operators as select

# Measured on an H100.
_CUDNN_SHORTEST = 64  # cuDNN refuses some shorter sequences, and is no faster on them
# cuDNN's causality is square: a chunk of queries after earlier keys is two calls and a merge, FlashAttention-2's is
# one call. At some 600 and 350 TFLOP/s on an H100 cuDNN saves 1.2 us per GFLOP; two more launches cost about 50 us.
_CUDNN_CHUNK_FLOPS = 40e9

_plans: dict[tuple, PrefillPlan] = {}
_MOST_PLANS = 4096  # lengths differ from call to call in some programs


@dataclass(frozen=True)
class PrefillPlan:
    """What attention of many queries runs on.

    Attributes:
        hopper: why this package's kernel for Hopper is tried first; None where it is not.
        obstacle: why it is not, where the caller may have expected it.
        kernel: the fused kernel of torch for the rest, and for gradients; None for blocks of plain PyTorch.
        reason: for the kernel, or for none.
    """

    hopper: str | None
    obstacle: str | None
    kernel: fused.Kernel | None
    reason: str

    def record(self, operation: str, obstacle: str | None = None) -> None:
        """Note for `explain()` that `operation` runs on `kernel`, with the `obstacle` to a faster one."""
        reason = self.reason if obstacle is None else f"{self.reason}; {obstacle}"
        if self.kernel is None:
            record.record(operation, "torch", f"{reason}; scores are built in blocks", fallback=True)
        else:
            record.record(operation, "dense", reason, fallback=obstacle is not None)


def plan_prefill(
    q: Tensor, k: Tensor, v: Tensor, budget: FeatureBudget, mask: Mask, scores: ScoreRules, backend: str
) -> PrefillPlan:
    """The plan for q [B, Hq, N_q, D], keys [B, Hkv, N_k, D] and v [B, Hkv, N_k, Dv] without an idle window, of `backend` "auto" or
    "dense". Raises `ValueError` where "dense" cannot run."""
    packed = None if mask.cu_seqlens_q is None else (mask.cu_seqlens_q.numel(), mask.max_seqlen_q, mask.max_seqlen_k)
    key = (
        q.device, q.dtype, q.shape, k.shape, v.shape, budget, mask.is_causal, mask.window, mask.key_padding_mask is None, packed,
        scores.scale, scores.softcap, backend,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _plan_prefill(q, k, v, budget, mask, scores, backend)
    return plan


def _plan_prefill(
    q: Tensor, k: Tensor, v: Tensor, budget: FeatureBudget, mask: Mask, scores: ScoreRules, backend: str
) -> PrefillPlan:
    if scores.softcap is not None:
        kernel, reason = None, "no fused kernel caps scores"
    else:
        kernel, reason = choose_kernel(q, v, mask)
    if backend == "dense":
        if kernel is None:
            raise ValueError(f"backend='dense' cannot run: {reason}; use backend='auto'")
        return PrefillPlan(None, None, kernel, reason)
    if scores.softcap is not None:
        return PrefillPlan(None, None, kernel, reason)
    if budget.query_pattern is not None:
        obstacle = hopper.obstacle(q, budget.dense_dims, k, v, mask, scores.scale)
        if obstacle is not None:
            return PrefillPlan(None, f"no sparse tensor cores: {obstacle}", kernel, reason)
        return PrefillPlan("sparse tensor cores, for queries in the 2:4 pattern", None, kernel, reason)
    if hopper_is_faster(q, k, v, mask, scores.scale):
        return PrefillPlan("the kernel for Hopper, with dense queries", None, kernel, reason)
    return PrefillPlan(None, None, kernel, reason)


def choose_kernel(q: Tensor, v: Tensor, mask: Mask) -> tuple[fused.Kernel | None, str]:
    """The fastest fused kernel for these tensors, and why; None where torch has none."""
    width = max(q.shape[-1], v.shape[-1])
    if q.device.type == "cpu":
        return fused.CpuFlash(), "torch's fused CPU kernel"
    if q.device.type != "cuda":
        return None, f"torch has no fused attention with log-sum-exp on {q.device.type}"
    if q.dtype == torch.float64:
        return None, "no fused CUDA kernel takes float64"
    if q.dtype == torch.float32 or mask.key_padding_mask is not None:
        return fused.CudaEfficient(), "torch's memory-efficient CUDA kernel: the one that takes float32 and padding"
    if width > 256:
        return fused.CudaEfficient(), "torch's memory-efficient CUDA kernel: the one that takes heads wider than 256"
    n_q, n_k = q.shape[-2], v.shape[-2]
    plain = mask.window is None and mask.cu_seqlens_q is None
    two_sided = mask.window is not None and not mask.is_causal
    if two_sided and (mask.cu_seqlens_q is not None or n_q > n_k):
        return fused.CudaEfficient(), "torch's memory-efficient CUDA kernel: FlashAttention-2 misplaces such a window"
    shorter = min(n_q, n_k)
    flops = 4 * q.shape[0] * q.shape[1] * width * shorter * (n_k - shorter / 2)  # if causal
    if (
        torch.cuda.get_device_capability(q.device) >= (9, 0)
        and plain
        and width <= 128
        and shorter >= _CUDNN_SHORTEST
        and (not mask.is_causal or n_q == n_k or flops >= _CUDNN_CHUNK_FLOPS)
    ):
        return fused.CudaCudnn(), "cuDNN, the fastest dense kernel torch has for this mask on Hopper and later"
    if torch.cuda.get_device_capability(q.device) >= (8, 0):
        return fused.CudaFlash(), "FlashAttention-2 of torch"
    return fused.CudaEfficient(), "torch's memory-efficient CUDA kernel: FlashAttention-2 needs sm_80"


def hopper_is_faster(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> bool:
    """Whether dense queries q run on this package's kernel for Hopper, and faster than on torch's, as measured on an H100
    (docs/notes/2026-11-27-prefill.md): FlashAttention-2 splits the keys of few queries over more blocks, and cuDNN begins a block
    sooner."""
    if not hopper.is_hopper(q):
        return False
    _, longest_q, longest_k = hopper.sequences(q, k, mask)
    visible = hopper.most_visible(longest_k, mask.is_causal, mask.window)
    if longest_q < 512 or visible < 256:
        return False
    rival, _ = choose_kernel(q, v, mask)
    if isinstance(rival, fused.CudaCudnn) and visible < 2048:
        return False
    return hopper.obstacle(q, q.shape[-1], k, v, mask, scale) is None


@dataclass(frozen=True)
class DecodePlan:
    """What attention of a few queries over codes runs on.

    Attributes:
        backend: "hopper", "triton", "numba" or "torch"; and the `reason`.
        held: the view as the kernels on a GPU read it, if it was looked at so.
        fuses_exact: whether a kernel for Hopper attends to the tokens that are held as they came, after the coded ones.
    """

    backend: str
    reason: str
    held: Held | None = None
    fuses_exact: bool = False


def plan_decode(q: Tensor, kv: KVView) -> DecodePlan:
    """The plan for q [B, Hq, M, D] over stored keys and values; recorded for `explain()`."""
    is_compiling = torch.compiler.is_compiling()
    ask = _plan_decode.__wrapped__ if is_compiling else _plan_decode  # a trace warns of what is kept
    plan = ask(q.device.type, q.dtype, is_compiling or has_values(q), kv.is_narrow, is_compiling)
    if plan.backend == "numba":
        plan = _plan_numba(q.dtype, kv)
    elif plan.backend == "triton":
        plan = _plan_gpu(q, kv, plan)
    if is_compiling:
        return plan
    reason = plan.reason
    if kv.exact and (plan.backend != "numba" or kv.is_placed):
        obstacle = _obstacle_to_exact(q, kv, plan.backend)
        plan = replace(plan, fuses_exact=obstacle is None)
        reason = told_with_exact(reason, obstacle)
    if kv.exact and not kv.n_coded:
        record.record("decode", "hopper" if plan.fuses_exact else "torch", "every token is held as it came")
        return plan
    record.record("decode", plan.backend, reason, fallback=plan.backend == "torch")
    return plan


def told_with_exact(reason: str, obstacle: str | None) -> str:
    """The `reason` for what the coded tokens run on, with what the tokens held as they came do: a kernel, unless there is an obstacle."""
    if obstacle is None:
        return f"{reason}; tokens held as they came by a kernel for Hopper"
    return f"{reason}; tokens held as they came in plain PyTorch beside" + (f": {obstacle}" if obstacle else "")


def _obstacle_to_exact(q: Tensor, kv: KVView, backend: str) -> str | None:
    """Why no kernel attends to the tokens held as they came, "" where none is expected; None if one does."""
    if backend not in ("hopper", "triton") or not nvrtc.is_hopper(q.device):
        return ""
    from .decode.hopper.exact import exact

    return exact.obstacle(q, kv)


def _plan_numba(dtype: torch.dtype, kv: KVView) -> DecodePlan:
    from .decode import cpu

    obstacle = cpu.obstacle(dtype, kv)
    if obstacle is not None:
        return DecodePlan("torch", f"the fused CPU code {obstacle}")
    return DecodePlan("numba", cpu.manner())


def _plan_gpu(q: Tensor, kv: KVView, plan: DecodePlan) -> DecodePlan:
    from .decode.hopper import decode as hopper

    if not nvrtc.is_hopper(q.device):
        return plan
    held = Held.of(kv)
    if hopper.obstacle(q, held) is not None:
        return DecodePlan(plan.backend, plan.reason, held)
    return DecodePlan("hopper", "the kernel for Hopper, split over the keys", held)


@functools.cache
def _plan_decode(kind: str, dtype: torch.dtype, has_values: bool, is_narrow: bool, is_compiling: bool) -> DecodePlan:
    if not has_values:
        return DecodePlan("torch", "the tensors hold no values")
    if kind == "cuda":
        if not select.triton_is_installed():
            return DecodePlan("torch", "the fused kernels need Triton")
        if dtype == torch.float64:
            return DecodePlan("torch", f"the fused kernels take no {dtype}")
        if is_narrow:
            return DecodePlan(
                "triton",
                "kernels that unpack few bits in registers, split over the keys; every value is read, whatever the tolerance",
            )
        return DecodePlan("triton", "kernels over codes, split over the keys")
    if kind != "cpu":
        return DecodePlan("torch", f"no fused kernels on {kind}")
    from .decode import cpu

    if not cpu.is_available():
        return DecodePlan("torch", f"the fused CPU code needs numba: {install_hint('cpu')}")
    if is_compiling:
        return DecodePlan("torch", "the fused CPU code cannot be traced by torch.compile")
    return DecodePlan("numba", "compiled for this CPU")
