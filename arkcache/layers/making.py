"""Which class keeps a layer: by its budget, its format and the backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from arkcache.config import CacheConfig
from arkcache.kernels.torch_pages import PagePacker
from arkcache.layers.dense import DenseLayer
from arkcache.layers.packed_dense import PackedDenseLayer
from arkcache.layers.paged import PagedLayer
from arkcache.planning import Planner
from arkcache.tiering.device import DeviceTier
from arkcache.tiering.host import HostTier

if TYPE_CHECKING:  # they import Triton
    from arkcache.layers.device_dense import DeviceDenseLayer, DevicePackedDenseLayer
    from arkcache.layers.recalled import RecalledLayer

    EngineLayer: TypeAlias = RecalledLayer | DeviceDenseLayer | DevicePackedDenseLayer

    Layer: TypeAlias = DenseLayer | PackedDenseLayer | PagedLayer | EngineLayer


def make_layers(
    planner: Planner, tier: DeviceTier, host: HostTier | None, max_selected: int, *, latent: bool
) -> list[Layer]:
    """The layers of a manager, empty. `max_selected`: pages that a KV head may select at most."""
    config = planner.config
    layers: list[Layer] = []
    numbers = iter(range(planner.num_layers))
    for number in range(planner.num_layers):
        if config.budget_of(number) is None:
            layers.append(_dense(config, tier, planner.packers[0], planner.backend))
            continue
        assert host is not None
        selected = planner.selected(number, max_selected)
        if planner.backend == "triton":
            from arkcache.layers.recalled import RecalledLayer

            packer = planner.packers[0]
            layers.append(RecalledLayer(config, selected, tier, next(numbers), host, packer))
        else:
            own = (tier, next(numbers), host, planner.packers, latent)
            layers.append(PagedLayer(config, selected, *own))
    return layers


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
