"""The fused attention that torch ships, with the log-sum-exp that merges blocks of a long past.

Flash attention on CUDA and its counterpart on a CPU. Both are inner operators of torch's
`scaled_dot_product_attention`, called by themselves because only they return the log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def has_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `flash_attention` serves these tensors; shapes as there."""
    if query.shape[-1] != value.shape[-1] or key.stride(-1) != 1 or value.stride(-1) != 1:
        return False
    if query.device.type == "cpu":
        return query.dtype in CPU_DTYPES
    if query.device.type != "cuda":
        return False
    grouped = query.shape[1] != key.shape[1]
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, grouped)
    return torch.backends.cuda.can_use_flash_attention(params)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend a block.

    Args:
        query: [batch, heads, new, dim].
        key, value: [batch, kv_heads, tokens, dim], where kv_heads divides heads.
        scale: of the logits.
        causal: new token i attends tokens 0..i; there are as many of each.

    Returns the output [batch, heads, new, dim] in the query's dtype, and the log-sum-exp of the
    logits [batch, heads, new] in fp32.
    """
    if query.device.type == "cpu":
        output, log_mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
    else:
        output, log_mass, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
    return output, log_mass.float()
