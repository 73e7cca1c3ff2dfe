"""What a manager's decode steps run on: Triton kernels, numba's, or plain torch.

All keep the same promises. Triton's kernels never wait for the host and can be captured in a CUDA
graph; numba's read pages of a CPU where they lie; plain torch is the path of what neither covers.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from arkcache.config import CacheConfig
from arkcache.errors import ConfigError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SERVED = {
    "index": (
        *("cuboid-mean", "cuboid-max", "cuboid-center"),
        *("sphere-mean", "sphere-max", "sphere-center", "centroid", "tokens"),
    ),
    "group_reduction": ("softmax-mean", "raw-mean", "share-mean"),
    "grouping": (None,),
    "retention": (None,),
}
"""Choices that there are kernels for. What is new among them runs on plain torch until it has one,
and is listed here then."""

NOT_IN_PLACE = {
    "estimate_pages": 0,
    "target_missed_mass": None,
    "device_bytes": None,
    "device_pool_factor": None,
    "packed_slots": None,
}
"""Settings that the kernels of a CPU serve only at these values. Those about slots ask for a device
tier of pages, which exists on plain torch: to see there what a GPU would do."""

Params = ParamSpec("Params")
Result = TypeVar("Result")

logger = logging.getLogger("arkcache")


def choose_backend(
    config: CacheConfig, device: torch.device, dtype: torch.dtype, *, latent: bool
) -> str:
    """ "triton", "numba" or "torch", for a manager of these settings.

    Raises `ConfigError` where the settings ask for kernels that cannot serve them.
    """
    backend = config.backend
    if backend == "auto":
        backend = {"cuda": "triton", "cpu": "numba"}.get(device.type, "torch")
    if backend == "torch":
        return backend
    settings = why_not_settings(config, dtype, latent, backend)
    machine = WHY_NOT_HERE[backend](device)
    reason = settings or machine
    if reason is None:
        return backend
    if config.backend == backend:
        raise ConfigError(f"backend={backend!r}: {reason}; use backend='auto'")
    if settings is not None:
        logger.info("decode steps run on plain torch: %s", settings)
    elif backend == "triton":
        _warn_once(reason)
    else:
        _log_once(reason)
    return "torch"


def on_own_device(method: Callable[Params, Result]) -> Callable[Params, Result]:
    """A method that runs without gradients, with `self.device` current: Triton launches on torch's
    current device."""

    @functools.wraps(method)
    def guarded(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        device: torch.device = vars(args[0])["device"]
        if device.type == "cuda":
            with torch.no_grad(), torch.cuda.device(device):
                return method(*args, **kwargs)
        if not torch.is_grad_enabled():  # a mode that is on already is not free to enter
            return method(*args, **kwargs)
        with torch.no_grad():
            return method(*args, **kwargs)

    return guarded


def why_not_settings(
    config: CacheConfig, dtype: torch.dtype, latent: bool, backend: str = "triton"
) -> str | None:
    """Why these kernels do not serve these settings, on any machine; None where they do."""
    if config.backend == "torch":
        return "backend='torch' asks for plain torch"
    if dtype not in DTYPES:
        return f"the kernels compute in fp32, fp16 and bf16, not in {dtype}"
    for name, served in SERVED.items():
        if getattr(config, name) not in served:
            return f"there is no kernel for {name}={getattr(config, name)!r}"
    if latent:
        return "latents are expanded by the model's own code"
    if config.coarse_format is not None:
        return "pages of two formats move in the host tier"
    if config.host_path is not None and backend == "triton":
        return "a host tier in a file cannot be pinned"
    if config.audit_every is not None:
        return "audit_every asks for audits, which read all keys beside the step"
    if config.packed_slots is False and not config.format.is_raw:
        return "packed_slots=False asks for unpacked pages on the device"
    return _why_not_in_place(config) if backend == "numba" else None


def _why_not_in_place(config: CacheConfig) -> str | None:
    """Why pages may not be attended in the host tier; None where they may."""
    for name, default in NOT_IN_PLACE.items():
        if getattr(config, name) != default:
            return f"{name}={getattr(config, name)!r} is not served by the kernels of a CPU"
    return None


def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'arkcache[gpu-cuda13]')"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"device {device} is no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1)"


def _why_no_numba(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"numba compiles for a CPU, and the device is {device}"
    if importlib.util.find_spec("numba") is None:
        return (
            "numba is not installed; with it a step on a CPU takes half as long or less "
            "(pip install 'arkcache[cpu]')"
        )
    return None


WHY_NOT_HERE = {"triton": _why_no_triton, "numba": _why_no_numba}
"""Why kernels do not run on a device of this machine; None where they do."""


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"decode steps run on plain torch, which waits for the GPU in every layer: {reason}",
        stacklevel=5,
    )


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("decode steps run on plain torch: %s", reason)
