"""`arkcache describe`: the sizes of a model's cache, and the table of what each format takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer

from arkcache.demo.models import where_is
from arkcache.errors import InputError
from arkcache.memory import CacheShape, MemoryPlan
from arkcache.sizes import bytes_text

_GIVE_SIZES = "give --layers, --kv-heads and --head-dim instead of --model"


def shape_of_model(name: str, dtype: str | None, ranks: int = 1) -> tuple[CacheShape, list[int]]:
    """What a model's cache stores, read from its config alone.

    Args:
        name: a folder, an id of the Hugging Face hub, or "smollm2".
        dtype: None is what the model was saved in.
        ranks: processes of tensor parallelism; the shape is one's, as the model's plan splits it.

    Returns the shape and the numbers of the layers that attend their whole past. Raises
    `InputError` where there is no such model, its config does not say all sizes, or it cannot be
    split so.
    """
    try:
        whole = AutoConfig.from_pretrained(where_is(name))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"model {name}: not a folder with a model's config.json, nor a model of which the "
            f"Hugging Face hub gave one. {reason}"
        ) from None
    config = whole.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None) is not None:
        raise InputError(
            f"model {name} has latent attention: what it stores depends on its code; {_GIVE_SIZES}"
        )
    layers = DynamicCache(config=config).layers
    full = [number for number, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if getattr(config, "multi_query", False) or getattr(config, "num_kv_shared_layers", 0):
        raise InputError(
            f"model {name} shares keys and values between heads or layers in a way that its config "
            f"leaves to its code; {_GIVE_SIZES}"
        )
    if not layers:  # a config that says nothing of its layers has them all alike
        full = list(range(_size(config, name, "num_hidden_layers", "n_layer")))
    if not full:
        raise InputError(f"model {name} has no layer that attends its whole past")
    heads = _size(config, name, "num_attention_heads", "n_head")
    hidden = _size(config, name, "hidden_size", "n_embd")
    head_dim = _size(config, name, "head_dim", default=hidden // heads)
    shape = CacheShape(
        num_layers=len(full),
        num_kv_heads=_size(config, name, "num_key_value_heads", default=heads),
        head_dim=head_dim,
        value_dim=_size(config, name, "v_head_dim", default=head_dim),
        dtype=parse_dtype(dtype or config.dtype or whole.dtype or torch.float32),
    )
    return shape.split(ranks) if _splits_heads(config, name, ranks) else shape, full


def _splits_heads(config: Any, name: str, ranks: int) -> bool:
    """Whether the tensor-parallel plan of a model gives each rank KV heads of its own.

    Where a plan gathers the keys that it projects, every rank keeps all heads.
    """
    if ranks <= 1:
        return True
    plan: dict[str, str] | None = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise InputError(
            f"model {name}: transformers has no tensor-parallel plan for {config.model_type!r}; "
            "leave --ranks out, or give --layers, --kv-heads and --head-dim for a plan of your own"
        )
    projections = ("k_proj", "qkv_proj", "query_key_value")
    return any(
        style == "colwise" and module.rpartition(".")[2] in projections
        for module, style in plan.items()
    )


def parse_dtype(dtype: Any) -> torch.dtype:
    """The dtype that a name means."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype {dtype!r}: expected float32, bfloat16 or float16")
    return found


def _size(config: Any, model: str, *names: str, default: int | None = None) -> int:
    try:
        values = [getattr(config, name, None) for name in names]
    except RuntimeError as error:  # some configs refuse to say what differs from layer to layer
        raise InputError(f"model {model}: {error}; {_GIVE_SIZES}") from None
    size = next((value for value in values if value is not None), default)
    if not isinstance(size, int):
        raise InputError(f"model {model}: its config gives no one {names[0]}; {_GIVE_SIZES}")
    return size


