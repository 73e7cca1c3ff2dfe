"""An `ArkCache` as a folder, and back: `ArkCache.save` and `ArkCache.load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arkcache.errors import InputError, SessionError
from arkcache.huggingface.attachment import LayerShape, device_of
from arkcache.huggingface.cache import ArkCache, PagedCacheLayer
from arkcache.huggingface.identity import identity_of
from arkcache.huggingface.sharing import SharingCacheLayer
from arkcache.manager import KVCacheManager
from arkcache.saving.folder import FolderReader, FolderWriter, reading, writing
from arkcache.saving.managers import (
    check_savable,
    config_from_dict,
    config_to_dict,
    manager_bytes,
    read_manager,
    write_manager,
)
from arkcache.saving.pages import Progress

STATE_ELSEWHERE = ("recurrent_gemma",)
"""Types of models whose cache is not all there is of a conversation."""


def save_cache(
    cache: ArkCache, model: PreTrainedModel, folder: Path, note: Any, progress: Progress
) -> None:
    """See `ArkCache.save`. note: what JSON can say, given back by `load_cache`."""
    check_savable(cache.config)
    if model.config.model_type in STATE_ELSEWHERE:
        raise InputError(f"{type(model).__name__} keeps a part of its state in its own modules")
    paged = [
        layer
        for number, layer in enumerate(cache.layers)
        if isinstance(layer, PagedCacheLayer) and cache.config.stores(number)
    ]
    for manager in cache.managers:
        columns = [layer.get_seq_length() for layer in paged if layer.manager is manager]
        if len({*columns}) != 1 or len(columns) != manager.num_layers:
            raise InputError(
                f"layers of this cache hold {sorted({*columns})} tokens: a step was interrupted in "
                "the middle; take it back with crop(), or decode within cache.atomic()"
            )
    others = [layer for layer in cache.layers if not isinstance(layer, PagedCacheLayer)]
    total = sum(manager_bytes(manager) for manager in cache.managers)
    total += sum(
        t.nbytes for layer in others for t in vars(layer).values() if isinstance(t, Tensor)
    )
    with writing(folder, total) as writer:
        numbers = {id(manager): number for number, manager in enumerate(cache.managers)}
        managers = [
            write_manager(writer, f"manager{number}", manager, progress)
            for number, manager in enumerate(cache.managers)
        ]
        layers = [
            _describe(writer, number, layer, numbers) for number, layer in enumerate(cache.layers)
        ]
        writer.commit(
            {
                "model": identity_of(model),
                "config": config_to_dict(cache.config),
                "managers": managers,
                "layers": layers,
                "note": note,
            }
        )


def load_cache(
    model: PreTrainedModel, folder: Path, progress: Progress, **settings: Any
) -> tuple[ArkCache, Any]:
    """See `ArkCache.load`; the cache, and the note that it was saved with."""
    with reading(folder) as reader:
        contents = reader.contents
        if "model" not in contents:
            raise SessionError(
                f"{folder} holds no cache of a model of transformers: KVCacheManager.load reads it"
            )
        _check_model(reader, model)
        saved, config = (config_from_dict(contents["config"], **s) for s in ({}, settings))
        if config.layer_sources != saved.layer_sources:
            raise SessionError(
                f"{folder} was saved with layer_sources={saved.layer_sources!r}: layers that store "
                "nothing have nothing to load; leave that setting out"
            )
        cache = ArkCache(model, config)
        if len(contents["layers"]) != len(cache.layers):
            raise SessionError(
                f"{folder} was saved with {len(contents['layers'])} layers, and this model's cache "
                f"has {len(cache.layers)}"
            )
        try:
            managers = [
                _read_manager(reader, number, cache, model, progress)
                for number in range(len(contents["managers"]))
            ]
            for number, described in enumerate(contents["layers"]):
                _restore(
                    reader, cache.layers[number], number, described, managers, device_of(model)
                )
        except BaseException:
            cache.reset()
            raise
    return cache, contents["note"]


def _check_model(reader: FolderReader, model: PreTrainedModel) -> None:
    """Raise `SessionError` for another model than that which the state was saved with."""
    saved, own = reader.contents["model"], identity_of(model)
    for what in ("class", "dtype", "config", "weights"):
        if saved[what] != own[what]:
            raise SessionError(
                f"{reader.folder} was saved with another model, or in another dtype: {what} was "
                f"{saved[what]:.24} and is {own[what]:.24}. Load it with the model that read its "
                "text"
            )


# -- managers -------------------------------------------------------------------------------------


def _members(contents: dict[str, Any], number: int) -> list[int]:
    """The layers of the model that a manager holds, in its order."""
    held = [
        (described["index"], layer)
        for layer, described in enumerate(contents["layers"])
        if described.get("manager") == number
    ]
    return [layer for _, layer in sorted(held)]


def _read_manager(
    reader: FolderReader, number: int, cache: ArkCache, model: PreTrainedModel, progress: Progress
) -> KVCacheManager:
    contents = reader.contents
    held, layers = contents["managers"][number], _members(contents, number)
    shape = _shape(held["sizes"], cache, layers[0], model)
    manager = cache.add_manager(shape, layers)
    read_manager(reader, f"manager{number}", held, manager, progress)
    return manager


def _shape(
    sizes: dict[str, Any], cache: ArkCache, layer: int, model: PreTrainedModel
) -> LayerShape:
    """The shape of a manager's layers: as saved, on the device where they are now."""
    known = cache.shape_of(layer)
    return LayerShape(
        sizes["num_kv_heads"],
        sizes["head_dim"],
        sizes["value_dim"],
        getattr(torch, sizes["dtype"]),
        device_of(model) if known is None else known.device,
        sizes["latent"],
    )


