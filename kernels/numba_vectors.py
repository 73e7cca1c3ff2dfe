"""Vectors of 16 fp32 numbers for the CPU's kernels.

Loops over arrays vectorise by themselves, but not well where a sum is to stay in a register while
the arrays change: the compiler has to assume that they overlap. So the innermost loops are written
with vectors, which LLVM turns into whatever registers a processor has: one of 512 bits, two of 256,
four of 128.

Addresses are integers; nothing is checked and nothing needs to be aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from arkcache.kernels.numba_numbers import LN2, LOG2E, LOG2E_LOW, LOWEST, OF_EXP, OF_LOG

LANES = 16

_SINGLE, _WORD = ir.FloatType(), ir.IntType(32)
_VECTOR, _WORDS = ir.VectorType(_SINGLE, LANES), ir.VectorType(_WORD, LANES)
_FAST = ("reassoc", "contract", "arcp", "nsz")


class Vector(types.Type):
    """The type of a vector of 16 fp32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="Vector")


vector = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _operation(
    signature: Any, generate: Callable[[Any, Sequence[Any]], Any]
) -> tuple[Any, Callable[..., Any]]:
    """What an intrinsic returns, from its signature and its builder of instructions."""

    def build(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        result = generate(builder, args)
        return context.get_dummy_value() if result is None else result

    return signature, build


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, kind: Any) -> Any:
    loaded = builder.load(_at(builder, address, kind))
    loaded.align = 1
    return loaded


def _splat(builder: Any, number: Any, kind: Any = _VECTOR) -> Any:
    empty = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(empty, number, ir.Constant(_WORD, 0))
    zeros = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
    return builder.shuffle_vector(first, empty, zeros)


def _constant(number: Any) -> Any:
    return ir.Constant(_VECTOR, [float(number)] * LANES)


def _words(number: int) -> Any:
    return ir.Constant(_WORDS, [number] * LANES)


def _call(builder: Any, name: str, result: Any, args: Sequence[Any]) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, args, fastmath=_FAST)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(builder, "llvm.fma.v16f32", _VECTOR, (x, y, z))


@intrinsic
def zeros16(_context: Any) -> Any:
    """Sixteen zeros."""
    return _operation(vector(), lambda _builder, _args: _constant(0.0))


@intrinsic
def splat16(_context: Any, _number: Any) -> Any:
    """Sixteen times one number."""
    return _operation(vector(types.float32), lambda builder, args: _splat(builder, args[0]))


@intrinsic
def load16(_context: Any, _address: Any, like: Any) -> Any:
    """Sixteen elements from an address on, widened: of the type of the array `like`."""
    element = like.dtype

    def generate(builder: Any, args: Any) -> Any:
        address = args[0]
        if element == types.float32:
            return _load(builder, address, _VECTOR)
        if element == types.int16:
            return builder.fpext(
                _load(builder, address, ir.VectorType(ir.HalfType(), LANES)), _VECTOR
            )
        if element == types.uint16:
            short = _load(builder, address, ir.VectorType(ir.IntType(16), LANES))
            return builder.bitcast(builder.shl(builder.zext(short, _WORDS), _words(16)), _VECTOR)
        byte = _load(builder, address, ir.VectorType(ir.IntType(8), LANES))
        if element == types.int8:
            return builder.sitofp(builder.sext(byte, _WORDS), _VECTOR)
        return builder.uitofp(builder.zext(byte, _WORDS), _VECTOR)

    return _operation(vector(types.int64, like), generate)


@intrinsic
def load_codes16(_context: Any, _address: Any, _plane: Any, _bits: Any) -> Any:
    """Of sixteen bytes from an address on, code number `plane` of `bits` bits in each, as fp32."""

    def generate(builder: Any, args: Any) -> Any:
        address, plane, bits = args
        byte = _load(builder, address, ir.VectorType(ir.IntType(8), LANES))
        plane, bits = (builder.trunc(number, _WORD) for number in (plane, bits))
        shift = _splat(builder, builder.mul(plane, bits), _WORDS)
        one = ir.Constant(_WORD, 1)
        mask = _splat(builder, builder.sub(builder.shl(one, bits), one), _WORDS)
        code = builder.lshr(builder.zext(byte, _WORDS), shift)
        return builder.sitofp(builder.and_(code, mask), _VECTOR)

    return _operation(vector(types.int64, types.int64, types.int64), generate)


@intrinsic
def store16(_context: Any, _address: Any, _numbers: Any) -> Any:
    """Write sixteen fp32 numbers."""

    def generate(builder: Any, args: Any) -> None:
        builder.store(args[1], _at(builder, args[0], _VECTOR)).align = 1

    return _operation(types.none(types.int64, vector), generate)


@intrinsic
def fma16(_context: Any, _x: Any, _y: Any, _z: Any) -> Any:
    """x * y + z."""
    return _operation(vector(vector, vector, vector), lambda b, args: _fma(b, *args))


@intrinsic
def broadcast16(_context: Any, _address: Any) -> Any:
    """Sixteen times the fp32 number at an address."""

    def generate(builder: Any, args: Any) -> Any:
        return _splat(builder, _load(builder, args[0], _SINGLE))

    return _operation(vector(types.int64), generate)


@intrinsic
def add16(_context: Any, _x: Any, _y: Any) -> Any:
    """x + y."""
    return _operation(vector(vector, vector), lambda b, args: _add(b, *args))


