"""Arguments of kernels: random, and the same every time."""

from __future__ import annotations

import torch
from torch import Tensor

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}


def randn(seed: int, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Random numbers on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_bytes(seed: int, *shape: int) -> Tensor:
    """Random bytes on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def int32(*numbers: int) -> Tensor:
    """A table of the kernels."""
    return torch.tensor(numbers, dtype=torch.int32)
