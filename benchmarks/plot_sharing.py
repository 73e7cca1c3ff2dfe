"""Measure and draw what sharing layers costs beside fewer bits: answers and KL by host bytes.

    arkcache share --model smollm2 --output found.json
    python benchmarks/plot_sharing.py --model smollm2 --found found.json --json smollm2.json
    python benchmarks/plot_sharing.py --from benchmarks/results/sharing/{shipped,smollm2}.json

What `arkcache share` found, layer by layer, every second layer beside it (groups of two as in
Cross-Layer Attention, untrained), and formats of pages are judged by other texts and questions than
those of the search.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import arkcache
from arkcache import CacheConfig
from arkcache.demo.machine import describe_machine, versions
from arkcache.demo.models import load_model
from arkcache.evaluation.judging import Judge, Judgement
from arkcache.evaluation.sharing import shared
from arkcache.memory import CacheShape, plan_memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sharing"
FORMATS = {"K8V8": (8, 8), "K8V4": (8, 4), "K4V4": (4, 4), "K2V2": (2, 2)}
CONTEXT = 131072
"""Tokens for which host bytes are planned, in bf16."""

KINDS = {
    "layers, unlike first": {"color": "#1f4e9c", "marker": "o"},
    "layers, alike first": {"color": "#e08214", "marker": "^", "linestyle": "--"},
    "every second layer": {"color": "#b2182b", "marker": "D", "linestyle": "none"},
    "fewer bits": {"color": "#222222", "marker": "s"},
}
"""How each kind of point is drawn."""


def main() -> None:
    """Measure one model, or draw what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--from", dest="source", type=Path, nargs="*", help="draw earlier runs, measure nothing"
    )
    parser.add_argument("--found", type=Path, nargs="*", default=[], help="of arkcache share")
    parser.add_argument("--json", type=Path, default=RESULTS / "shipped.json", help="to write")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/sharing.png")
    parser.add_argument("--model", help="a folder, an id or smollm2; left out, the shipped model")
    parser.add_argument("--task", help="asks; left out, facts of the shipped model, else magic")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text with questions")
    parser.add_argument("--texts", type=int, default=2, help="such texts, 8 questions each")
    arguments = parser.parse_args()
    if arguments.source is not None:
        draw([json.loads(path.read_text()) for path in arguments.source], arguments.out)
        return
    try:
        values = measure(arguments)
    except arkcache.ArkCacheError as error:
        sys.exit(f"plot_sharing: {error}")
    except KeyboardInterrupt:
        print("\nplot_sharing: interrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)
    arguments.json.write_text(json.dumps(values, indent=1) + "\n")
    print(arguments.json)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Judge what was found, and the formats."""
    device = torch.device("cpu")
    model, tokenizer = load_model(arguments.model, device, "float32")
    task = arguments.task or ("facts" if arguments.model is None else "magic")
    shape = shape_of(model)
    caches: list[tuple[str, str, CacheConfig]] = [("full", "full cache", config_of())]
    for path in arguments.found:
        caches += prefixes(json.loads(path.read_text()))
    halves = [layer - layer % 2 for layer in range(shape.num_layers)]
    caches.append(("every second layer", "half", config_of(layer_sources=halves)))
    for name, (key_bits, value_bits) in FORMATS.items():
        caches.append(("fewer bits", name, config_of(key_bits=key_bits, value_bits=value_bits)))
    judges = [
        Judge(model, tokenizer, task, arguments.length, 8, seed)
        for seed in range(1, arguments.texts + 1)
    ]
    rows = []
    for kind, name, config in caches:
        rows.append(row_of(kind, name, config, judges, shape))
        print(rows[-1], file=sys.stderr, flush=True)
    return {
        "command": "python benchmarks/plot_sharing.py " + " ".join(sys.argv[1:]),
        "model": arguments.model or "the shipped model",
        "task": task,
        "length": arguments.length,
        "num_questions": sum(len(judge.answers) for judge in judges),
        "num_layers": shape.num_layers,
        "rows": rows,
        "machine": describe_machine(device),
        "versions": versions(),
    }


def prefixes(found: dict[str, Any]) -> list[tuple[str, str, CacheConfig]]:
    """The caches of a search's JSON: with the first layer that was kept, with the first two ..."""
    alike = found["settings"].get("alike_first", False)
    kind = "layers, alike first" if alike else "layers, unlike first"
    sources, caches = list(range(len(found["layer_sources"]))), []
    for one in found["tries"]:
        if one["accepted"]:
            moved = shared(sources, one["layer"], one["source"])
            assert moved is not None
            sources = moved
            caches.append((kind, f"{len(caches) + 1}", config_of(layer_sources=sources)))
    return caches


def config_of(**settings: Any) -> CacheConfig:
    """Settings of a cache that attends everything."""
    return CacheConfig(budget_tokens=None, **settings)


def shape_of(model: Any) -> CacheShape:
    """Sizes of the model's layers, in bf16."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads
    return CacheShape(config.num_hidden_layers, heads, dim, dim, torch.bfloat16)


def row_of(
    kind: str, name: str, config: CacheConfig, judges: list[Judge], shape: CacheShape
) -> dict[str, Any]:
    """What a cache costs and keeps, the mean over all texts."""
    judged: list[Judgement] = [judge.of(config) for judge in judges]
    paged = CacheConfig(**(vars(config) | {"budget_tokens": 2048, "page_size": 32}))
    return {
        "kind": kind,
        "name": name,
        "layer_sources": config.layer_sources,
        "host_ratio": plan_memory(paged, shape, CONTEXT).host_ratio,
        "kl": sum(one.kl for one in judged) / len(judged),
        "text_kl": sum(one.text_kl for one in judged) / len(judged),
        "right": sum(one.right for one in judged),
    }


def draw(measured: list[dict[str, Any]], path: Path) -> None:
    """A row for each model; right answers, KL at answers and KL in texts over host bytes."""
    import matplotlib.pyplot as plt  # measuring needs none

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    size = 9.6, 3.2 * len(measured)
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            len(measured), 3, figsize=size, sharex=True, squeeze=False, layout="constrained"
        )
        for axes, values in zip(grid, measured, strict=True):
            named = f"{values['model']}, {values['num_layers']} layers\n"
            draw_panel(axes[0], values, "right", f"{named}right of {values['num_questions']}")
            draw_panel(axes[1], values, "kl", "KL at answers, nats")
            draw_panel(axes[2], values, "text_kl", "KL in real texts, nats")
        for panel in grid[-1]:
            panel.set_xlabel("host bytes, of 16 bits in all layers")
        handles = {label: line for line, label in all_labels(grid)}
        grid[0, 1].legend(handles.values(), handles.keys(), frameon=False, fontsize=7.5)
        figure.savefig(path, dpi=160)
        plt.close(figure)
    print(path)


def all_labels(grid: Any) -> list[tuple[Any, str]]:
    """The lines of all panels with their labels."""
    return [
        pair for panel in grid.flat for pair in zip(*panel.get_legend_handles_labels(), strict=True)
    ]


def draw_panel(panel: Axes, values: dict[str, Any], what: str, title: str) -> None:
    """One measure of one model."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    full, *rows = values["rows"]
    for kind, look in KINDS.items():
        own = [row for row in rows if row["kind"] == kind]
        if own:
            points = [row["host_ratio"] for row in own], [row[what] for row in own]
            panel.plot(*points, label=kind, linewidth=1, markersize=5, **look)
    for row in rows:
        if row["kind"] == "fewer bits":
            at = row["host_ratio"], row[what]
            panel.annotate(row["name"], at, (3, 5), textcoords="offset points", size=7)
    panel.set_title(title, loc="left", size=9.5, fontweight="bold")
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if what != "right":
        panel.set_yscale("log")
        return
    panel.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.axhline(full["right"], color="#555555", linewidth=0.8, linestyle=":")
    panel.annotate(
        "full cache", (1, full["right"]), (0, -10), textcoords="offset points", ha="right"
    )
    panel.set_ylim(-0.5, 1.15 * values["num_questions"])


if __name__ == "__main__":
    main()
