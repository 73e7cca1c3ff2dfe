"""What a search for layers that may share came to, as a table."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from arkcache.evaluation.judging import Judgement
from arkcache.evaluation.sharing import Found


def render(found: Found) -> RenderableType:
    """The pairs that were tried, and the setting that has the layers share."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("layer")
    for column in ("attends", "distance", "KL at answers", "KL in texts", "right"):
        table.add_column(column, justify="right")
    table.add_column("")
    if found.alone is not None:
        table.add_row("all", "own", "", *_cells(found.alone, found.num_questions), "")
    for one in found.tries:
        cells = _cells(one.judgement, found.num_questions)
        kept = "kept" if one.accepted else ""
        table.add_row(str(one.layer), str(one.source), f"{one.distance:.3g}", *cells, kept)
    return Group(table, Padding(Text(_summary(found)), (0, 1, 1, 0)))


def _cells(judged: Judgement, num_questions: int) -> list[str]:
    return [f"{judged.kl:.4f}", f"{judged.text_kl:.4f}", f"{judged.right} of {num_questions}"]


def _summary(found: Found) -> str:
    """What was found, and how to use it."""
    layers, most = len(found.layer_sources), found.settings["most_kl"]
    lines = []
    if not found.finished:
        lines.append("Interrupted: the search was not over.")
    if found.num_shared < found.wanted:
        lines.append(
            f"{found.num_shared} of {found.wanted} layers wanted were found within {most} nats in "
            f"{len(found.tries)} tries."
        )
    if found.num_shared == 0:
        return "\n".join([*lines, "No layer is to share."])
    return "\n".join(
        [
            *lines,
            f"{found.num_shared} of {layers} layers store nothing: the cache takes "
            f"{(layers - found.num_shared) / layers:.0%} of the bytes.",
            f"--set 'layer_sources={found.layer_sources}'",
        ]
    )
