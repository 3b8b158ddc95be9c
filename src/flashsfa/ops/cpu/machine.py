"""What numba compiles with, and three instructions that it has no name for.

Without numba the kernels are plain functions that nothing calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import numba
    import numba.extending
    from llvmlite import ir
except ImportError:
    numba = None

OPTIONS = {"fastmath": {"contract"}, "nogil": True}


def jit(reorder: bool = False) -> Callable:
    """`numba.njit`, or the function itself where numba is missing. With `reorder` sums may be, so that they
    vectorise; NaN and infinity always keep their meaning."""
    if numba is None:
        return lambda function: function
    return numba.njit(**OPTIONS | ({"fastmath": {"contract", "reassoc", "nsz"}} if reorder else {}))


def _widen_code(typing: Any, bits: Any) -> Any:
    """The float32 of an int8, or whose upper bits are `bits`: bfloat16 is float32's upper half, uint32 bits are all of it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return float_bits(builder, arguments[0], bits)

    return numba.types.float32(bits), generate


def float_bits(builder: Any, x: Any, bits: Any, width: int = 0) -> Any:
    """The float32 that x tells, of numba's type `bits`: see `widen`. With a width x is a vector."""

    def kind(scalar: Any) -> Any:
        return ir.VectorType(scalar, width) if width else scalar

    if isinstance(bits, numba.types.Float):
        return x
    if bits.signed:
        return builder.sitofp(x, kind(ir.FloatType()))
    if bits.bitwidth < 32:
        word, shift = kind(ir.IntType(32)), 32 - bits.bitwidth
        x = builder.shl(builder.zext(x, word), ir.Constant(word, [shift] * width if width else shift))
    return builder.bitcast(x, kind(ir.FloatType()))


def _prefetch_code(typing: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index]: scattered V rows arrive about a tenth sooner."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [address.type], ir.FunctionType(ir.VoidType(), [address.type, i32, i32, i32])
        )
        read, keep, data_cache = i32(0), i32(3), i32(1)
        builder.call(prefetch, [address, read, keep, data_cache])
        return context.get_dummy_value()

    return numba.types.void(array, index), generate


def _lowest_bit_code(typing: Any, word: Any) -> Any:
    """The place of the lowest bit that is set in a uint64, which is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return numba.types.int64(word), generate


prange = numba.prange if numba else range
widen: Any
prefetch: Any
lowest_bit: Any
if numba:
    widen, prefetch, lowest_bit = map(numba.extending.intrinsic, (_widen_code, _prefetch_code, _lowest_bit_code))
else:
    widen = prefetch = lowest_bit = None