# -- layers ---------------------------------------------------------------------------------------


def _describe(
    writer: FolderWriter, number: int, layer: Any, managers: dict[int, int]
) -> dict[str, Any]:
    """What the header says of a layer; those that are not paged get a file of their own."""
    if isinstance(layer, SharingCacheLayer):
        return {"class": "sharing"}
    if isinstance(layer, PagedCacheLayer):
        described = {"class": "paged", "in_prompt": layer.in_prompt}
        if layer.manager is None:
            return described
        return described | {"manager": managers[id(layer.manager)], "index": layer.index}
    tensors: dict[str, Tensor] = {}
    values = {name: _flat(value, name, tensors) for name, value in vars(layer).items()}
    writer.add_tensors(f"other{number}", tensors)
    return {"class": type(layer).__name__, "values": values}


def _restore(
    reader: FolderReader,
    layer: Any,
    number: int,
    described: dict[str, Any],
    managers: list[KVCacheManager],
    device: torch.device,
) -> None:
    own = "paged" if isinstance(layer, PagedCacheLayer) else type(layer).__name__
    own = "sharing" if isinstance(layer, SharingCacheLayer) else own
    if own != described["class"]:
        raise SessionError(
            f"{reader.folder}: layer {number} was saved as {described['class']} and is {own} here, "
            "perhaps under another release of transformers"
        )
    if isinstance(layer, SharingCacheLayer):
        layer.follow()
        return
    if isinstance(layer, PagedCacheLayer):
        layer.in_prompt = described["in_prompt"]
        if "manager" in described:
            layer.take_up(managers[described["manager"]], described["index"])
        return
    tensors = reader.tensors(f"other{number}")
    for name, value in described["values"].items():
        setattr(layer, name, _unflat(value, tensors, device))


def _flat(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A layer's attribute as JSON can say it; its tensors go into `tensors`, by their path."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, list | tuple):
        items = [_flat(one, f"{name}.{number}", tensors) for number, one in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, dict):
        return {"dict": [[key, _flat(one, f"{name}.{key}", tensors)] for key, one in value.items()]}
    raise SessionError(f"a layer's {name} is a {type(value).__name__}: it cannot be saved")


def _unflat(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """What `_flat` was given; tensors come to `device`."""
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held].to(device)
    if kind == "dtype":
        return getattr(torch, held)
    if kind == "device":
        return device
    if kind == "dict":
        return {key: _unflat(one, tensors, device) for key, one in held}
    items = [_unflat(one, tensors, device) for one in held]
    return tuple(items) if kind == "tuple" else items
