"""What tells one model from another, so that a saved cache is not given to the wrong one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

SAMPLES = 16
"""Elements of every weight that are looked at."""

VOLATILE = {
    *("_name_or_path", "architectures", "transformers_version", "use_cache"),
    *("dtype", "torch_dtype"),
}
"""What a config says that has no part in what its model computes, or is looked at elsewhere."""


def identity_of(model: PreTrainedModel) -> dict[str, str]:
    """The model's class and dtype, and digests of its config and of samples of its weights.

    Two models of the same identity compute the same, but for weights that differ between the
    samples alone.
    """
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "config": _digest_config(model.config.to_dict()),
        "weights": _digest_weights(model),
    }


def _digest_config(values: dict[str, Any]) -> str:
    kept = _without(values, VOLATILE)
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _without(value: Any, names: set[str]) -> Any:
    """Settings, those of parts as well, without the named ones."""
    if not isinstance(value, dict):
        return value
    return {
        name: _without(one, names)
        for name, one in value.items()
        if name not in names and "attn_implementation" not in str(name)
    }


def _digest_weights(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, weight in model.state_dict(keep_vars=True).items():
        if not isinstance(weight, Tensor):
            continue
        local = getattr(weight, "_local_tensor", weight)  # of a weight that is split over ranks
        digest.update(f"{name} {tuple(local.shape)} {local.dtype}".encode())
        if local.device.type != "meta":  # loaded layer by layer, when it is used
            digest.update(_samples(local.detach()))
    return digest.hexdigest()


def _samples(weight: Tensor) -> bytes:
    stride = weight.numel() // SAMPLES | 1  # odd, not to stay within one column
    sampled = weight.reshape(-1)[::stride][:SAMPLES].contiguous()
    return sampled.cpu().view(torch.uint8).numpy().tobytes()
