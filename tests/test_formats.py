"""The bytes of a page: what lies where, how much it takes, what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkcache.errors import ConfigError
from arkcache.formats import ALIGNMENT, BITS, PRESETS, PageFormat, PageLayout


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 160, 192, 224, 256])
@pytest.mark.parametrize(("bits", "limit"), [(2, 3.0), (4, 5.0), (8, 9.0)])
def test_scales_and_zeros_take_one_bit_per_element(bits: int, limit: float, dim: int) -> None:
    """At groups of 32 and pages of 32: 32 bits of scale and zero for 32 elements."""
    assert PageLayout(PageFormat(bits, bits, 32), 32, dim, dim, 2).bits_per_element <= limit


def test_bytes_by_hand() -> None:
    """32 tokens of 64: a scale and a zero for 64 channels, or for 2 groups of 32 tokens."""
    layout = PageLayout(PageFormat(4, 2, 32), 32, 64, 64, 2)
    assert layout.key.nbytes == 64 * 4 + 32 * 32
    assert layout.value.nbytes == 32 * 2 * 4 + 32 * 16
    assert layout.nbytes == 2048
    assert layout.bits_per_element == 4.0


def test_bytes_of_odd_dims_by_hand() -> None:
    """7 tokens: 33 channels of 2 bits are 9 bytes; 22 of 4 bits are 11, in 2 groups."""
    layout = PageLayout(PageFormat(2, 4, 11), 7, 33, 22, 2)
    assert (layout.key.plane_dim, layout.value.plane_dim) == (9, 11)
    assert layout.key.nbytes == 208  # 33 * 4 + 7 * 9 = 195
    assert layout.value.nbytes == 144  # 7 * 2 * 4 + 7 * 11 = 133


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_raw_pages_take_what_they_took(element_bytes: int) -> None:
    layout = PageLayout(PageFormat(), 7, 33, 22, element_bytes)
    assert layout.nbytes == 7 * (33 + 22) * element_bytes
    assert layout.bits_per_element == 8 * element_bytes
    assert layout.key.meta_bytes == layout.value.meta_bytes == 0


@given(
    key_bits=st.sampled_from(BITS),
    value_bits=st.sampled_from(BITS),
    page_size=st.integers(1, 40),
    head_dim=st.integers(1, 300),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 64),
    element_bytes=st.sampled_from([2, 4]),
)
def test_parts_hold_their_codes_and_are_aligned(
    key_bits: int,
    value_bits: int,
    page_size: int,
    head_dim: int,
    groups: int,
    group_size: int,
    element_bytes: int,
) -> None:
    page_format = PageFormat(key_bits, value_bits, group_size)
    layout = PageLayout(page_format, page_size, head_dim, groups * group_size, element_bytes)
    assert layout.nbytes == layout.key.nbytes + layout.value.nbytes
    assert layout.key.num_groups == (0 if key_bits == 16 else head_dim)
    assert layout.value.num_groups == (0 if value_bits == 16 else page_size * groups)
    for part in (layout.key, layout.value):
        if part.bits == 16:
            continue
        used = 4 * part.num_groups + page_size * part.plane_dim
        assert part.plane_dim * part.num_planes >= part.dim > (part.plane_dim - 1) * part.num_planes
        assert used <= part.nbytes < used + ALIGNMENT
        assert part.nbytes % ALIGNMENT == 0


def test_groups_must_divide_the_values() -> None:
    with pytest.raises(ConfigError) as refusal:
        PageLayout(PageFormat(16, 4, 32), 32, 64, 20, 2)
    assert str(refusal.value) == (
        "group_size=32 does not divide values of 20 elements: expected one of 1, 2, 4, 5, 10, 20"
    )


def test_groups_matter_to_quantised_values_only() -> None:
    assert PageLayout(PageFormat(2, 16, 32), 32, 45, 45, 2).value.nbytes == 32 * 45 * 2


def test_names() -> None:
    assert all(preset.name == name for name, preset in PRESETS.items())
    assert [name for name, preset in PRESETS.items() if preset.is_raw] == ["K16V16"]
    assert not PageFormat(16, 8).is_raw
    assert not PageFormat(8, 16).is_raw
