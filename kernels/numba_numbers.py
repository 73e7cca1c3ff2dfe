"""Numbers of the CPU's kernels: addresses, 16-bit floats, exp and log that vectorise.

bf16 is kept as uint16 and fp16 as int16: numba has neither, and its sign tells them apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from arkcache.kernels.numba_compile import kernel

F32 = np.float32
HIDDEN = F32(-3e38)
"""The logit of a token that may not be attended: finite, so that differences are numbers."""

UNSEEN = F32(-1e38)
"""A peak below this is that of nothing: every token was hidden."""

LOWEST = F32(-87.0)
"""exp of less is 0 in fp32, denormal numbers apart."""

LOG2E = F32(1.4426950408889634)
LOG2E_LOW = F32(1.4426950408889634 - float(LOG2E))
LN2 = F32(0.6931471805599453)


def _fit(function: Any, low: float, high: float, degree: int) -> list[F32]:
    """Coefficients, lowest first, of the polynomial through `function` at Chebyshev's nodes."""
    nodes = np.cos(np.pi * (np.arange(400) + 0.5) / 400) * (high - low) / 2 + (high + low) / 2
    fit = np.polynomial.Chebyshev.fit(nodes, function(nodes), degree, domain=[low, high])
    return [F32(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef]


OF_EXP = tuple(_fit(np.exp2, -1.0, 0.0, 6))
OF_LOG = tuple(_fit(lambda x: np.log(x) / (x - 1 + (x == 1)), 0.707, 1.4143, 7))
"""Coefficients: of 2**x, and of ln(x) / (x - 1)."""


@intrinsic
def pointer(_context: Any, address: Any) -> Any:
    """An integer as an address."""

    def generate(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _bit_cast(source: Any, target: Any, llvm_type: Any) -> Any:
    @intrinsic
    def cast(_context: Any, _number: Any) -> Any:
        def generate(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], llvm_type)

        return target(source), generate

    return cast


float_of_bits = _bit_cast(types.int32, types.float32, ir.FloatType())
bits_of_float = _bit_cast(types.float32, types.int32, ir.IntType(32))


@intrinsic
def prefetch(_context: Any, _address: Any) -> Any:
    """Ask for the cache line at an address, which need not be valid."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        i32, byte_ptr = ir.IntType(32), cgutils.voidptr_t
        kind = ir.FunctionType(ir.VoidType(), [byte_ptr, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(i32, number) for number in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], byte_ptr), read, keep, data])
        return context.get_dummy_value()

    return types.none(types.int64), generate


@intrinsic
def fused(_context: Any, _x: Any, _y: Any, _z: Any) -> Any:
    """x * y + z, rounded once."""

    def generate(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        one = ir.FloatType()
        kind = ir.FunctionType(one, [one, one, one])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.f32")
        return builder.call(function, args)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def widen(_context: Any, number: Any) -> Any:
    """An element of an array as fp32."""

    def generate(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        (given,), single, word = args, ir.FloatType(), ir.IntType(32)
        if number == types.uint16:
            high = builder.shl(builder.zext(given, word), ir.Constant(word, 16))
            return builder.bitcast(high, single)
        if number == types.int16:
            return builder.fpext(builder.bitcast(given, ir.HalfType()), single)
        return given if number == types.float32 else builder.sitofp(given, single)

    return types.float32(number), generate


@intrinsic
def narrow(_context: Any, _number: Any, like: Any) -> Any:
    """An fp32 number in the type of `like`, rounded to the nearest, ties to even."""

    def generate(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        number, word, short = args[0], ir.IntType(32), ir.IntType(16)
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(number, ir.HalfType()), short)
        if like == types.float32:
            return number
        bits = builder.bitcast(number, word)
        sixteen, half = ir.Constant(word, 16), ir.Constant(word, 0x7FFF)
        odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(word, 1))
        rounded = builder.lshr(builder.add(builder.add(bits, half), odd), sixteen)
        # A NaN whose high bits are few would be rounded to infinity.
        is_nan = builder.fcmp_unordered("uno", number, number)
        rounded = builder.select(is_nan, ir.Constant(word, 0x7FC0), rounded)
        return builder.trunc(rounded, short)

    return like(types.float32, like), generate


@kernel
def floats(address: Any, size: Any) -> Any:
    """fp32 numbers at an address."""
    return carray(pointer(address), (size,), np.float32)


@kernel
def integers(address: Any, size: Any) -> Any:
    """int64 numbers at an address."""
    return carray(pointer(address), (size,), np.int64)


@kernel
def exp_of_negative(x: Any) -> Any:
    """exp(x) for x <= 0, to 2 units in the last place; 0 below `LOWEST`."""
    near = max(x, LOWEST)
    whole = np.int32(near * LOG2E)
    # Rounded once: `near * LOG2E - whole` would carry the rounding of the product.
    part = fused(near, LOG2E_LOW, fused(near, LOG2E, -F32(whole)))
    power = OF_EXP[-1]
    for i in range(len(OF_EXP) - 2, -1, -1):
        power = power * part + OF_EXP[i]
    power *= float_of_bits((whole + np.int32(127)) << np.int32(23))
    return power if x >= LOWEST else F32(0)


@kernel
def log_of_positive(x: Any) -> Any:
    """ln(x) for a normal number x > 0, to 3 units in the last place or 1e-7."""
    bits = bits_of_float(x)
    # The mantissa between 0.707 and 1.414, around which the polynomial is short.
    whole = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    mantissa = float_of_bits(bits - (whole << np.int32(23)))
    above = mantissa - F32(1)
    slope = OF_LOG[-1]
    for i in range(len(OF_LOG) - 2, -1, -1):
        slope = slope * mantissa + OF_LOG[i]
    return F32(whole) * LN2 + above * slope


@kernel
def rotate(vector: Any, dim: Any) -> None:
    """`torch_hadamard.rotate`, of the first `dim` numbers of a vector in place."""
    block, width = dim & -dim, 1
    factor = F32(1) / np.sqrt(F32(block))
    for d in range(dim):
        vector[d] *= factor
    while width < block:
        for first in range(0, dim, 2 * width):
            for d in range(first, first + width):
                low, high = vector[d], vector[d + width]
                vector[d], vector[d + width] = low + high, low - high
        width *= 2
