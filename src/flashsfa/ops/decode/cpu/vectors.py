"""Vectors of float32 for numba's kernels, which keep them in registers: 4 lanes, one per query row, or 16 features of a row.

numba has no name for them, and LLVM finds them by itself in few loops. On a machine whose registers are shorter, LLVM splits them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...cpu.machine import float_bits, jit, numba

FOUR, SIXTEEN = 4, 16

if numba:
    from llvmlite import ir
    from numba.extending import intrinsic, models, register_model

    _I32 = ir.IntType(32)
    _FLAGS = ("contract",)  # a product and a sum may become one instruction

    class _Vector(numba.types.Type):
        """`width` float32."""

        def __init__(self, width: int) -> None:
            super().__init__(name=f"float32x{width}")
            self.width = width
            self.llvm = ir.VectorType(ir.FloatType(), width)

    @register_model(_Vector)
    class _VectorModel(models.PrimitiveModel):
        def __init__(self, manager: Any, vector: _Vector) -> None:
            super().__init__(manager, vector, vector.llvm)

    _TYPES = {width: _Vector(width) for width in (FOUR, SIXTEEN)}


def _load(width: int, piece: Callable | None = None) -> Any:
    """An intrinsic `load(array, at)`: the float32 of array[at : at + width], whose bits `machine.widen` would read; of `piece` of
    them, a function of the builder and the integers, where it is given."""
    if numba is None:
        return None

    def load(typing: Any, array: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            element = context.get_data_type(array.dtype)
            x = builder.load(_pointer(context, builder, array, arguments, ir.VectorType(element, width)))
            x.align = array.dtype.bitwidth // 8
            if piece is not None:
                return builder.uitofp(piece(builder, x), _TYPES[width].llvm)
            return float_bits(builder, x, array.dtype, width)

        return _TYPES[width](array, at), generate

    return intrinsic(load)


def _load_eights_code(typing: Any, array: Any, words: Any, bytes_: Any) -> Any:
    """Sixteen levels of three bits as float32: the words of 16 bits of two eights lie at array[words], of uint8, and their bytes at
    array[bytes_], as `pack_3_bits` lays them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pair = ir.VectorType(_I32, 2)

        def two(at: Any, bits: int) -> Any:
            x = builder.load(_pointer(context, builder, array, (arguments[0], at), ir.VectorType(ir.IntType(bits), 2)))
            x.align = 1
            return builder.zext(x, pair)

        def field(x: Any, mask: int, left: int) -> Any:
            return builder.shl(builder.and_(x, ir.Constant(pair, [mask] * 2)), ir.Constant(pair, [left] * 2))

        word, byte = two(arguments[1], 16), two(arguments[2], 8)
        bits = field(word, 0x7FFF, 0)
        for part in (field(word, 0x8000, 6), field(byte, 63, 15), field(byte, 192, 16)):
            bits = builder.or_(bits, part)
        which = ir.Constant(ir.VectorType(_I32, SIXTEEN), [0] * 8 + [1] * 8)
        spread = builder.shuffle_vector(bits, bits, which)
        moved = builder.lshr(spread, ir.Constant(spread.type, [*range(0, 24, 3)] * 2))
        return builder.uitofp(builder.and_(moved, ir.Constant(spread.type, [7] * SIXTEEN)), _TYPES[SIXTEEN].llvm)

    return _TYPES[SIXTEEN](array, words, bytes_), generate


def _pointer(context: Any, builder: Any, array: Any, arguments: Any, content: Any) -> Any:
    data = context.make_array(array)(context, builder, arguments[0]).data
    return builder.bitcast(builder.gep(data, [arguments[1]]), content.as_pointer())


def _lower_half(builder: Any, x: Any) -> Any:
    return builder.and_(x, ir.Constant(x.type, [15] * x.type.count))


def _upper_half(builder: Any, x: Any) -> Any:
    return builder.lshr(x, ir.Constant(x.type, [4] * x.type.count))


def _filled(width: int) -> Any:
    """An intrinsic `filled(value)`: a vector of one value."""
    if numba is None:
        return None

    def filled(typing: Any, value: Any) -> Any:
        return _TYPES[width](numba.types.float32), lambda context, builder, signature, arguments: _spread(
            builder, arguments[0], width
        )

    return intrinsic(filled)


def _spread(builder: Any, value: Any, width: int) -> Any:
    undefined = ir.Constant(_TYPES[width].llvm, ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, width), [0] * width))


def _add_scaled_code(typing: Any, total: Any, x: Any, factor: Any) -> Any:
    """total + x * factor, for a float32 factor."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        product = builder.fmul(arguments[1], _spread(builder, arguments[2], x.width), flags=_FLAGS)
        return builder.fadd(arguments[0], product, flags=_FLAGS)

    return x(total, x, numba.types.float32), generate


def _add_code(typing: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return a(a, b), lambda context, builder, signature, arguments: builder.fadd(*arguments)


def _lane_code(typing: Any, x: Any, place: Any) -> Any:
    """x[place], a number that is written out."""
    lane = getattr(place, "literal_value", 0)
    return numba.types.float32(x, place), lambda context, builder, signature, arguments: builder.extract_element(
        arguments[0], _I32(lane)
    )


def _store_code(typing: Any, array: Any, at: Any, x: Any) -> Any:
    """Write x to the float32 array[at : at + width]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _pointer(context, builder, array, arguments, x.llvm)).align = 4
        return context.get_dummy_value()

    return numba.types.void(array, at, x), generate


load4, load16 = _load(FOUR), _load(SIXTEEN)
load16_lower, load16_upper = _load(SIXTEEN, _lower_half), _load(SIXTEEN, _upper_half)  # the half bytes of 16 uint8
filled4, filled16 = _filled(FOUR), _filled(SIXTEEN)
load16_eights: Any = None
add_scaled: Any = None
add: Any = None
lane: Any = None
store: Any = None
if numba:
    load16_eights, add_scaled = map(intrinsic, (_load_eights_code, _add_scaled_code))
    add, store = map(intrinsic, (_add_code, _store_code))
    lane = intrinsic(prefer_literal=True)(_lane_code)


@jit()
def write_lanes(scores, row, key, x):
    """The lanes of x to scores[row, key] and the rows below it, as far as there are four."""
    rows = len(scores) - row
    scores[row, key] = lane(x, 0)
    if rows > 1:
        scores[row + 1, key] = lane(x, 1)
    if rows > 2:
        scores[row + 2, key] = lane(x, 2)
    if rows > 3:
        scores[row + 3, key] = lane(x, 3)
