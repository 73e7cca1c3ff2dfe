"""How the launchers of all GPU kernels are called where they are compiled ahead of time.

Shapes, dtypes and strides are those of a decode step; nothing reads what the tensors hold. Of an
integer, Triton compiles in only whether it is 1 or a multiple of 16, so one size stands for many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arkcache.formats import PRESETS, PageLayout
from arkcache.kernels import (
    triton_append,
    triton_attention,
    triton_copy,
    triton_score,
    triton_seal,
    triton_select,
)
from arkcache.kernels.arguments import (
    Counts,
    Estimates,
    HostPages,
    PageSet,
    Places,
    Scores,
    Selection,
    Summaries,
    Window,
)
from arkcache.kernels.torch_tokens import TokenIndex

PAGE_SIZE, NUM_SINK_PAGES, RECENT, WINDOW, INDEX_BITS = 32, 1, 128, 160, 2
ROWS, CAPACITY, NUM_PLACES = 8, 1024, 59
"""One sequence of 8 KV heads and 32768 tokens under the default settings, as the kernels count."""

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class _Shape:
    """What of a model and of its pages the kernels are compiled for."""

    head_dim: int = 128
    group: int = 4
    dtype: torch.dtype = torch.bfloat16
    preset: str = "K16V16"

    def __str__(self) -> str:
        return f"{self.preset} {self.model}"

    @property
    def model(self) -> str:
        return f"{NAMES[self.dtype]} d{self.head_dim} g{self.group}"

    @property
    def layout(self) -> PageLayout:
        return PageLayout(
            PRESETS[self.preset], PAGE_SIZE, self.head_dim, self.head_dim, self.dtype.itemsize
        )

    def states(self, *lead: int) -> Tensor:
        return torch.zeros((*lead, self.head_dim), dtype=self.dtype)

    def pages(self, *lead: int) -> Tensor:
        return torch.zeros((*lead, self.layout.nbytes), dtype=torch.uint8)

    def slots(self) -> Tensor:
        return self.pages(ROWS, NUM_SINK_PAGES + NUM_PLACES)

    def digests(self, index: str, capacity: int = CAPACITY) -> Tensor:
        if index == "tokens":
            digest = TokenIndex(PAGE_SIZE, self.head_dim, INDEX_BITS).digest
            nbytes = digest(self.states(1, 1, 1, PAGE_SIZE)).shape[-1]
            return torch.zeros((ROWS, capacity, nbytes), dtype=torch.uint8)
        return self.states(ROWS, capacity, 2)[..., : 1 + index.startswith("cuboid"), :].flatten(2)

    def means(self) -> Tensor:
        return self.states(ROWS, CAPACITY, 2).flatten(2)


@dataclass(frozen=True)
class Variant:
    """One way to call the launchers of a family, which is what their module is called after."""

    family: str
    name: str
    launch: Callable[[], None]


def _int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def _int64(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def _counts() -> Counts:
    return Counts(_int32(ROWS), _int32(ROWS))


def _copy(shape: _Shape) -> None:
    pieces, packed, slots = shape.pages(64), shape.pages(ROWS), shape.slots()
    located, wanted, count = _int64(ROWS, CAPACITY), _int32(ROWS, NUM_PLACES), _int32(ROWS)
    host, selection = HostPages(pieces, located), Selection(wanted, wanted, count, wanted, count)
    triton_copy.gather(host, selection, slots, num_sink_pages=NUM_SINK_PAGES)
    triton_copy.scatter(packed, _int64(ROWS), host, count)
    triton_copy.gather_lines(pieces, _int64(ROWS), packed)


def _append(shape: _Shape) -> None:
    token, window = shape.states(1, ROWS), shape.states(ROWS, WINDOW)
    triton_append.append(
        token, token, Window(window, window), _counts(), recent=RECENT, page_size=PAGE_SIZE
    )


def _seal(shape: _Shape, index: str, means: bool = False) -> None:
    summaries = Summaries(shape.digests(index), shape.means() if means else None)
    how: dict[str, Any] = {"summaries": summaries, "layout": shape.layout, "index": index}
    states = shape.states(ROWS, 64, PAGE_SIZE)
    triton_seal.seal_pages(states, states, states, shape.pages(ROWS, 64), first=0, **how)
    _seal_newest(shape, places=Places(_int32(ROWS, NUM_PLACES), _int32(ROWS)), **how)


def _seal_dense(shape: _Shape) -> None:
    """As layers do that attend everything."""
    how: dict[str, Any] = {"layout": shape.layout, "index": "cuboid-mean"}
    states = shape.states(ROWS, 64, PAGE_SIZE)
    triton_seal.seal_pages(states, states, states, shape.pages(ROWS, 64), first=0, **how)
    _seal_newest(shape, **how)


def _seal_newest(shape: _Shape, **how: Any) -> None:
    window = shape.states(ROWS, WINDOW)
    triton_seal.seal_newest(
        Window(window, window),
        window,
        _counts(),
        shape.slots(),
        shape.pages(ROWS),
        recent=RECENT,
        num_sink_pages=NUM_SINK_PAGES,
        **how,
    )


def _score(
    shape: _Shape,
    index: str,
    masked: bool = False,
    capacity: int = CAPACITY,
    softcap: float | None = None,
    biased: bool = False,
) -> None:
    query, sealed = shape.states(ROWS, shape.group), _int32(ROWS)
    digests = shape.digests(index, capacity)
    hidden = torch.zeros((ROWS, capacity - NUM_SINK_PAGES), dtype=torch.uint8) if masked else None
    how: dict[str, Any] = {
        "num_sink_pages": NUM_SINK_PAGES,
        "scale": shape.head_dim**-0.5,
        "hidden": hidden,
    }
    if index == "tokens":
        how |= {"page_size": PAGE_SIZE, "bits": INDEX_BITS, "softcap": softcap}
        if biased:
            how["bias"] = torch.zeros(ROWS, shape.group, capacity * PAGE_SIZE)
        triton_score.score_tokens(query, digests, sealed, **how)
    else:
        triton_score.score_volumes(query, digests, sealed, kind=index, **how)


def _select(shape: _Shape, reduction: str, capacity: int = CAPACITY, **options: Any) -> None:
    """options: as `triton_select.select` takes them."""
    pages = capacity - NUM_SINK_PAGES
    blocks = torch.zeros(ROWS, shape.group, -(-pages // triton_score.PAGES_PER_BLOCK))
    limits = _int32(ROWS)
    triton_select.select(
        Scores(torch.zeros(ROWS, shape.group, pages), blocks, blocks),
        _int32(ROWS),
        Places(_int32(ROWS, NUM_PLACES), limits),
        limits,
        torch.zeros((ROWS, NUM_PLACES), dtype=torch.int8),
        _int64(ROWS, 5),
        num_sink_pages=NUM_SINK_PAGES,
        max_selected=NUM_PLACES,
        reduction=reduction,
        **options,
    )


def _attention(
    shape: _Shape,
    pages: str = "chosen",
    extras: bool = False,
    apart: bool = False,
    estimates: bool = False,
    mass: bool = False,
) -> None:
    """`pages` are those chosen, all of them, or none: only the window is attended.

    apart: splits are merged by a launch of their own. estimates: of the pages that are not chosen.
    mass: the log mass of all is wanted.
    """
    chosen = (_int32(ROWS, NUM_PLACES), _int32(ROWS), _int32(ROWS, NUM_PLACES))
    page_sets = {"chosen": PageSet(shape.slots(), *chosen), "all": PageSet(shape.slots())}
    window = shape.states(ROWS, WINDOW)
    page_bias = torch.zeros(ROWS, shape.group, CAPACITY) if extras else None
    estimated = _int32(ROWS, CAPACITY - NUM_SINK_PAGES)
    triton_attention.paged_attention(
        shape.states(ROWS, shape.group),
        page_sets.get(pages),
        Window(window, window),
        _counts(),
        layout=shape.layout,
        num_sink_pages=NUM_SINK_PAGES,
        scale=shape.head_dim**-0.5,
        softcap=30.0 if extras else None,
        sink_logits=torch.zeros(ROWS, shape.group) if extras else None,
        bias=torch.zeros(ROWS, shape.group, CAPACITY * PAGE_SIZE) if extras else None,
        estimates=Estimates(shape.means(), estimated, page_bias) if estimates else None,
        log_mass=torch.zeros(ROWS, shape.group) if mass else None,
        tickets=None if apart else _int32(ROWS),
    )


def variants() -> Iterator[Variant]:
    """Every launcher, in the sizes and the formats that models come in."""
    plain = _Shape()
    quantised = [replace(plain, preset=preset) for preset in ("K8V4", "K4V2", "K2V2")]
    sizes = [
        _Shape(group=1, dtype=torch.float16),
        _Shape(head_dim=256),
        _Shape(head_dim=96, dtype=torch.float32),
        _Shape(group=7),
    ]
    yield from _attention_variants(plain, quantised, sizes)
    yield from _index_variants(plain, sizes)
    for shape in (plain, *quantised):
        for index in ("cuboid-mean", "tokens"):
            yield Variant("seal", f"{index} {shape}", partial(_seal, shape, index))
        yield Variant("seal", f"dense {shape}", partial(_seal_dense, shape))
        yield Variant("seal", f"means, tokens {shape}", partial(_seal, shape, "tokens", means=True))
    for shape in (plain, *sizes):
        yield Variant("append", shape.model, partial(_append, shape))
    for shape in (plain, *quantised):
        yield Variant("copy", f"{shape.layout.nbytes} bytes", partial(_copy, shape))


def _attention_variants(
    plain: _Shape, quantised: list[_Shape], sizes: list[_Shape]
) -> Iterator[Variant]:
    packed = [_Shape(head_dim=head_dim, preset="K4V2") for head_dim in (96, 256)]
    for shape in (plain, *quantised, *sizes, *packed):
        yield Variant("attention", str(shape), partial(_attention, shape))
        estimating = partial(_attention, shape, estimates=True)
        yield Variant("attention", f"{shape}, estimates", estimating)
    for shape in (plain, *quantised):
        mass = partial(_attention, shape, mass=True)
        yield Variant("attention", f"{shape}, mass", mass)
    yield Variant("attention", f"{plain}, all", partial(_attention, plain, "all"))
    yield Variant("attention", f"{plain}, window", partial(_attention, plain, "none"))
    for apart in (False, True):
        for estimates in (False, True):
            name = f"{plain}, extras{', estimates' * estimates}{', merged apart' * apart}"
            how = {"extras": True, "apart": apart, "estimates": estimates}
            yield Variant("attention", name, partial(_attention, plain, **how))
    yield Variant("attention", f"{plain}, merged apart", partial(_attention, plain, apart=True))


def _index_variants(plain: _Shape, sizes: list[_Shape]) -> Iterator[Variant]:
    for index in ("cuboid-mean", "tokens"):
        for shape in (plain, *sizes):
            yield Variant("score", f"{index} {shape.model}", partial(_score, shape, index))
        yield Variant("score", f"{index}, masked", partial(_score, plain, index, masked=True))
    for shape in (plain, *sizes):
        capped = partial(_score, shape, "tokens", softcap=30.0)
        yield Variant("score", f"tokens {shape.model}, softcap", capped)
    biased = partial(_score, plain, "tokens", softcap=30.0, biased=True)
    yield Variant("score", "tokens, softcap and bias", biased)
    for shape in (plain, *sizes):  # so many blocks that one warp each does, where it can
        many = partial(_score, shape, "tokens", capacity=2 * CAPACITY)
        yield Variant("score", f"tokens {shape.model}, many blocks", many)
    for reduction in ("softmax-mean", "raw-mean"):
        yield Variant("select", reduction, partial(_select, plain, reduction))
    guess = partial(_select, plain, "softmax-mean", speculative=True)
    yield Variant("select", "speculative", guess)
    for capacity in (128, 4096, 16384):
        many = partial(_select, plain, "softmax-mean", capacity)
        yield Variant("select", f"{capacity} pages", many)
        estimating = partial(_select, plain, "softmax-mean", capacity, num_estimated=None)
        yield Variant("select", f"{capacity} pages, estimates", estimating)
        target: dict[str, Any] = {
            "fixed": torch.zeros(ROWS, plain.group),
            "target": 0.1,
            "missed": torch.zeros((ROWS, triton_select.NUM_MISSED), dtype=torch.float64),
        }
        aiming = partial(_select, plain, "softmax-mean", capacity, **target)
        yield Variant("select", f"{capacity} pages, target", aiming)
