"""The command `describe`."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

import arkcache
from arkcache.cli.common import (
    print_result,
    told_in_a_line,
)
from arkcache.cli.completing import complete
from arkcache.cli.options import (
    Config,
    Formats,
    Json,
    Output,
    PageSizeOrAuto,
    Quiet,
    Set,
)
from arkcache.cli.settings import settings_given
from arkcache.config import CacheConfig
from arkcache.settings import Given, build
from arkcache.sizes import parse_bytes

if TYPE_CHECKING:
    from arkcache.memory import CacheShape

BITS_SETTINGS = ("key_bits", "value_bits", "coarse_key_bits", "coarse_value_bits")
"""What the name of a format says."""


def describe(
    model: Annotated[
        str | None,
        typer.Option(
            help="Take the sizes from this model's config: a folder or an id.",
            autocompletion=complete("model"),
        ),
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
            help="float32, bfloat16 or float16.",
            show_default="the model's, else bfloat16",
            autocompletion=complete("dtype"),
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
    dense_layers: Annotated[
        int | None, typer.Option(help="First layers that attend everything.", show_default="0")
    ] = None,
    page_size: PageSizeOrAuto = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Channels of a value that share a scale.", show_default="32"),
    ] = None,
    formats: Formats = None,
    device_bytes: Annotated[
        str | None, typer.Option(help="Limit of the device tier, as in 2GiB or 500MB.")
    ] = None,
    rotation: Annotated[
        str | None, typer.Option(help="none, keys, values or both.", show_default="none")
    ] = None,
    packed_slots: Annotated[
        bool | None,
        typer.Option(
            "--packed-slots/--unpacked-slots",
            help="Whether pages stay packed on the device.",
            show_default="packed on cuda",
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            help="How pages are rated.", show_default="tokens", autocompletion=complete("index")
        ),
    ] = None,
    ranks: Annotated[
        int, typer.Option(help="Processes of tensor parallelism; all sizes are of one of them.")
    ] = 1,
    device: Annotated[str, typer.Option(help="cuda or cpu; it need not be here.")] = "cuda",
    config: Config = None,
    settings: Set = None,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Say what a cache will take, in each format, and where its settings come from.

    Nothing is loaded but a model's config.

        arkcache describe --model my/model --context 65536 --device-bytes 2GiB

        arkcache describe --layers 36 --kv-heads 8 --head-dim 128 --format K4V4 --json
    """
    with told_in_a_line("describe", output):
        from arkcache.demo.describe import render
        from arkcache.memory import plan_memory

        sizes = {"layers": layers, "kv-heads": kv_heads, "head-dim": head_dim}
        shape, numbers = _shape(model, sizes | {"value-dim": value_dim}, dtype, ranks)
        given = settings_given(
            config,
            settings,
            page_size=("--page-size", page_size),
            group_size=("--group-size", group_size),
            num_dense_layers=("--dense-layers", dense_layers),
            budget_tokens=("--budget", budget),
            device_bytes=(
                "--device-bytes",
                None if device_bytes is None else parse_bytes(device_bytes),
            ),
            rotation=("--rotation", rotation),
            packed_slots=("--packed-slots" if packed_slots else "--unpacked-slots", packed_slots),
            index=("--index", index),
        )
        configs = _configs(_counting_only(numbers, given), formats)
        plans = {
            name: plan_memory(config, shape, context, batch, device)
            for name, config in configs.items()
        }
        resolved = _resolved(configs, given, formats)
        each = "" if ranks == 1 else f", on each of {ranks} ranks"
        heading = f"What a cache of {model or 'these sizes'} takes on {device}{each}."
        values = {
            "model": model,
            "device": device,
            "ranks": ranks,
            "settings": {name: value for name, (value, _) in resolved.items()},
            "sources": {name: source for name, (_, source) in resolved.items()},
            "shape": vars(shape) | {"dtype": str(shape.dtype).removeprefix("torch.")},
            "formats": {name: plan.to_dict() for name, plan in plans.items()},
        }
        print_result(
            values, lambda: render(plans, shape, heading, resolved, quiet), as_json, output
        )


def _counting_only(numbers: list[int], given: dict[str, Given]) -> dict[str, Given]:
    """The settings with dense layers and sources as they are among layers of these numbers."""
    dense, sources = given.get("num_dense_layers"), given.get("layer_sources")
    if dense is not None and dense.value >= 0:
        count = sum(number < dense.value for number in numbers)
        given = given | {"num_dense_layers": Given(count, dense.source)}
    if sources is not None and sources.value is not None:
        build({"layer_sources": sources})  # refuses what is impossible
        given = given | {"layer_sources": Given(_among(sources.value, numbers), sources.source)}
    return given


def _among(sources: tuple[int, ...], numbers: list[int]) -> tuple[int, ...]:
    """The sources of layers of these numbers, numbered among themselves."""
    if len(sources) <= max(numbers) or any(sources[number] not in numbers for number in numbers):
        raise arkcache.ConfigError(
            f"layer_sources={sources!r}: expected {max(numbers) + 1} layers, and those that attend "
            f"their whole past to share among themselves: {', '.join(map(str, numbers))}"
        )
    return tuple(numbers.index(sources[number]) for number in numbers)


def _configs(given: dict[str, Given], formats: list[str] | None) -> dict[str, CacheConfig]:
    """The settings by name of the format: those asked for, else that of the settings, else all."""
    from arkcache.formats import PRESETS

    if not formats and any(name in given for name in BITS_SETTINGS):
        config = build(given)
        coarse = config.coarse_format
        return {config.format.name + (f"+{coarse.name}" if coarse else ""): config}
    others = {name: one for name, one in given.items() if name not in BITS_SETTINGS}
    return {name: build(others, partial(CacheConfig.preset, name)) for name in formats or PRESETS}


def _resolved(
    configs: dict[str, CacheConfig], given: dict[str, Given], formats: list[str] | None
) -> dict[str, tuple[Any, str]]:
    """Each setting's value and where it comes from."""
    first, *more = configs.values()
    found = {}
    for name in (field.name for field in fields(CacheConfig)):
        value = vars(first)[name]
        alike = all(vars(config)[name] == value for config in more)
        source = given[name].source if name in given else "default"
        if formats and name in BITS_SETTINGS:
            source = "--format"
        found[name] = (value if alike else "by format", source)
    return found


def _shape(
    model: str | None, sizes: dict[str, int | None], dtype: str | None, ranks: int
) -> tuple[CacheShape, list[int]]:
    """The sizes to plan for, of one rank, and the numbers of the layers that they are of."""
    from arkcache.demo.describe import parse_dtype, shape_of_model
    from arkcache.memory import CacheShape

    given = [f"--{name}" for name, size in sizes.items() if size is not None]
    if model is not None:
        if given:
            raise arkcache.InputError(
                f"{', '.join(given)} beside --model: expected one or the other"
            )
        return shape_of_model(model, dtype, ranks)
    layers, kv_heads, head_dim, value_dim = sizes.values()
    if layers is None or kv_heads is None or head_dim is None:
        raise arkcache.InputError(
            f"{', '.join(given) or 'no sizes'} given: expected --model, or all of --layers, "
            "--kv-heads and --head-dim"
        )
    value_dim = head_dim if value_dim is None else value_dim
    shape = CacheShape(layers, kv_heads, head_dim, value_dim, parse_dtype(dtype or "bfloat16"))
    return shape.split(ranks), list(range(layers))
