"""A `KVCacheManager` as files, layer by layer, and back."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arkcache.config import CacheConfig
from arkcache.engines.engine import State
from arkcache.errors import ArkCacheError, SessionError
from arkcache.manager import KVCacheManager
from arkcache.pages.bookkeeping import Ids, sealed_counts
from arkcache.pages.grouping import each_once
from arkcache.saving.folder import FolderReader, FolderWriter, reading, writing
from arkcache.saving.pages import Progress, read_pages, write_pages

STORED = (
    *("page_size", "num_recent_tokens", "key_bits", "value_bits", "group_size", "rotation"),
    *("coarse_key_bits", "coarse_value_bits", "grouping"),
)
"""Settings that say how tokens are kept: a state can be loaded with these alone as they were."""

STORED_WITH_GROUPING = ("num_sink_tokens", "segment_tokens")
"""Those beside them that say where segments of grouped tokens begin and end."""

NAME = "manager0"
"""What the files of a manager begin with that is the only one."""


def save_manager(manager: KVCacheManager, folder: Path) -> None:
    """See `KVCacheManager.save`."""
    check_savable(manager.config)
    with writing(folder, manager_bytes(manager)) as writer:
        held = write_manager(writer, NAME, manager, lambda *_: None)
        writer.commit({"managers": [held]})


def load_manager(
    folder: Path, device: torch.device | str, settings: dict[str, Any]
) -> KVCacheManager:
    """See `KVCacheManager.load`."""
    with reading(folder) as reader:
        if "model" in reader.contents:
            raise SessionError(
                f"{folder} holds the cache of a model of transformers: ArkCache.load reads it"
            )
        held = reader.contents["managers"][0]
        sizes = held["sizes"] | {"dtype": getattr(torch, held["sizes"]["dtype"])}
        config = config_from_dict(held["config"], **settings)
        manager = KVCacheManager(config=config, device=device, **sizes)
        read_manager(reader, NAME, held, manager, lambda *_: None)
    return manager


def manager_bytes(manager: KVCacheManager) -> int:
    """About as many bytes as `write_manager` writes; a file that it can link is not written."""
    stats, host = manager.stats(), manager.host
    host_bytes = 0 if host is None or host.folder is not None else stats.host_bytes
    return host_bytes + stats.digest_bytes + stats.device_bytes


def check_savable(config: CacheConfig) -> None:
    """Raise `SessionError` for settings whose state cannot be written down."""
    if config.retention is not None:
        raise SessionError(
            f"retention={config.retention!r}: a cache that gives pages up for good cannot be "
            "saved; keep the text and read it again"
        )


def write_manager(
    writer: FolderWriter, name: str, manager: KVCacheManager, progress: Progress
) -> dict[str, Any]:
    """Write what a manager holds into files whose names begin with `name`.

    Returns what `read_manager` is to be told. A manager that holds nothing writes nothing.
    """
    held: dict[str, Any] = {
        "sizes": _sizes(manager),
        "config": config_to_dict(manager.config),
        "batch": manager.batch,
        "dense": _dense(manager),
    }
    if manager.batch == 0:
        return held
    host, order = manager.host, np.zeros(0, dtype=np.int64)
    table: State = {}
    if host is not None:
        handles = np.unique(manager.held_pieces())
        kinds = host.kinds(handles)
        order = np.concatenate([handles[kinds == kind] for kind in range(len(host.piece_bytes))])
        table = write_pages(writer, name, host, handles, manager.name_of, progress)
        held["piece_bytes"] = list(host.piece_bytes)
    numbers = np.full(int(order.max(initial=-1)) + 2, -1, dtype=np.int64)
    numbers[order] = np.arange(len(order))  # the last one stays -1, which is that of no piece
    writer.add_tensors(f"{name}-log", table | manager.log_state())
    for layer in range(manager.num_layers):
        state = manager.layer_state(layer)
        if "pieces" in state:
            state["pieces"] = torch.from_numpy(numbers[state["pieces"].numpy()])
        writer.add_tensors(f"{name}-layer{layer}", state)
    held["digests"] = [manager.digest_kind(layer) for layer in range(manager.num_layers)]
    return held


def read_manager(
    reader: FolderReader,
    name: str,
    held: dict[str, Any],
    manager: KVCacheManager,
    progress: Progress,
) -> None:
    """Have an empty manager hold what `write_manager` wrote; after an error it is empty.

    Raises `SessionError` where the manager keeps tokens in another way, or a file is damaged.
    """
    _check_alike(reader, held, manager)
    if held["batch"] == 0:
        return
    try:
        log = reader.tensors(f"{name}-log")
        _make_room(reader, held, manager, log)
        handles = np.zeros(0, dtype=np.int64)
        if manager.host is not None:
            handles = read_pages(reader, name, manager.host, log, progress)
        listings = np.zeros(len(handles), dtype=np.int64)
        for layer in range(manager.num_layers):
            state = reader.tensors(f"{name}-layer{layer}")
            _check_counts(reader, manager, layer, state, len(handles))
            if "pieces" in state:
                numbers = state["pieces"].numpy()
                np.add.at(listings, numbers[numbers >= 0], 1)
                state["pieces"] = torch.from_numpy(_named(numbers, handles))
            if held["digests"][layer] != manager.digest_kind(layer):
                state = {key: one for key, one in state.items() if not key.startswith("digest")}
            _restore(reader, manager, layer, state)
        if manager.host is not None:
            manager.host.retain(np.repeat(handles, listings - 1))
    except BaseException:
        manager.reset()
        raise


def _make_room(
    reader: FolderReader, held: dict[str, Any], manager: KVCacheManager, log: State
) -> None:
    if int(log["batch"]) != held["batch"]:
        raise SessionError(f"{reader.folder}: its log is of another number of sequences")
    manager.refill(log)
    if manager.host is not None and list(manager.host.piece_bytes) != held["piece_bytes"]:
        raise SessionError(
            f"{reader.folder} has pages of {held['piece_bytes']} bytes, and here they are of "
            f"{list(manager.host.piece_bytes)}"
        )


def _restore(reader: FolderReader, manager: KVCacheManager, layer: int, state: State) -> None:
    try:
        manager.restore_layer(layer, state)
    except RuntimeError as error:  # of torch, where shapes differ
        if isinstance(error, ArkCacheError):
            raise
        raise SessionError(f"{reader.folder}: layer {layer} does not fit ({error})") from error


def _check_counts(
    reader: FolderReader, manager: KVCacheManager, layer: int, state: State, num_pieces: int
) -> None:
    """Raise `SessionError` unless tokens, pages and pieces of a layer are as many as they must be:
    kernels that read them check nothing."""
    lengths = manager.lengths_of(int(state["columns"]))
    fits = np.array_equal(state["lengths"].numpy(), lengths)
    if "sealed" in state:
        config, sealed = manager.config, state["sealed"].numpy()
        expected = sealed_counts(lengths, *config.sealing)
        fits &= np.array_equal(sealed, expected)
    if fits and "pieces" in state:
        numbers = state["pieces"].numpy()
        held = np.broadcast_to(np.arange(numbers.shape[2]) < sealed[:, None, None], numbers.shape)
        fits = numbers.shape[2] == int(sealed.max()) and numbers.shape[0] == manager.batch
        fits &= bool(((numbers[held] >= 0) & (numbers[held] < num_pieces)).all())
        fits &= bool((numbers[~held] == -1).all())
        if config.grouping is not None:
            fits &= _lists_tokens(manager, state, sealed)
    if not fits:
        raise SessionError(f"{reader.folder}: the counts of layer {layer} contradict each other")


def _lists_tokens(manager: KVCacheManager, state: State, sealed: Ids) -> bool:
    """Whether grouped pages hold every token of their segment once."""
    config, most = manager.config, int(sealed.max())
    shape = (manager.batch, manager.num_kv_heads, most, config.page_size)
    if "page_tokens" not in state or state["page_tokens"].shape != shape:
        return False
    return each_once(state["page_tokens"].numpy(), sealed, *config.sealing[2:])


def _named(numbers: Ids, handles: Ids) -> Ids:
    """The handles of pieces by their numbers; -1 stays."""
    named: Ids = np.where(numbers < 0, -1, np.append(handles, -1)[numbers])
    return named


def _check_alike(reader: FolderReader, held: dict[str, Any], manager: KVCacheManager) -> None:
    """Raise `SessionError` unless a manager keeps tokens as those were kept that are to be read."""
    own = _sizes(manager)
    for what, size in held["sizes"].items():
        if own.get(what) != size:
            raise SessionError(
                f"{reader.folder} was saved with {what}={size!r}, and this is {own.get(what)!r}: "
                "load it for the model that it was saved with, in the same dtype"
            )
    if (dense := _dense(manager)) != held["dense"]:
        raise SessionError(
            f"{reader.folder} was saved with layers that attend everything {held['dense']}, and "
            f"here these are {dense}, which keep tokens in another way: leave budgets of None and "
            "num_dense_layers as they were"
        )
    settings = config_to_dict(manager.config)
    grouped = settings["grouping"] is not None
    for what in (*STORED, *(STORED_WITH_GROUPING if grouped else ())):
        before = held["config"].get(what)
        if settings[what] != before:
            raise SessionError(
                f"{reader.folder} was saved with {what}={before!r}: its pages cannot "
                f"be read with {what}={settings[what]!r}; leave that setting out"
            )


def _sizes(manager: KVCacheManager) -> dict[str, Any]:
    """What a manager is made with, as JSON can say it."""
    return manager.sizes | {"dtype": str(manager.dtype).removeprefix("torch.")}


def _dense(manager: KVCacheManager) -> list[int]:
    """The layers that attend everything."""
    config = manager.config
    return [layer for layer in range(manager.num_layers) if config.budget_of(layer) is None]


def config_to_dict(config: CacheConfig) -> dict[str, Any]:
    """The settings as JSON can say them."""
    return {field.name: getattr(config, field.name) for field in fields(config)}


def config_from_dict(values: dict[str, Any], **others: Any) -> CacheConfig:
    """What `config_to_dict` gave, with some settings replaced by others.

    Raises `ConfigError` for settings that do not exist or do not go together.
    """
    return CacheConfig(**{name: _tuples(value) for name, value in (values | others).items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
