"""What an evaluation's pictures show, and that an earlier run can be read and drawn again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra plot is not installed")

from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from arkcache.errors import InputError
from arkcache.evaluation import plot_depth, plot_style, plots
from arkcache.evaluation.records import Asked, Case, Cost, Predicted, Result, Skipped, load

MIB = 2**20
ARK = "ark:index=tokens,page_size=8,estimate_pages=None,target_missed_mass=0.01"
KEPT = {"full": 10, "sinks": 2, ARK: 9}
"""Right answers of ten."""


def measured(tasks: tuple[str, ...] = ("magic", "facts"), model: str | None = None) -> Result:
    """Ten questions of each task, of the last of which methods keep one less."""
    result = Result({"model": model, "dtype": "float32", "device": "cpu", "seed": 0}, {}, {})
    for number, task in enumerate((*tasks, "language")):
        for method, right in KEPT.items():
            for budget, part in (("1/8", 8), ("1/4", 4)) if method != "full" else (("-", 1),):
                case = Case(task, 1024, method, budget)
                result.costs.append(Cost(case, 0, 1024 / part, 16 * MIB // part, 0, 1.0))
                if task == "language":
                    result.predicted.append(
                        Predicted(
                            case, 0, "help", [0.0 if part == 1 else 0.1 / part], [1.0], [True]
                        )
                    )
                    continue
                right_here = right - (number == len(tasks) - 1 and method != "full")
                result.asked += [
                    Asked(case, 0, f"{i}", ["7"], "7", float(i < right_here), i / 10)
                    for i in range(10)
                ]
    result.finished = True
    return result


def figure_of(result: Result, name: str) -> Figure:
    return dict(plots.figures(result))[name]


def test_a_panel_for_each_task_the_worst_first() -> None:
    figure = figure_of(measured(("facts", "magic")), "kept-1024")
    panels = [axes for axes in figure.axes if axes.axison]
    assert [panel.get_title(loc="left").split(":")[0] for panel in panels] == ["magic", "facts"]
    (ark,) = (
        drawn
        for drawn in panels[1].containers
        if isinstance(drawn, ErrorbarContainer) and drawn.get_label().startswith("ark")
    )
    line = ark.lines[0]
    assert list(line.get_xdata()) == [2, 4]  # MiB of an eighth and a quarter
    assert list(line.get_ydata()) == [0.9, 0.9]
    assert "The demonstration model, 1,024 tokens" in figure.get_suptitle()


def test_the_full_cache_does_not_diverge_from_itself() -> None:
    (panel,) = figure_of(measured(), "kl-1024").axes
    labels = [drawn.get_label() for drawn in panel.containers]
    assert len(labels) == len(KEPT) - 1
    assert "full cache" not in labels
    assert panel.get_yscale() == "log"


def test_methods_differ_in_more_than_colour() -> None:
    styles = plot_style.styles(["full", *(f"ark:page_size={2**i}" for i in range(12))])
    ways = {(style["marker"], style["linestyle"]) for style in styles.values()}
    assert len(ways) == len(styles) == 13


def test_depth_is_binned() -> None:
    figure = figure_of(measured(), "depth-facts-1024")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "0%-50%\nn=5",
        "50%-100%\nn=5",
    ]
    shown = axes.images[0].get_array()
    # Full cache, sinks twice, ark twice: of the first five questions, of the last five.
    assert shown.tolist() == [[1, 1], [0.2, 0], [0.2, 0], [1, 0.6], [1, 0.6]]


def test_where_no_question_is_there_is_no_score() -> None:
    case = Case("magic", 1024, "full", "-")
    asked = [Asked(case, 0, "?", ["7"], "7", 1.0, depth) for depth in (0.0, 1.0)]
    scores, counts = plot_depth.binned(asked, [case], 3)
    assert counts == [1, 0, 1]
    assert (scores[0, 0], scores[0, 2]) == (1, 1)
    assert math.isnan(scores[0, 1])


@pytest.mark.parametrize("num_tasks", [1, 7])
def test_pictures_are_written(num_tasks: int, tmp_path: Path) -> None:
    """Warnings are errors here: a layout that does not fit would be one."""
    tasks = tuple(f"niah_multikey_{i}" for i in range(num_tasks))
    paths = plots.draw(measured(tasks, "smollm2"), tmp_path / "new" / "pictures")
    names = {"kept-1024", "retention-1024", "kl-1024", *(f"depth-{task}-1024" for task in tasks)}
    assert {path.stem for path in paths} == names
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_is_nothing_drawn(tmp_path: Path) -> None:
    assert plots.draw(Result({"model": None}, {}, {}), tmp_path) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        plots.prepare(tmp_path / "file" / "pictures")


def test_a_result_comes_back_from_its_json(tmp_path: Path) -> None:
    result = measured()
    result.skipped.append(Skipped(Case("magic", 1024, "ark", "1/64"), "too small"))
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"figures": {}} | result.to_dict()))
    assert load(path) == result


@pytest.mark.parametrize("text", ["", "[]", '{"asked": []}', '{"asked": [{"case": {}}]}', "null"])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(InputError, match="expected what `arkcache eval --output` wrote"):
        load(path)
    with pytest.raises(InputError, match="cannot read"):
        load(tmp_path / "missing.json")
