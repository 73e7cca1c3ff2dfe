"""How a sealed page is stored: bits of keys and values, and where they lie in the page's bytes.

Pure arithmetic; `kernels/torch_pages.py` packs and unpacks by it. A page of one KV head is one run
of bytes in every tier, keys then values:

    16 bits      elements of the model's own dtype, untouched: [page_size, dim]
    8, 4, 2      scales, zeros (16-bit floats, one of each per group), codes [page_size, plane_dim]

An element is `code * scale + zero`. Keys share a scale per channel over the page's tokens, values
per token over `group_size` channels (KIVI, section 3.2). A token's codes take `plane_dim` bytes:
byte j holds channels j, j + plane_dim, j + 2 plane_dim ..., from its lowest bits on.
"""

from __future__ import annotations

from dataclasses import dataclass

from arkcache.errors import ConfigError

BITS = (16, 8, 4, 2)
"""Bits per element; 16 stands for the model's own dtype, whatever its size."""

META_BYTES = 2
"""Size of a scale or a zero: fp16, or bf16 where the model computes in it."""

ALIGNMENT = 16
"""Quantised parts are padded to this many bytes, so that both parts can be read in wide words."""


@dataclass(frozen=True)
class PageFormat:
    """Bits per element of keys and values, and the channels that share a scale in values."""

    key_bits: int = 16
    value_bits: int = 16
    group_size: int = 32

    @property
    def name(self) -> str:
        """The bits as LeanKV writes them: "K4V2"."""
        return f"K{self.key_bits}V{self.value_bits}"

    @property
    def is_raw(self) -> bool:
        """Whether nothing is quantised."""
        return self.key_bits == self.value_bits == 16


PRESETS = {
    "K16V16": PageFormat(16, 16),
    "K8V4": PageFormat(8, 4),
    "K4V4": PageFormat(4, 4),
    "K4V2": PageFormat(4, 2),
    "K2V2": PageFormat(2, 2),
}
"""Formats by name: K8V4 and K4V2 are LeanKV's (keys finer than values), K4V4 and K2V2 KIVI's."""


@dataclass(frozen=True)
class PartLayout:
    """The keys or the values of a page: `num_tokens` vectors of `dim` elements.

    Attributes:
        bits: per element.
        num_groups: groups that share a scale; 0 where nothing is quantised.
        element_bytes: size of the model's dtype.
    """

    bits: int
    num_tokens: int
    dim: int
    num_groups: int
    element_bytes: int

    @property
    def num_planes(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def plane_dim(self) -> int:
        """Bytes of a token's codes; odd dims are padded to whole bytes."""
        return -(-self.dim // self.num_planes)

    @property
    def meta_bytes(self) -> int:
        """Bytes of all scales, and of all zeros."""
        return self.num_groups * META_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes of the part, padding included."""
        if self.bits == 16:
            return self.num_tokens * self.dim * self.element_bytes
        used = 2 * self.meta_bytes + self.num_tokens * self.plane_dim
        return -(-used // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class PageLayout:
    """The bytes of one page of one KV head.

    Args:
        format: bits and groups.
        page_size: tokens.
        head_dim, value_dim: elements of a key and of a value.
        element_bytes: size of the model's dtype.

    Raises `ConfigError` where the groups do not divide the values.
    """

    format: PageFormat
    page_size: int
    head_dim: int
    value_dim: int
    element_bytes: int

    def __post_init__(self) -> None:
        size = self.format.group_size
        if self.format.value_bits < 16 and self.value_dim % size:
            fits = [d for d in range(1, self.value_dim + 1) if self.value_dim % d == 0]
            raise ConfigError(
                f"group_size={size} does not divide values of {self.value_dim} elements: expected "
                f"one of {', '.join(map(str, fits))}"
            )

    @property
    def key(self) -> PartLayout:
        """The keys: a scale per channel."""
        bits = self.format.key_bits
        groups = 0 if bits == 16 else self.head_dim
        return PartLayout(bits, self.page_size, self.head_dim, groups, self.element_bytes)

    @property
    def value(self) -> PartLayout:
        """The values: scales per token."""
        bits = self.format.value_bits
        groups = 0 if bits == 16 else self.page_size * (self.value_dim // self.format.group_size)
        return PartLayout(bits, self.page_size, self.value_dim, groups, self.element_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the page."""
        return self.key.nbytes + self.value.nbytes

    @property
    def bits_per_element(self) -> float:
        """Bits per element of keys and values, with scales, zeros and padding."""
        return 8 * self.nbytes / (self.page_size * (self.head_dim + self.value_dim))
