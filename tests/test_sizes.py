"""Bytes as people read and write them."""

import pytest

from arkcache import InputError
from arkcache.sizes import bytes_text, parse_bytes, unit_of


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (0.25, "0.2 B"),
        (1023, "1,023 B"),
        (1024, "1 KiB"),
        (1_500_000, "1.4 MiB"),
        (18 << 30, "18 GiB"),
        (3 << 40, "3 TiB"),
        (5 << 50, "5,120 TiB"),
    ],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize("count", [1, 1 << 10, 3 << 20, 7 << 30, 9 << 40])
def test_whole_units_are_read_back(count: int) -> None:
    assert parse_bytes(bytes_text(count)) == count


def test_the_unit_of_a_column() -> None:
    assert unit_of(1000**4) == ("GiB", 1 << 30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", 1), ("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5 kib", 1536), ("64 b", 64)],
)
def test_bytes_with_units(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "0", "0.1B", "2XB", "1 2"])
def test_bytes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="as in 2GiB"):
        parse_bytes(text)
