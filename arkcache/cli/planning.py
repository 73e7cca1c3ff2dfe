"""The command `describe`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

import arkcache
from arkcache.cli.common import (
    parse_bytes,
    print_result,
    told_in_a_line,
)
from arkcache.cli.options import (
    GroupSize,
    Index,
    Json,
    PageSizeOrAuto,
)

if TYPE_CHECKING:
    from arkcache.memory import CacheShape


def describe(
    model: Annotated[
        str | None, typer.Option(help="Take the sizes from this model's config: a folder or an id.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers, instead of a model.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads of each layer.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Elements of a key.")] = None,
    value_dim: Annotated[
        int | None, typer.Option(help="Elements of a value.", show_default="as the key's")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16.", show_default="the model's, else bfloat16"
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 131072,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens attended per step and KV head.",
            show_default="2048, or what fits in the device bytes",
        ),
    ] = None,
    dense_layers: Annotated[int, typer.Option(help="First layers that attend everything.")] = 0,
    page_size: PageSizeOrAuto = None,
    group_size: GroupSize = 32,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="As in K4V4 or K8V4+K4V2; may be repeated.", show_default="all presets"
        ),
    ] = None,
    device_bytes: Annotated[
        str | None, typer.Option(help="Limit of the device tier, as in 2GiB or 500MB.")
    ] = None,
    rotation: Annotated[str, typer.Option(help="none, keys, values or both.")] = "none",
    packed_slots: Annotated[
        bool | None,
        typer.Option(
            "--packed-slots/--unpacked-slots",
            help="Whether pages stay packed on the device.",
            show_default="packed on cuda",
        ),
    ] = None,
    index: Index = "tokens",
    device: Annotated[str, typer.Option(help="cuda or cpu; it need not be here.")] = "cuda",
    as_json: Json = False,
) -> None:
    """Say what a cache will take, in each format, before anything is loaded."""
    with told_in_a_line("describe"):
        from arkcache.config import CacheConfig
        from arkcache.demo.describe import render
        from arkcache.formats import PRESETS
        from arkcache.memory import plan_memory

        sizes = {"layers": layers, "kv-heads": kv_heads, "head-dim": head_dim}
        shape, numbers = _shape(model, sizes | {"value-dim": value_dim}, dtype)
        num_dense = sum(number < dense_layers for number in numbers) if dense_layers > 0 else 0
        settings: dict[str, Any] = {
            "page_size": page_size,
            "group_size": group_size,
            "num_dense_layers": dense_layers if dense_layers < 0 else num_dense,
            "budget_tokens": "auto" if budget is None else budget,
            "device_bytes": None if device_bytes is None else parse_bytes(device_bytes),
            "rotation": rotation,
            "packed_slots": packed_slots,
            "index": index,
        }
        plans = {
            name: plan_memory(CacheConfig.preset(name, **settings), shape, context, batch, device)
            for name in formats or PRESETS
        }
        heading = f"What a cache of {model or 'these sizes'} takes on {device}."
        values = {
            "model": model,
            "device": device,
            "settings": settings,
            "shape": vars(shape) | {"dtype": str(shape.dtype).removeprefix("torch.")},
            "formats": {name: plan.to_dict() for name, plan in plans.items()},
        }
        print_result(values, lambda: render(plans, shape, heading), as_json)


def _shape(
    model: str | None, sizes: dict[str, int | None], dtype: str | None
) -> tuple[CacheShape, list[int]]:
    """The sizes to plan for, and the numbers of the layers that they are of."""
    from arkcache.demo.describe import parse_dtype, shape_of_model
    from arkcache.memory import CacheShape

    given = [f"--{name}" for name, size in sizes.items() if size is not None]
    if model is not None:
        if given:
            raise arkcache.InputError(
                f"{', '.join(given)} beside --model: expected one or the other"
            )
        return shape_of_model(model, dtype)
    layers, kv_heads, head_dim, value_dim = sizes.values()
    if layers is None or kv_heads is None or head_dim is None:
        raise arkcache.InputError(
            f"{', '.join(given) or 'no sizes'} given: expected --model, or all of --layers, "
            "--kv-heads and --head-dim"
        )
    value_dim = head_dim if value_dim is None else value_dim
    shape = CacheShape(layers, kv_heads, head_dim, value_dim, parse_dtype(dtype or "bfloat16"))
    return shape, list(range(layers))
