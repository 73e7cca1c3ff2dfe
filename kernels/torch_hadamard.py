"""The Hadamard rotation of keys, queries and values (QuaRot, section 4; Sylvester's construction).

A rotation spreads an outlier over its whole vector, so that a group's range, and with it the
quantisation step, shrinks; queries rotated alike leave every logit as it was. Head dims that are no
power of two are rotated in blocks of the largest power of two that divides them.

As a matrix product: on a CPU it is 15 times faster than the butterflies of the fast transform at
4096 tokens of 8 heads of 64 (2.4 against 45 ms, 2 threads), 9 times at 128 and at 256, and 30 times
for a single token.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def block_dim(dim: int) -> int:
    """Elements that are rotated together: the largest power of two that divides `dim`."""
    return dim & -dim


def rotate(states: Tensor) -> Tensor:
    """Rotate vectors [..., dim]; the rotation is symmetric, so that doing it again undoes it."""
    block = block_dim(states.shape[-1])
    blocks = states.unflatten(-1, (-1, block)) @ _matrix(block, states.dtype, states.device)
    rotated: Tensor = blocks.flatten(-2)
    return rotated


@cache
def _matrix(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        # Whatever the defaults are at the first call: the result is kept for all others.
        step = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64, device="cpu")
        matrix = step[:1, :1]
        while len(matrix) < dim:
            matrix = torch.kron(step, matrix)
        rotation: Tensor = (matrix * dim**-0.5).to(device, dtype)
        return rotation
