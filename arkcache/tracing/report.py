"""A trace as one HTML page that loads nothing: `page.html`, filled in.

All text is escaped, and the page's own policy forbids it to load or send anything.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from arkcache.sizes import bytes_text
from arkcache.tracing.figures import Figures, Series, figures_of, series_of
from arkcache.tracing.maps import Mass, maps_of, mass_of
from arkcache.tracing.trace import Trace

CALLED = {
    "model": "model",
    "question": "question",
    "answer": "answer",
    "files": "texts",
    "budget_tokens": "budget (tokens)",
    "backend": "runs on",
    "dtype": "dtype",
    "machine": "machine",
    "page_size": "tokens per page",
    "num_sink_pages": "sink pages",
    "num_recent_tokens": "recent tokens",
    "num_layers": "layers of the model",
    "date": "recorded",
}
"""What is shown of `Trace.about`, and under which name."""


def render(trace: Trace) -> str:
    """The page of a trace: HTML, below 2 MB."""
    figures, series, maps = figures_of(trace), series_of(trace), maps_of(trace)
    _, columns, rows = maps.cells.shape
    masses = mass_of(trace, maps.pages_per_row, rows)
    top = _top(series)
    data = {
        "layers": ["all layers (mean)", *map(str, trace.about["layers"])],
        "maps": {
            "columns": columns,
            "rows": rows,
            "steps_per_column": maps.steps_per_column,
            "pages_per_row": maps.pages_per_row,
            "cells": base64.b64encode(maps.cells.tobytes()).decode("ascii"),
        },
        "series": asdict(series),
        "latency_top": top,
        "every": trace.about["time_every"],
        "mass": [None if one is None else asdict(one) for one in (_mean(masses), *masses)],
    }
    title = f"Trace of {trace.about.get('model', 'a generation')}"
    texts = {
        "title": escape(title),
        "lead": escape(_lead(trace, figures)),
        "figures": _terms(_cards(trace, figures)),
        "about": _listed(trace),
        "recalled_word": escape(_recalled_word(trace)),
        "map_caption": escape(_map_caption(trace, maps.steps_per_column, maps.pages_per_row)),
        "moves_caption": escape(_moves_caption(trace)),
        "latency_caption": escape(_latency_caption(trace, series, top)),
        "mass_caption": escape(_mass_caption(trace)),
        "data": _as_script(data),
    }
    page = files("arkcache.tracing").joinpath("page.html").read_text(encoding="utf-8")
    # At once, so that nothing which is put in is looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: texts[found[1]], page)


def _as_script(data: dict[str, Any]) -> str:
    """JSON that ends no script and begins no tag."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _is_on_cpu(trace: Trace) -> bool:
    return bool(trace.about.get("backend") == "numba")


def _recalled_word(trace: Trace) -> str:
    return "not read by the step before" if _is_on_cpu(trace) else "recalled from the host"


# -- figures --------------------------------------------------------------------------------------


def _lead(trace: Trace, figures: Figures) -> str:
    layers = len(trace.about["layers"])
    lead = f"{figures.num_steps:,} decode steps of {layers} layers that select pages."
    if figures.num_forgotten:
        lead += f" {figures.num_forgotten:,} earlier steps were recorded and are not kept."
    return lead


def _cards(trace: Trace, figures: Figures) -> list[tuple[str, str]]:
    return [
        ("decode steps", f"{figures.num_steps:,}"),
        ("tokens held", f"{figures.held_tokens:,.0f}"),
        ("budget, tokens", _budget(trace)),
        ("pages attended", f"{figures.page_share:.1%}"),
        ("hit rate", f"{figures.hit_rate:.1%}"),
        (
            "read anew per step" if _is_on_cpu(trace) else "recalled per step",
            bytes_text(figures.bytes_per_step),
        ),
        ("latency, median", _in_ms(figures.latency_median_ms)),
        ("latency, p95", _in_ms(figures.latency_p95_ms)),
    ]


def _budget(trace: Trace) -> str:
    budget = trace.about.get("budget_tokens")
    return f"{budget:,}" if isinstance(budget, int) else "by layer" if budget else "unknown"


def _in_ms(time: float | None) -> str:
    return "unknown" if time is None else f"{time:,.1f} ms"


def _terms(pairs: list[tuple[str, str]]) -> str:
    return "\n".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(said)}</dd></div>" for term, said in pairs
    )


def _listed(trace: Trace) -> str:
    about = trace.about
    said = [(name, about[key]) for key, name in CALLED.items() if about.get(key) is not None]
    return "\n".join(f"<dt>{escape(n)}</dt><dd>{escape(_plain(value))}</dd>" for n, value in said)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


# -- a sentence under each chart ------------------------------------------------------------------


def _map_caption(trace: Trace, steps: int, pages: int) -> str:
    size, heads = trace.about.get("page_size"), "the KV heads"
    return (
        f"Each column is {_of(steps, 'step')}, each row {_of(pages, 'page')} of {size} tokens, the "
        f"oldest at the bottom. The stronger the colour, the more of {heads} attended these pages; "
        "the more orange, the more of them had to come back first. Pages of the recent window are "
        "not sealed yet and not shown; the sinks at the bottom are always attended."
    )


def _of(count: int, thing: str) -> str:
    return f"one {thing}" if count == 1 else f"{count} {thing}s"


def _moves_caption(trace: Trace) -> str:
    how = (
        "On a CPU pages are read where they lie: recalled are those that the step before did not "
        "read, evicted those that this one reads no more."
        if _is_on_cpu(trace)
        else "Recalled pages were copied from the host tier, evicted ones made room for them; the "
        "host tier keeps them."
    )
    return (
        "Pages of one KV head, all layers together: recalled above the line, evicted below. Tall "
        f"bars are steps whose queries looked elsewhere than the ones before. {how}"
    )


def _latency_caption(trace: Trace, series: Series, top: float) -> str:
    text = "The line is every step's time until the next one began, with all that the model does. "
    every = trace.about["time_every"]
    if any(time is not None for time in series.phases["score"]):
        text += (
            f"The bars are one step in {every}, in which score, select, recall and attend ran one "
            "after another to be timed, all layers together; the grey rest is the model itself."
        )
    else:
        text += "The bars are attention as a whole, which was not timed in parts."
    if _is_on_cpu(trace):
        text += " Nothing is copied on a CPU, so that recall takes no time of its own."
    above = sum(time is not None and time > top for time in series.latency)
    return text + (f" {above} steps took longer than the axis reaches." if above else "")


def _mass_caption(trace: Trace) -> str:
    return (
        "Which share of a step's attention each run of pages received, on a logarithmic axis, the "
        "mean over KV heads and the steps that were looked at "
        f"(one in {trace.about['mass_every']} of each layer). Shares are of what the step "
        "attended: pages that were not selected have none."
    )


# -- what the charts need -------------------------------------------------------------------------


def _top(series: Series) -> float:
    """Where the axis of latencies ends: beyond all but the slowest steps."""
    known = [time for time in (*series.latency, *series.attention) if time is not None]
    if not known:
        return 1.0
    return float(min(max(known), 1.3 * np.percentile(known, 97))) * 1.05 or 1.0


def _mean(masses: list[Mass | None]) -> Mass | None:
    """Of all layers that were looked at."""
    own = [mass for mass in masses if mass is not None]
    if not own:
        return None
    pages = np.mean([mass.pages for mass in own], axis=0)
    return Mass(
        sum(mass.num_samples for mass in own),
        float(np.mean([mass.sinks for mass in own])),
        float(np.mean([mass.window for mass in own])),
        [round(share, 7) for share in pages.tolist()],
    )
