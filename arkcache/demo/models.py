"""Loads the model that is asked: the shipped one, or any causal language model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from arkcache.demo import smollm2
from arkcache.errors import InputError

SHIPPED = Path(__file__).parent / "model"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU if there is one.

    Raises `InputError` for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r}: expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: torch sees no GPU here; leave it out or give cpu")
    return device


def where_is(name: str | None) -> str:
    """The folder or hub id of a model; None is the shipped one, "smollm2" the small chat model.

    Raises `InputError` for a folder that does not exist.
    """
    if name is None:
        return str(SHIPPED)
    if name == smollm2.NAME:
        return smollm2.locate()
    # A folder that does not exist would be looked for on the hub, with a puzzling message.
    if not Path(name).exists() and (name.count("/") > 1 or name[:1] in ("", ".", "/", "~")):
        raise InputError(f"model {name}: no such folder")
    return name


def load_model(
    name: str | None, device: torch.device, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from a folder or the Hugging Face hub; None is the shipped one.

    "smollm2" is SmolLM2-135M-Instruct (see `smollm2.py`). `dtype` "auto" is what the model was
    saved in, and fp32 for these two on a CPU, where it is faster. Raises `InputError` where there
    is no such model or its dtype is unknown.
    """
    if dtype not in _DTYPES:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    if name in (None, smollm2.NAME) and dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    where = where_is(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        advice = f" Without the hub: {smollm2.ADVICE}." if where == smollm2.HUB_ID else ""
        raise InputError(
            f"model {where}: not a folder with a causal language model and its tokenizer, nor "
            f"one that the Hugging Face hub gave.{advice} {reason}"
        ) from None
    model.eval()
    torch.nn.Module.to(model, device)  # typed, which the model's own is not
    return model, tokenizer