def render(
    plans: dict[str, MemoryPlan],
    shape: CacheShape,
    heading: str,
    settings: dict[str, tuple[Any, str]],
    quiet: bool = False,
) -> RenderableType:
    """Tables with a row for each format, then one of the settings.

    What was asked is above them, how to read them, unless `quiet`, below.

    Args:
        settings: values by name, with where they come from.
    """
    any_plan = next(iter(plans.values()))
    dtype = str(shape.dtype).removeprefix("torch.")
    lines = (
        f"{heading}\n{shape.num_layers} layers, {shape.num_kv_heads} KV heads, keys of "
        f"{shape.head_dim} and values of {shape.value_dim} in {dtype}; {any_plan.batch} x "
        f"{any_plan.context_tokens:,} tokens. A full cache takes {bytes_text(any_plan.full_bytes)}."
    )
    if any_plan.disk_bytes:
        most = max(plan.host_resident_bytes for plan in plans.values())
        is_bound = settings["host_resident_bytes"][0] is not None
        lines += (
            f" The host tier is a file on a disk, in {settings['host_path'][0]}; of it, at most "
            f"{bytes_text(most)} are in RAM"
            + ("." if is_bound else ", and what more the system's page cache has.")
        )
    return Group(
        Padding(Text(lines), (1, 1, 0, 1)),
        _table(plans, _PAGE),
        _table(plans, _CACHE),
        _settings_table(settings),
        *([] if quiet else [Padding(Text(_LEGEND), (0, 1, 1, 1))]),
    )


def _settings_table(settings: dict[str, tuple[Any, str]]) -> Table:
    """As they are written in TOML."""
    table = Table("setting", "value", "from", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name, (value, source) in settings.items():
        shown = str(value).lower() if value is None or isinstance(value, bool) else str(value)
        table.add_row(Text(name), Text(shown), Text(source))
    return table


def _table(plans: dict[str, MemoryPlan], columns: dict[str, Callable[[MemoryPlan], str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, collapse_padding=True, pad_edge=False)
    table.add_column("\nformat", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, plan in plans.items():
        table.add_row(name, *(cell(plan) for cell in columns.values()))
    return table


def _host(plan: MemoryPlan) -> str:
    """With a second format, from what all pages take in it to what they take in the first."""
    if plan.coarse_host_bytes is None:
        return bytes_text(plan.host_bytes)
    return f"{bytes_text(plan.coarse_host_bytes)} - {bytes_text(plan.host_bytes)}"


_PAGE: dict[str, Callable[[MemoryPlan], str]] = {
    "page\nbytes": lambda plan: f"{plan.page_bytes:,}",
    "\n= elements": lambda plan: f"{plan.code_bytes:,}",
    "+ scales,\nzeros": lambda plan: f"{plan.meta_bytes:,}",
    "\n+ padding": lambda plan: f"{plan.padding_bytes:,}",
    "bits per\nelement": lambda plan: f"{plan.bits_per_element:.2f}",
    "host bytes\nper token": lambda plan: f"{plan.host_bytes_per_token:,.0f}",
    "spare\nslots <=": lambda plan: bytes_text(plan.spare_bytes) if plan.spare_bytes else "-",
}
_CACHE: dict[str, Callable[[MemoryPlan], str]] = {
    "host\ntier": _host,
    "device\ntier": lambda plan: bytes_text(plan.tier_bytes),
    "dense\nlayers": lambda plan: bytes_text(plan.dense_bytes),
    "\nindex": lambda plan: bytes_text(plan.digest_bytes),
    "tokens\nattended": lambda plan: f"{plan.attended_tokens:,.0f}",
    "host\n/ full": lambda plan: f"{plan.host_ratio:.1%}",
    "device\n/ full": lambda plan: f"{plan.device_ratio:.1%}",
}
_LEGEND = (
    "A page is one KV head's; 16 bits are the model's own dtype. The device tier (slots, windows, "
    "streaming block) stays as it is; dense layers and index grow with the context, the index and "
    "dense layers of 16 bits with room for up to an eighth more. Tokens attended are per step "
    "and KV head of the layers that are not dense. / full: of a full cache; on the device, "
    "everything counted. Spare slots are what a GPU with memory to spare may add to its device "
    "tier where device_pool_factor is left out, at most 1/16 of what is free there; they are in no "
    "other column."
)
