"""The obvious version of `arkcache.kernels.triton_copy`: same signatures, one page at a time."""

from __future__ import annotations

from torch import Tensor

from arkcache.kernels.arguments import HostPages, Selection


def gather(host: HostPages, selection: Selection, slots: Tensor, *, num_sink_pages: int) -> None:
    """Recall what is missing of a selection from the host tier into the slots of its places."""
    for row, count in enumerate(selection.num_missing.tolist()):
        for page, place in zip(
            selection.pages[row, :count].tolist(),
            selection.places[row, :count].tolist(),
            strict=True,
        ):
            line = int(host.located[row, page])
            slots[row, num_sink_pages + place] = host.pieces[line].to(slots.device)


def scatter(packed: Tensor, lines: Tensor, host: HostPages, sealed: Tensor) -> None:
    """Back up each row's newest sealed page in line lines[r], unless that is negative."""
    for row, line in enumerate(lines.tolist()):
        if line >= 0:
            host.pieces[line] = packed[row].to(host.pieces.device)
            host.located[row, int(sealed[row]) - 1] = line


def gather_lines(pieces: Tensor, lines: Tensor, target: Tensor) -> None:
    """Copy the given lines of the host tier, in their order."""
    for entry, line in enumerate(lines.tolist()):
        target[entry] = pieces[line].to(target.device)
