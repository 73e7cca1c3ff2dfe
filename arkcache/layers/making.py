"""Which class keeps a layer and which engine runs it, by budget, format and backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from arkcache.config import CacheConfig
from arkcache.engines.engine import Engine, PagedParts
from arkcache.engines.host import HostEngine
from arkcache.kernels.torch_pages import PagePacker
from arkcache.layers.dense import DenseLayer
from arkcache.layers.layer import Layer
from arkcache.layers.packed_dense import PackedDenseLayer
from arkcache.layers.paged import PagedLayer
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.counts import Counters, LayerTokens
from arkcache.pages.grouping import PageTokens
from arkcache.pages.store import PageStore
from arkcache.planning import Planner
from arkcache.tiering.device import DeviceTier
from arkcache.tiering.host import HostTier


def make_layers(
    planner: Planner, tier: DeviceTier, host: HostTier | None, max_selected: int, *, latent: bool
) -> list[Layer]:
    """The layers of a manager, empty. `max_selected`: pages that a KV head may select at most."""
    config, geometry = planner.config, tier.geometry
    make_engine = _engines(planner.backend, latent)
    layers: list[Layer] = []
    num_paged = 0
    for number in range(planner.num_layers):
        if config.budget_of(number) is None:
            layers.append(_dense(config, tier, planner.packers[0], planner.backend))
            continue
        assert host is not None
        rows, gives_up = (geometry.batch, geometry.num_kv_heads), config.retention is not None
        store = PageStore(host, planner.packers, *rows, number, gives_up=gives_up)
        tokens = LayerTokens(geometry.batch)
        parts = PagedParts(config, tokens, Counters(), store, tier, num_paged)
        if config.grouping is not None:
            heads = geometry.num_kv_heads
            parts.page_tokens = PageTokens(geometry.batch, heads, config.page_size)
        selected = planner.selected(number, max_selected)
        layers.append(PagedLayer(parts, make_engine(parts, selected)))
        num_paged += 1
    return layers


def _engines(backend: str, latent: bool) -> Callable[[PagedParts, Ids], Engine]:
    """Makes who runs the steps of a paged layer, of its parts and pages selected per KV head."""
    if backend == "triton":
        from arkcache.engines.device import DeviceEngine  # it imports Triton

        return DeviceEngine
    if backend == "numba":
        from arkcache.engines.native import NativeEngine  # it imports numba
        from arkcache.kernels.numba_launch import Scratch

        return partial(NativeEngine, scratch=Scratch())
    return partial(HostEngine, latent=latent)


def _dense(config: CacheConfig, tier: DeviceTier, packer: PagePacker, backend: str) -> Layer:
    """A layer that attends everything."""
    if backend == "triton":
        from arkcache.layers.device_dense import DeviceDenseLayer, DevicePackedDenseLayer

        if config.format.is_raw:
            return DeviceDenseLayer(tier.geometry)
        return DevicePackedDenseLayer(config, tier.geometry, packer)
    if config.format.is_raw:
        return DenseLayer(tier.geometry)
    return PackedDenseLayer(config, tier.geometry, packer)
