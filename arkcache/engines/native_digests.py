"""Digests of a layer's pages as the compiled kernels of a CPU read them.

Made by the same code as those of plain torch, and laid out anew: see `kernels/numba_score.py`.
Boxes are kept in bf16, whatever the model computes in: on text and on random keys they choose
99.6 % of the pages that fp32 ones choose, in half the memory that a step reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.kernels.numba_record import CENTROID, CUBOID, SPHERE, TOKEN_CODES, TOKEN_ROWS
from arkcache.kernels.numba_score import BLOCK
from arkcache.kernels.torch_digest import BoundingVolumes, num_features
from arkcache.kernels.torch_hadamard import rotate
from arkcache.kernels.torch_token_rows import TokenRows, half_dim
from arkcache.kernels.torch_tokens import TokenIndex
from arkcache.tiering.device import Geometry
from arkcache.tiering.growing import GrowingTensor

SHAPES = {"cuboid": CUBOID, "sphere": SPHERE, "centroid": CENTROID}


class NativeDigests:
    """Digests of every sealed page of a layer, sinks included.

    Args:
        config: the cache's settings.
        geometry: sizes.

    Attributes:
        kind: what they are, for the kernels.
        features: numbers that a query is mapped to.
    """

    def __init__(self, config: CacheConfig, geometry: Geometry) -> None:
        self._config, self.features = config, geometry.head_dim
        self._index: BoundingVolumes | TokenRows | TokenIndex
        page_size, dim = config.page_size, geometry.head_dim
        self._codes = page_size * half_dim(dim) * BLOCK
        self._pages_per_entry = BLOCK
        if config.index != "tokens":
            self._index, self.kind = (
                BoundingVolumes(config.index),
                SHAPES[config.index.partition("-")[0]],
            )
            self.features = num_features(config.index, dim)
            entry, dtype = self.features * BLOCK, torch.bfloat16
        elif config.has_token_rows("cpu"):
            self._index, self.kind = TokenRows(page_size, dim), TOKEN_ROWS
            self.features = 2 * half_dim(dim)
            entry, dtype = self._codes + 4 * page_size * BLOCK, torch.uint8
        else:
            index = TokenIndex(page_size, dim, config.packed_index_bits)
            self._index, self.kind, self._pages_per_entry = index, TOKEN_CODES, 1
            entry, dtype = 4 * dim + index.plane_dim * page_size, torch.uint8
        shape = (geometry.batch, geometry.num_kv_heads, 1, entry)
        self._data = GrowingTensor(shape, 2, dtype, geometry.device)

    @property
    def data(self) -> Tensor:
        """[batch, kv_heads, blocks, numbers of a block]; blocks are pages for packed codes."""
        return self._data.data

    @property
    def num_pages(self) -> int:
        """Pages of a row that there is room for."""
        return self._data.capacity * self._pages_per_entry

    @property
    def nbytes(self) -> int:
        """Bytes of the digests."""
        return self._data.nbytes

    def reserve(self, num_pages: int) -> None:
        """Make room for so many pages of every row."""
        self._data.reserve(-(-num_pages // self._pages_per_entry))

    def write(self, seqs: slice, first: int, key: Tensor) -> None:
        """Digest pages of keys [seqs, kv_heads, pages, page_size, dim] from number `first` on."""
        # Boxes fit keys better as the model made them: a rotation evens out their channels.
        digest = self._index.digest(rotate(key) if self._config.rotates_keys else key)
        if self.kind == TOKEN_CODES:
            self._data.write(seqs, first, digest)
            return
        last, page_dim = first + key.shape[2], self._index.page_dim
        self.reserve(last)
        for block in range(first // BLOCK, -(-last // BLOCK)):
            start, stop = max(first, block * BLOCK), min(last, (block + 1) * BLOCK)
            own = digest.narrow(page_dim, start - first, stop - start)
            self._put(seqs, block, slice(start % BLOCK, start % BLOCK + stop - start), own)

    def _put(self, seqs: slice, block: int, columns: slice, digest: Tensor) -> None:
        """Write digests of pages that are some columns of one block."""
        target = self._data.data[seqs, :, block]
        if self.kind != TOKEN_ROWS:
            target.unflatten(2, (self.features, BLOCK))[:, :, :, columns] = digest
            return
        page_size, half = self._config.page_size, self.features // 2
        codes = target[:, :, : self._codes].unflatten(2, (page_size, half, BLOCK))
        codes[:, :, :, :, columns] = digest[..., :half].permute(0, 1, 3, 4, 2)
        scales = target[:, :, self._codes :].view(torch.float32).unflatten(2, (page_size, BLOCK))
        own = digest.view(torch.float32)[..., -1]
        scales[:, :, :, columns] = own.transpose(2, 3)

    def first(self, num_pages: int) -> Tensor:
        """What holds the digests of the first pages: of whole blocks, as `data`."""
        return self._data.first(-(-num_pages // self._pages_per_entry))

    def restore(self, blocks: Tensor) -> None:
        """Hold what `first` gave."""
        self._data.write(slice(None), 0, blocks)

    def keep_sequences(self, index: Tensor) -> None:
        """Make sequence i what sequence `index[i]` was."""
        self._data.keep_sequences(index)
