"""The obvious version of `arkcache.kernels.triton_copy`: same signatures, one page at a time."""

from __future__ import annotations

from torch import Tensor


def gather(
    pieces: Tensor,
    located: Tensor,
    pages: Tensor,
    places: Tensor,
    counts: Tensor,
    slots: Tensor,
    *,
    num_sink_pages: int,
) -> None:
    """Recall counts[r] pages per row from the host tier into the slots of their places."""
    for row, count in enumerate(counts.tolist()):
        for page, place in zip(
            pages[row, :count].tolist(), places[row, :count].tolist(), strict=True
        ):
            slots[row, num_sink_pages + place] = pieces[int(located[row, page])].to(slots.device)


def scatter(packed: Tensor, lines: Tensor, pieces: Tensor, located: Tensor, sealed: Tensor) -> None:
    """Back up each row's newest sealed page in line lines[r], unless that is negative."""
    for row, line in enumerate(lines.tolist()):
        if line >= 0:
            pieces[line] = packed[row].to(pieces.device)
            located[row, int(sealed[row]) - 1] = line


def gather_lines(pieces: Tensor, lines: Tensor, target: Tensor) -> None:
    """Copy the given lines of the host tier, in their order."""
    for entry, line in enumerate(lines.tolist()):
        target[entry] = pieces[line].to(target.device)
