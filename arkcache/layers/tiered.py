"""What all layers with sealed pages in the host tier share: streaming them, and giving them back.

Which pages are recalled is decided elsewhere: by `PagedLayer` on the host, by `RecalledLayer` on
the device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.kernels.torch_pages import PagePacker
from arkcache.layers.sealing import SealingLayer
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.store import PageStore
from arkcache.tiering.device import DeviceTier, PackedWorkingSet, WorkingSet
from arkcache.tiering.host import HostTier
from arkcache.tiering.read_ahead import read_ahead
from arkcache.tiering.streams import streams_of


class TieredLayer(SealingLayer):
    """A layer whose sealed pages live in the host tier, with a working set in the device tier.

    Args:
        config: the cache's settings.
        device_tier: the device tier.
        number: which of its working sets is this layer's.
        host: the host tier.
        packers: of its pages' first format and, if there is one, of the coarse one.
    """

    def __init__(
        self,
        config: CacheConfig,
        device_tier: DeviceTier,
        number: int,
        host: HostTier,
        packers: list[PagePacker],
    ) -> None:
        super().__init__(config, device_tier.geometry)
        self.device_tier, self.number = device_tier, number
        self._packer = packers[0]
        self._store = PageStore(host, packers, self.geometry.batch, self.geometry.num_kv_heads)

    @property
    def working_set(self) -> WorkingSet | PackedWorkingSet:
        """This layer's part of the device tier."""
        return self.device_tier.working_sets[self.number]

    @property
    def host(self) -> HostTier:
        """The host tier."""
        return self._store.host

    def pieces_needed(self, new_lengths: Ids) -> int:
        """Pieces of the host tier that growing to these lengths takes."""
        return self.pages_to_seal(new_lengths) * self._store.pieces_per_page

    def _page_blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """See `SealingLayer`; the next block is read while one is attended."""
        page_size, total = self.config.page_size, int(self.sealed.max())
        blocks = self.device_tier.stream_blocks
        per_block = blocks[0][0].shape[2] // page_size
        runs = [(first, min(first + per_block, total)) for first in range(0, total, per_block)]
        loads = [partial(self._load, first, last) for first, last in runs]
        streams = streams_of(self.geometry.device)
        for (first, last), block in zip(runs, read_ahead(streams, blocks, loads), strict=True):
            key, value = (plane[:, :, : (last - first) * page_size] for plane in block)
            yield first, last, key, value

    def _load(self, first: int, last: int, block: Sequence[Tensor]) -> None:
        """Fill a streaming block with pages first..last of every sequence that has them."""
        for sequence in range(self.geometry.batch):
            held = min(last, int(self.sealed[sequence]))
            if held > first:
                tokens = (held - first) * self.config.page_size
                states = self._read(sequence, first, held)
                for plane, part in zip(block, states, strict=True):
                    plane[sequence, :, :tokens] = part

    @abstractmethod
    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """Make sequence i what sequence `index[i]` was; pages are shared, not copied.

        device_tier: a new one, for as many sequences as `index` has; num_selected: pages that a
        step may select there, per KV head.
        """

    def release(self) -> None:
        """Give the layer's pages back to the host tier."""
        self._store.release()

    def move_pieces(self, host: HostTier) -> None:
        """Follow the layer's pages into a tier that was extracted from the present one."""
        self._store.move(host)

    def held_pieces(self) -> Ids:
        """Pieces of the host tier that the layer refers to, one entry per sequence and piece."""
        return self._store.held()
