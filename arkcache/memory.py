"""What a cache will take, worked out from its settings alone: nothing is allocated.

Every size comes from where it is decided: pages from `PageLayout`, the device tier from the
manager's `Planner`, digests from the index itself, run on shapes without contents.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch

from arkcache.backend import why_not_settings
from arkcache.config import NO_LIMIT, CacheConfig
from arkcache.errors import ConfigError, InputError
from arkcache.formats import PageFormat, PageLayout, PartLayout
from arkcache.layers.packed_dense import CHUNK_PAGES
from arkcache.manager import KVCacheManager
from arkcache.pages.bookkeeping import sealed_pages
from arkcache.pages.grouping import NUMBER_BYTES
from arkcache.pages.index import PageIndex, make_index
from arkcache.planning import Planner
from arkcache.tiering.growing import grown_capacity
from arkcache.tiering.mapped_file import RESIDENT_BYTES

_PLANNED_ON = {"cpu": torch.device("cpu"), "cuda": torch.device("meta")}
"""Devices that can be planned for. "meta" is what every GPU is to a plan: not a CPU."""


@dataclass(frozen=True)
class CacheShape:
    """Sizes of what a decoder's layers that attend their whole past store.

    Attributes:
        num_layers: layers that attend their whole past.
        num_kv_heads: of each layer.
        head_dim, value_dim: elements of a key and of a value of one KV head.
        dtype: of keys and values.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers and heads, unquantised."""
        dims = self.head_dim + self.value_dim
        return self.num_layers * self.num_kv_heads * dims * self.dtype.itemsize

    def split(self, ranks: int) -> CacheShape:
        """What each of so many processes keeps when tensor parallelism splits the KV heads.

        Raises `InputError` where they do not divide.
        """
        if ranks < 1:
            raise InputError(f"ranks={ranks}: expected at least 1")
        if self.num_kv_heads % ranks:
            fits = [n for n in range(1, self.num_kv_heads + 1) if self.num_kv_heads % n == 0]
            raise InputError(
                f"{self.num_kv_heads} KV heads over {ranks} ranks: transformers does not split a "
                f"head; expected one of {', '.join(map(str, fits))} ranks"
            )
        return replace(self, num_kv_heads=self.num_kv_heads // ranks)


@dataclass(frozen=True)
class MemoryPlan:
    """What a cache takes that holds `context_tokens` in each of `batch` sequences.

    All sizes are in bytes, over all layers, KV heads and sequences unless said otherwise. They are
    what is allocated, but for digests and dense layers of 16 bits: these are counted as far as they
    are in use, and have room for up to an eighth more, and for 64 tokens or pages at least.

    Attributes:
        format: in which pages are sealed, "K4V2"; with a second one, "K8V4+K4V2".
        context_tokens, batch: what was planned for.
        page_bytes: a page of one KV head, in the first format.
        code_bytes, meta_bytes, padding_bytes: its elements, scales and zeros, and padding.
        bits_per_element: of the page, everything included.
        attended_tokens: by a decode step, per KV head: the mean over the layers that are not dense;
            with `target_missed_mass`, the most.
        host_bytes_per_token: of one sequence: sealed pages, spread over their tokens.
        host_bytes: the host tier, with the numbers of grouped tokens.
        disk_bytes: what of it is in a file on a disk: all with `host_path`, else nothing.
        host_resident_bytes: what of it is in RAM: all, or with `host_path` what is mapped at most;
            the system's page cache may have more, unless the setting of that name says how much.
        coarse_host_bytes: the host tier with every page demoted to the second format, a bound:
            sinks are never demoted; None without a second format.
        tier_bytes: the device tier's one allocation: slots, windows and streaming block. With an
            automatic pool factor on a GPU, without spare slots: the GPU at hand decides.
        spare_bytes: what such spare slots may take beside it at most, whatever the GPU; they never
            take more than 1/16 of its free memory. 0 where the pool factor is given or 1.
        dense_bytes: layers that attend everything, on the device, growing.
        digest_bytes: the page index, on the device, growing; with `estimate_pages`, the pages'
            means as well.
        full_bytes: a full cache of the model's dtype, nothing paged.
    """

    format: str
    context_tokens: int
    batch: int
    page_bytes: int
    code_bytes: int
    meta_bytes: int
    padding_bytes: int
    bits_per_element: float
    attended_tokens: float
    host_bytes_per_token: float
    host_bytes: int
    disk_bytes: int
    host_resident_bytes: int
    coarse_host_bytes: int | None
    tier_bytes: int
    spare_bytes: int
    dense_bytes: int
    digest_bytes: int
    full_bytes: int

    @property
    def device_bytes(self) -> int:
        """The device tier and dense layers: what `CacheStats.device_bytes` counts."""
        return self.tier_bytes + self.dense_bytes

    @property
    def device_ratio(self) -> float:
        """Everything on the device, digests included, as a share of a full cache."""
        return (self.device_bytes + self.digest_bytes) / self.full_bytes

    @property
    def host_ratio(self) -> float:
        """The host tier as a share of a full cache."""
        return self.host_bytes / self.full_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        totals = ("device_bytes", "device_ratio", "host_ratio")
        return asdict(self) | {name: getattr(self, name) for name in totals}


def plan_memory(
    config: CacheConfig,
    shape: CacheShape,
    context_tokens: int,
    batch: int = 1,
    device: str = "cuda",
    index: PageIndex | None = None,
) -> MemoryPlan:
    """What a cache of these settings takes, on a device that need not be there.

    Args:
        config: the settings; dense layers are the first `num_dense_layers` of `shape`, and
            `layer_sources` are of its layers.
        shape: of the decoder.
        context_tokens: tokens of each sequence.
        batch: sequences.
        device: "cuda" or "cpu", which differ in what they keep unpacked.
        index: what rates pages, where it is not what the settings say (`rate_with`).

    Raises `ConfigError` for settings that do not fit the shape or `device_bytes`, `InputError` for
    sizes below 1 and an unknown device.
    """
    _check(context_tokens, batch, device)
    full_bytes = batch * context_tokens * shape.token_bytes
    config, shape = _storing(config.on(device), shape)
    planner = KVCacheManager(
        shape.num_layers,
        shape.num_kv_heads,
        shape.head_dim,
        config,
        device=_PLANNED_ON[device],
        dtype=shape.dtype,
        value_dim=shape.value_dim,
    ).planner
    max_selected = planner.pages_that_fit(batch)
    page = _layout(config.format, config, shape)
    sealed = sealed_pages(context_tokens, *config.sealing)
    paged = [layer for layer in range(shape.num_layers) if config.budget_of(layer) is not None]
    rows = batch * shape.num_kv_heads
    num_pages = len(paged) * rows * sealed
    dense = _dense_bytes(config, shape, context_tokens, sealed)
    coarse = config.coarse_format
    coarse_page = _layout(coarse, config, shape) if coarse else None
    numbers = 0 if config.grouping is None else config.page_size * NUMBER_BYTES
    per_token = len(paged) * shape.num_kv_heads * (page.nbytes + numbers) / config.page_size
    tier_bytes = planner.plan(batch, max_selected).nbytes
    return MemoryPlan(
        format=config.format.name + (f"+{coarse.name}" if coarse else ""),
        context_tokens=context_tokens,
        batch=batch,
        page_bytes=page.nbytes,
        code_bytes=_code_bytes(page.key) + _code_bytes(page.value),
        meta_bytes=2 * (page.key.meta_bytes + page.value.meta_bytes),
        padding_bytes=_padding_bytes(page.key) + _padding_bytes(page.value),
        bits_per_element=page.bits_per_element,
        attended_tokens=_attended(
            config,
            [int(pages) for layer in paged for pages in planner.selected(layer, max_selected)],
            context_tokens,
            sealed,
        ),
        host_bytes_per_token=per_token,
        host_bytes=num_pages * (page.nbytes + numbers),
        disk_bytes=0 if config.host_path is None else num_pages * page.nbytes,
        host_resident_bytes=_resident_bytes(config, num_pages * page.nbytes) + num_pages * numbers,
        coarse_host_bytes=num_pages * (coarse_page.nbytes + numbers) if coarse_page else None,
        tier_bytes=tier_bytes,
        spare_bytes=_spare_bytes(planner, batch, max_selected) if device == "cuda" else 0,
        dense_bytes=(shape.num_layers - len(paged)) * rows * dense,
        digest_bytes=num_pages * _digest_bytes(config, shape, device, index, planner.backend),
        full_bytes=full_bytes,
    )


def within_bytes(
    config: CacheConfig,
    shape: CacheShape,
    context_tokens: int,
    device_bytes: int,
    device: str = "cuda",
    index: PageIndex | None = None,
) -> CacheConfig:
    """The settings with the largest budget that takes so many bytes on the device at most, all
    counted: slots, windows, streaming block, dense layers and index, of one sequence.

    Dense layers of 16 bits and the index are counted with the room that they grow into when the
    first token comes after `context_tokens`. Args and errors are those of `plan_memory`. Raises
    `ConfigError` as well where what does not depend on the budget takes all of the bytes.
    """
    free = replace(config.on(device), budget_tokens="auto", device_bytes=None)
    plan = plan_memory(free, shape, context_tokens, device=device, index=index)
    sealed = sealed_pages(context_tokens, *free.sealing)
    dense = plan.dense_bytes
    if free.format.is_raw:
        dense = dense * grown_capacity(context_tokens) // context_tokens
    digests = plan.digest_bytes * grown_capacity(sealed) // max(sealed, 1)
    left = device_bytes - dense - digests
    if left < 1:
        raise ConfigError(
            f"{device_bytes} bytes on the device: with room to grow, dense layers take {dense} and "
            f"the index {digests} at {context_tokens} tokens; allow more, or lower "
            "num_dense_layers or index_bits, or raise page_size"
        )
    fitted = replace(free, budget_tokens="auto", device_bytes=left)
    plan_memory(
        fitted, shape, context_tokens, device=device, index=index
    )  # refuses what is too few
    return fitted


def _check(context_tokens: int, batch: int, device: str) -> None:
    for name, size in (("context", context_tokens), ("batch", batch)):
        if size < 1:
            raise InputError(f"{name}={size}: expected at least 1")
    if device not in _PLANNED_ON:
        raise InputError(f"device {device!r}: expected {' or '.join(_PLANNED_ON)}")


def _storing(config: CacheConfig, shape: CacheShape) -> tuple[CacheConfig, CacheShape]:
    """Settings and sizes of the layers that store, where others share theirs."""
    if config.layer_sources is None:
        return config, shape
    config.check_sources(shape.num_layers)
    config.check_layers(shape.num_layers, shape.num_kv_heads)
    layers = [layer for layer in range(shape.num_layers) if config.stores(layer)]
    return config.of_layers(layers), replace(shape, num_layers=len(layers))


def _resident_bytes(config: CacheConfig, host_bytes: int) -> int:
    """What of a host tier of so many bytes is in RAM at most."""
    if config.host_path is None:
        return host_bytes
    return min(host_bytes, config.host_resident_bytes or RESIDENT_BYTES)


def _spare_bytes(planner: Planner, batch: int, max_selected: int) -> int:
    """What an automatic pool factor may add to the device tier of a GPU at most."""
    config = planner.config
    given = config.device_pool_factor is not None
    if given or why_not_settings(config, planner.dtype, latent=False) is not None:
        return 0
    factor = planner.factor_within(NO_LIMIT, batch, max_selected)
    return (
        planner.plan(batch, max_selected, factor).nbytes - planner.plan(batch, max_selected).nbytes
    )


def _layout(one: PageFormat, config: CacheConfig, shape: CacheShape) -> PageLayout:
    sizes = (config.page_size, shape.head_dim, shape.value_dim, shape.dtype.itemsize)
    return PageLayout(one, *sizes)


def _code_bytes(part: PartLayout) -> int:
    return part.nbytes if part.bits == 16 else part.num_tokens * part.plane_dim


def _padding_bytes(part: PartLayout) -> int:
    return part.nbytes - _code_bytes(part) - 2 * part.meta_bytes


def _dense_bytes(config: CacheConfig, shape: CacheShape, length: int, sealed: int) -> int:
    """Bytes of one KV head of a sequence of this length, in a layer that attends everything."""
    per_token = (shape.head_dim + shape.value_dim) * shape.dtype.itemsize
    if config.format.is_raw:
        return length * per_token
    page = _layout(config.format, config, shape)
    chunks = -(-sealed // CHUNK_PAGES)
    return chunks * CHUNK_PAGES * page.nbytes + config.window_tokens * per_token


def _digest_bytes(
    config: CacheConfig, shape: CacheShape, device: str, index: PageIndex | None, backend: str
) -> int:
    """Bytes of the digest of one page of one KV head, and of its means where it is estimated."""
    index = index or make_index(config, shape.head_dim, _PLANNED_ON[device])
    size = (1, 1, 1, config.page_size, shape.head_dim)
    means = (shape.head_dim + shape.value_dim) * shape.dtype.itemsize
    # The CPU's kernels keep volumes in 16 bits, whatever the keys have.
    volumes = backend == "numba" and config.index != "tokens"
    dtype = torch.bfloat16 if volumes else shape.dtype
    digest = index.digest(torch.empty(size, dtype=dtype, device="meta")).nbytes
    return digest + (means if config.estimates else 0)


def _attended(config: CacheConfig, selected: list[int], length: int, sealed: int) -> float:
    """Tokens that a step attends when it may select so many pages: the mean over all heads."""
    if not selected:
        return float(length)
    sink_pages = min(config.num_sink_pages, sealed)
    pages = [sink_pages + min(count, sealed - sink_pages) for count in selected]
    return fmean(pages) * config.page_size + length - sealed * config.page_size
