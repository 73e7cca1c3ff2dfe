"""Small tables from the host to a device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(table: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of `table` on `device`; the host does not wait for it to arrive.

    From pinned memory: a copy from any other would wait. torch keeps it until the copy is done.
    """
    source = torch.from_numpy(table)
    if device.type != "cuda":
        return source.to(device, copy=True)
    return source.pin_memory().to(device, non_blocking=True)
