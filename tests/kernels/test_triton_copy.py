"""Copies between the tiers: byte for byte the reference's, and nothing else is touched."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from arkcache.errors import InputError
from arkcache.kernels import reference_copy
from arkcache.kernels.arguments import HostPages, Selection

pytest.importorskip("triton")
from arkcache.kernels import triton_copy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_SINKS = 2
NBYTES = [1, 7, 8, 24, 1001, 1600, 8200, 16384]
"""One word, a page of less than a chunk, of several, of a chunk and a bit; whole words and not."""


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


def host(tensor: Tensor) -> Tensor:
    """As the host tier holds it."""
    return tensor.pin_memory() if DEVICE == "cuda" else tensor


@dataclass
class Recall:
    """What `gather` is called with: `counts` pages for every row, out of `capacity`.

    What is chosen, of which `gather` reads nothing, is None.
    """

    counts: list[int]
    nbytes: int
    max_selected: int = 5
    capacity: int = 9
    num_places: int = 6

    def __post_init__(self) -> None:
        rows = len(self.counts)
        self.pieces = host(random_bytes(rows * self.capacity, self.nbytes))
        lines = torch.randperm(rows * self.capacity)
        self.located = lines.view(rows, self.capacity).to(DEVICE)
        pages = torch.randint(self.capacity, (rows, self.max_selected), dtype=torch.int32)
        places = torch.stack(
            [torch.randperm(self.num_places)[: self.max_selected] for _ in range(rows)]
        )
        for row, count in enumerate(self.counts):  # what lies behind the count must not be read
            pages[row, count:] = places[row, count:] = torch.iinfo(torch.int32).max
        self.pages, self.places = pages.to(DEVICE), places.int().to(DEVICE)
        self.num_missing = torch.tensor(self.counts, dtype=torch.int32, device=DEVICE)
        self.slots = random_bytes(rows, NUM_SINKS + self.num_places, self.nbytes).to(DEVICE)

    def arguments(self, **changed: Tensor) -> dict[str, Any]:
        """Of `gather`; `changed` by the names of tensors."""
        given = vars(self) | {"slots": self.slots.clone()} | changed
        host = HostPages(given["pieces"], given["located"])
        missing = (given["pages"], given["places"], given["num_missing"])
        return {
            "host": host,
            "selection": Selection(*missing, None, None),
            "slots": given["slots"],
            "num_sink_pages": NUM_SINKS,
        }


def assert_gathers_as_the_reference(recall: Recall) -> None:
    actual, expected = recall.arguments(), recall.arguments()
    triton_copy.gather(**actual)
    reference_copy.gather(**expected)
    assert torch.equal(actual["slots"], expected["slots"])


@pytest.mark.parametrize("nbytes", NBYTES)
def test_gather(nbytes: int) -> None:
    assert_gathers_as_the_reference(Recall([0, 5, 2], nbytes))


def test_gather_of_nothing_changes_nothing() -> None:
    recall = Recall([0, 0], 24)
    arguments = recall.arguments()
    triton_copy.gather(**arguments)
    assert torch.equal(arguments["slots"], recall.slots)


def test_gather_writes_only_the_places_it_was_given() -> None:
    recall = Recall([3, 1], 24)
    arguments = recall.arguments()
    triton_copy.gather(**arguments)
    for row, count in enumerate(recall.counts):
        written = {NUM_SINKS + place for place in recall.places[row, :count].tolist()}
        for slot in {*range(recall.slots.shape[1])} - written:
            assert torch.equal(arguments["slots"][row, slot], recall.slots[row, slot])


def test_gather_of_the_same_page_twice() -> None:
    recall = Recall([4], 40)
    recall.pages[0, :4] = 3
    assert_gathers_as_the_reference(recall)


def test_gather_of_lines_that_rows_share() -> None:
    recall = Recall([2, 3], 40)
    recall.located[:] = 4
    assert_gathers_as_the_reference(recall)


def test_gather_of_more_chunks_than_programs() -> None:
    max_selected = 2 * triton_copy.PROGRAMS_PER_ROW + 1
    assert_gathers_as_the_reference(
        Recall([max_selected, 1], 24, max_selected, capacity=max_selected, num_places=max_selected)
    )


def test_gather_splits_pages_over_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_copy, "BLOCK_WORDS", 2)  # a page of 5 words is 3 chunks
    assert_gathers_as_the_reference(Recall([5, 4, 0], 40))


@pytest.mark.parametrize("start", [1, 4, 8])
def test_pages_that_start_anywhere_in_memory(start: int) -> None:
    recall = Recall([3], 24)
    shifted = host(torch.zeros(recall.pieces.numel() + start, dtype=torch.uint8))[start:]
    recall.pieces = shifted.view_as(recall.pieces).copy_(recall.pieces)
    assert_gathers_as_the_reference(recall)


@pytest.mark.skipif(DEVICE == "cuda", reason="such memory is not pinned")
@pytest.mark.parametrize("offset", [0, 1])
def test_pages_in_a_buffer_that_starts_anywhere(offset: int) -> None:
    recall = Recall([3], 24)
    buffer = torch.frombuffer(bytearray(recall.pieces.numel() + 8), dtype=torch.uint8, offset=1)
    buffer = buffer[7 * offset :][: recall.pieces.numel()]
    recall.pieces = buffer.view_as(recall.pieces).copy_(recall.pieces)
    assert_gathers_as_the_reference(recall)


def test_nothing_to_copy_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("gather_kernel", "scatter_kernel", "gather_lines_kernel"):
        monkeypatch.setattr(triton_copy, kernel, None)
    recall = Recall([1], 24)
    names = ("located", "pages", "places", "num_missing", "slots")
    none = {name: getattr(recall, name)[:0] for name in names}
    triton_copy.gather(**recall.arguments(**none))
    triton_copy.gather(**Recall([0, 0], 24, max_selected=0).arguments())
    lines, slots = none["num_missing"], none["slots"]
    pages = HostPages(recall.pieces, none["located"])
    triton_copy.scatter(slots[:, 0], lines.long(), pages, lines)
    triton_copy.gather_lines(recall.pieces, lines.long(), slots[:, 0])


@pytest.mark.parametrize("nbytes", NBYTES)
@pytest.mark.parametrize("lines", [[3, -1, 0], [-1, -1, -1], [5, 1, 2]])
def test_scatter(nbytes: int, lines: list[int]) -> None:
    def arguments() -> dict[str, Any]:
        return {
            "packed": packed,
            "lines": torch.tensor(lines, device=DEVICE),
            "host": HostPages(host(pieces.clone()), located.clone()),
            "sealed": torch.tensor([1, 0, 4], dtype=torch.int32, device=DEVICE),
        }

    packed, pieces = random_bytes(3, nbytes).to(DEVICE), random_bytes(6, nbytes)
    located = torch.full((3, 4), -7, device=DEVICE)
    if lines[1] >= 0:  # a row that sealed nothing yet has no page to back up
        lines = [lines[0], -1, lines[2]]
    actual, expected = arguments(), arguments()
    triton_copy.scatter(**actual)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    reference_copy.scatter(**expected)
    for copied, wanted in zip(actual["host"], expected["host"], strict=True):
        assert torch.equal(copied, wanted)


def test_scatter_then_gather_is_the_same_page() -> None:
    recall = Recall([1, 1], 1600)
    packed = random_bytes(2, recall.nbytes).to(DEVICE)
    sealed = torch.tensor([4, 9], dtype=torch.int32, device=DEVICE)
    lines = torch.tensor([17, 3], device=DEVICE)
    triton_copy.scatter(packed, lines, HostPages(recall.pieces, recall.located), sealed)
    recall.pages[:, 0] = sealed - 1
    arguments = recall.arguments()
    triton_copy.gather(**arguments)
    for row, place in enumerate(recall.places[:, 0].tolist()):
        assert torch.equal(arguments["slots"][row, NUM_SINKS + place], packed[row])


@pytest.mark.parametrize("nbytes", NBYTES)
@pytest.mark.parametrize("lines", [[], [4], [5, 0, 0, 3, 5]])
def test_gather_lines(nbytes: int, lines: list[int]) -> None:
    pieces, numbers = host(random_bytes(6, nbytes)), torch.tensor(lines, device=DEVICE).long()
    actual, expected = (random_bytes(len(lines), nbytes).to(DEVICE) for _ in range(2))
    triton_copy.gather_lines(pieces, numbers, actual)
    reference_copy.gather_lines(pieces, numbers, expected)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("pieces", torch.zeros(18, 16, dtype=torch.uint8)),
        ("pieces", torch.zeros(18, 24, dtype=torch.int8)),
        ("pieces", torch.zeros(24, 18, dtype=torch.uint8).T),
        ("located", torch.zeros(2, 9, dtype=torch.int32)),
        ("pages", torch.zeros(2, 5, dtype=torch.int64)),
        ("places", torch.zeros(2, 4, dtype=torch.int32)),
        ("num_missing", torch.zeros(3, dtype=torch.int32)),
        ("slots", torch.zeros(2, 24, dtype=torch.uint8)),
    ],
)
def test_gather_refuses_what_does_not_fit(name: str, wrong: Tensor) -> None:
    arguments = Recall([1, 1], 24).arguments(**{name: wrong.to(DEVICE)})
    with pytest.raises(InputError, match=rf"{name} is .*expected .*, contiguous"):
        triton_copy.gather(**arguments)


def test_gather_refuses_more_sinks_than_slots() -> None:
    with pytest.raises(InputError, match="num_sink_pages=9: expected 0 to 8"):
        triton_copy.gather(**Recall([1], 24).arguments() | {"num_sink_pages": 9})


def test_scatter_and_gather_lines_refuse_what_does_not_fit() -> None:
    packed, pieces = torch.zeros(2, 24).byte(), torch.zeros(4, 24).byte()
    located, sealed = torch.zeros(2, 3).long(), torch.ones(2).int()
    host, other = HostPages(pieces, located), HostPages(pieces, located.repeat(2, 1))
    with pytest.raises(InputError, match=r"lines is torch\.int32"):
        triton_copy.scatter(packed, torch.zeros(2).int(), host, sealed)
    with pytest.raises(InputError, match=r"sealed is torch\.int64"):
        triton_copy.scatter(packed, torch.zeros(2).long(), host, sealed.long())
    with pytest.raises(InputError, match=r"host\.located is .*expected torch\.int64 \[2, any\]"):
        triton_copy.scatter(packed, torch.zeros(2).long(), other, sealed)
    with pytest.raises(InputError, match=r"expected torch\.int64 \[2\], contiguous"):
        triton_copy.gather_lines(pieces, torch.zeros(3).long(), packed)
