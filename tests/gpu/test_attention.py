"""Attention over pages on the real compiler: no worse than plain torch in the same dtype."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from arkcache.formats import PRESETS, PageLayout
from arkcache.kernels import reference_attention
from arkcache.kernels.arguments import Counts, PageSet, Window
from arkcache.kernels.torch_pages import PagePacker
from tests.gpu.card import Card
from tests.gpu.compare import Case, bound_of, error_share, on_both, run_cases, some
from tests.gpu.draws import BF16, FP16, FP32, NAMES, int32, randn

ATTENTIONS = [
    # dtype, format, page size, head dims, group, window
    (BF16, "K16V16", 32, (128, 128), 4, 160),
    (FP32, "K16V16", 5, (96, 64), 3, 15),
    (FP16, "K16V16", 1, (64, 64), 1, 63),
    (BF16, "K16V16", 32, (80, 80), 7, 96),
    (FP32, "K16V16", 32, (64, 64), 16, 160),
    (BF16, "K16V16", 16, (256, 256), 2, 144),
    (BF16, "K4V2", 32, (128, 128), 4, 160),
    (FP16, "K8V4", 5, (96, 96), 5, 15),
    (FP32, "K2V2", 32, (64, 64), 3, 96),
    (BF16, "K4V4", 1, (128, 64), 16, 7),
    (BF16, "K8V4", 32, (256, 256), 1, 64),
]

EXTRAS = ["", "softcap", "sinks", "bias", "everything", "window"]


def test_attention(card: Card) -> None:
    """Every format and shape; softcap, sink logits, bias; all pages; the window alone; nothing."""
    run_cases(card, some(card, attention_cases(card)))


def attention_cases(card: Card) -> list[Case]:
    """The sizes of a large model first."""
    return [
        Case(
            f"{'raw' if a[1] == 'K16V16' else 'packed'} {NAMES[a[0]]} {a[1:]} {extra}",
            lambda a=a, e=extra: _attention(card, *a, extra=e),
        )
        for number, a in enumerate(ATTENTIONS)
        for extra in ("", EXTRAS[1 + number % 5], EXTRAS[1 + (number + 2) % 5])
    ]


def _attention(
    card: Card,
    dtype: torch.dtype,
    preset: str,
    page_size: int,
    dims: tuple[int, int],
    group: int,
    window: int,
    extra: str,
) -> float:
    from arkcache.kernels import triton_attention

    layout = PageLayout(PRESETS[preset], page_size, *dims, dtype.itemsize)
    packer = PagePacker(layout, dtype)
    sealed, recent, num_sink_pages, places = [0, 1, 4, 9, 9, 0], [1, 3, 2, 0, window, 0], 1, 6
    rows, num_slots = len(sealed), 9 if extra == "everything" else num_sink_pages + places
    shape = (rows, num_slots, page_size)
    slots = packer.pack(
        randn(1, *shape, dims[0], dtype=dtype), randn(2, *shape, dims[1], dtype=dtype)
    )
    lengths = [s * page_size + min(r, window) for s, r in zip(sealed, recent, strict=True)]
    pages = PageSet(
        slots,
        torch.stack([torch.randperm(places)[:4] for _ in range(rows)]).int(),
        int32(0, 0, 2, 4, 3, 0),
        torch.stack([torch.randperm(8)[:places] + 1 for _ in range(rows)]).int(),
    )
    arguments: dict[str, Any] = {
        "query": randn(3, group, rows, dims[0], dtype=dtype).transpose(0, 1),
        "pages": pages,
        "window": Window(
            randn(4, rows, window, dims[0], dtype=dtype),
            randn(5, rows, window, dims[1], dtype=dtype),
        ),
        "counts": Counts(int32(*lengths), int32(*sealed)),
        "layout": layout,
        "num_sink_pages": num_sink_pages,
        "scale": dims[0] ** -0.5,
    }
    arguments |= _extra(extra, pages, group, max(lengths) + 1)
    pair = on_both(
        card, triton_attention.paged_attention, reference_attention.paged_attention, **arguments
    )
    plain = torch.stack([_plain_row(row, packer, arguments) for row in range(rows)])
    exact = pair.expected["returned"]
    return error_share("output", pair.actual["returned"].float(), exact, bound_of(plain, exact))


def _extra(extra: str, pages: PageSet, group: int, tokens: int) -> dict[str, Any]:
    rows = len(pages.slots)
    if extra == "softcap":
        return {"softcap": 2.0}
    if extra == "sinks":
        return {"sink_logits": randn(6, rows, group)}
    if extra == "bias":
        bias = randn(7, rows, 1, tokens)
        return {"bias": bias.masked_fill(bias > 1.5, -math.inf).expand(-1, group, -1)}
    if extra == "everything":
        return {"pages": PageSet(pages.slots), "num_sink_pages": 0}
    if extra == "window":  # a layer whose window is the whole context
        return {
            "pages": None,
            "num_sink_pages": 0,
            "counts": Counts(int32(0, 1, 2, 3, 5, 7), torch.zeros(rows, dtype=torch.int32)),
        }
    return {}


def _plain_row(row: int, packer: PagePacker, given: dict[str, Any]) -> Tensor:
    """A row as plain torch attends it [group, value_dim], each step rounded to the dtype."""
    size, held, attended = packer.layout.page_size, given["pages"], []
    window, counts = given["window"], given["counts"]
    if held is not None:
        attended = reference_attention._attended(row, held, counts.sealed, given["num_sink_pages"])
    length, first = int(counts.lengths[row]), int(counts.sealed[row]) * size
    recent = torch.arange(first, length)
    tokens = [torch.arange(page * size, page * size + size) for _, page in attended]
    key, value = (plane[row, recent % plane.shape[1]] for plane in window)
    if attended:
        pages = packer.unpack(held.slots[row, [slot for slot, _ in attended]])
        key = torch.cat((pages[0].flatten(0, 1), key))
        value = torch.cat((pages[1].flatten(0, 1), value))
    logits = given["query"][row] @ key.T * given["scale"]
    if "softcap" in given:
        logits = given["softcap"] * torch.tanh(logits / given["softcap"])
    if "bias" in given:
        logits = logits + given["bias"][row][:, torch.cat((*tokens, recent))].to(logits)
    if "sink_logits" in given:
        logits = torch.cat((logits, given["sink_logits"][row, :, None].to(logits)), dim=1)
    share = logits.softmax(dim=-1)[:, : len(key)] if logits.shape[1] else logits
    return (share @ value).nan_to_num(0.0)