@intrinsic
def sub16(_context: Any, _x: Any, _y: Any) -> Any:
    """x - y."""
    return _operation(vector(vector, vector), lambda b, args: b.fsub(*args, flags=_FAST))


@intrinsic
def mul16(_context: Any, _x: Any, _y: Any) -> Any:
    """x * y."""
    return _operation(vector(vector, vector), lambda b, args: b.fmul(*args, flags=_FAST))


@intrinsic
def max16(_context: Any, _x: Any, _y: Any) -> Any:
    """The larger of x and y; y where x is no number."""

    return _operation(vector(vector, vector), lambda b, args: _larger(b, *args))


def _polynomial(builder: Any, coefficients: Sequence[Any], x: Any) -> Any:
    """Of these coefficients, lowest first."""
    result = _constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = _fma(builder, result, x, _constant(coefficient))
    return result


def _exp(builder: Any, x: Any) -> Any:
    """See `numba_numbers.exp_of_negative`, of which this is the same."""
    lowest = _constant(LOWEST)
    inside = builder.fcmp_ordered(">=", x, lowest)
    near = builder.select(inside, x, lowest)
    whole = builder.fptosi(builder.fmul(near, _constant(LOG2E)), _WORDS)
    turns = builder.fsub(_constant(0.0), builder.sitofp(whole, _VECTOR))
    part = _fma(builder, near, _constant(LOG2E), turns)
    part = _fma(builder, near, _constant(LOG2E_LOW), part)
    power = _polynomial(builder, OF_EXP, part)
    scale = builder.shl(builder.add(whole, _words(127)), _words(23))
    power = builder.fmul(power, builder.bitcast(scale, _VECTOR))
    return builder.select(inside, power, _constant(0.0))


@intrinsic
def exp16(_context: Any, _x: Any) -> Any:
    """exp(x) of numbers x <= 0; 0 below `LOWEST`."""
    return _operation(vector(vector), lambda b, args: _exp(b, args[0]))


@intrinsic
def log16(_context: Any, _x: Any) -> Any:
    """ln(x) of normal numbers x > 0, as `numba_numbers.log_of_positive`."""

    def generate(builder: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _WORDS)
        whole = builder.ashr(builder.sub(bits, _words(0x3F3504F3)), _words(23))
        mantissa = builder.bitcast(builder.sub(bits, builder.shl(whole, _words(23))), _VECTOR)
        above = builder.fsub(mantissa, _constant(1.0))
        small = builder.fmul(above, _polynomial(builder, OF_LOG, mantissa))
        return _fma(builder, builder.sitofp(whole, _VECTOR), _constant(LN2), small)

    return _operation(vector(vector), generate)


def _shuffle(builder: Any, x: Any, y: Any, picks: Sequence[int]) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_WORD, len(picks)), list(picks)))


def _pair(builder: Any, x: Any, y: Any, run: int, join: Callable[..., Any]) -> Any:
    """Halve two vectors' runs of `run` lanes by joining them: x's results, then y's, run by run."""
    half, first, second = run // 2, [], []
    for source in (0, LANES):
        for start in range(0, LANES, run):
            first += [source + start + lane for lane in range(half)]
            second += [source + start + half + lane for lane in range(half)]
    return join(builder, _shuffle(builder, x, y, first), _shuffle(builder, x, y, second))


def _reduce4(join: Callable[..., Any]) -> Callable[..., None]:
    """Writes what the lanes of each of four vectors come to when they are joined."""

    def generate(builder: Any, args: Any) -> None:
        address, a, b, c, d = args
        left, right = _pair(builder, a, b, 16, join), _pair(builder, c, d, 16, join)
        both = _pair(builder, left, right, 8, join)
        # Four lanes each of a, b, c, d are left: two halvings more.
        for run in (4, 2):
            first = [s + lane for s in range(0, 4 * run, run) for lane in range(run // 2)]
            second = [lane + run // 2 for lane in first]
            halves = (_shuffle(builder, both, both, picks) for picks in (first, second))
            both = join(builder, *halves)
        builder.store(both, _at(builder, address, both.type)).align = 1

    return generate


def _add(builder: Any, x: Any, y: Any) -> Any:
    return builder.fadd(x, y, flags=_FAST)


def _larger(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


@intrinsic
def store_sums4(_context: Any, _address: Any, _a: Any, _b: Any, _c: Any, _d: Any) -> Any:
    """Write what the lanes of each of four vectors add up to: four numbers."""
    return _operation(types.none(types.int64, vector, vector, vector, vector), _reduce4(_add))


@intrinsic
def store_peaks4(_context: Any, _address: Any, _a: Any, _b: Any, _c: Any, _d: Any) -> Any:
    """Write the largest lane of each of four vectors: four numbers."""
    return _operation(types.none(types.int64, vector, vector, vector, vector), _reduce4(_larger))


def _reduction(name: str, start: float | None) -> Any:
    def generate(builder: Any, args: Any) -> Any:
        given = args if start is None else (ir.Constant(_SINGLE, start), *args)
        return _call(builder, name, _SINGLE, given)

    return generate


@intrinsic
def sum16(_context: Any, _x: Any) -> Any:
    """What the lanes add up to."""
    return _operation(types.float32(vector), _reduction("llvm.vector.reduce.fadd.v16f32", 0.0))


@intrinsic
def peak16(_context: Any, _x: Any) -> Any:
    """The largest lane."""
    return _operation(types.float32(vector), _reduction("llvm.vector.reduce.fmax.v16f32", None))
