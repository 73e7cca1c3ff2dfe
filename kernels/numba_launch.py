"""Launches decode steps on a CPU: fills in the record of a step, and runs it on torch's threads.

A second pool of threads would fight with torch's over the cores, so the compiled task is handed to
torch's `parallel_for`, which its stable C interface exports since torch 2.10.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from operator import is_
from pathlib import Path
from struct import Struct
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc, types
from numba.core.caching import FunctionCache
from numpy.typing import NDArray
from torch import Tensor

from arkcache.errors import InputError
from arkcache.kernels.numba_compile import own_cache
from arkcache.kernels.numba_record import (
    ATTEND,
    ATTEND_ROWS,
    MERGE,
    NUM_COUNTERS,
    SCORE,
    SCORE_ROWS,
    SEAL,
    SELECT,
    STEP,
    WHOLE_ROWS,
    WRITE,
)
from arkcache.kernels.numba_score import BLOCK
from arkcache.kernels.numba_step import run

logger = logging.getLogger("arkcache")

Ids = NDArray[np.int64]
Array = NDArray[Any]

FEW_ROWS = 4
"""With fewer rows than this for each thread, and not as many for each, pages are shared out: a
thread with one row more than the others would have them wait for a quarter of the step or more."""

SLOW_SECONDS = 2.0
"""After so long it is said what one waits for; a kernel that was kept is read in a tenth of it."""


# -- the compiled task ----------------------------------------------------------------------------


def _run_fp32(begin: Any, end: Any, step: Any) -> None:
    one = carray(step, (1,), STEP)[0]
    run(one, begin, end, np.empty(0, np.float32), np.empty(0, np.int16))


def _run_fp16(begin: Any, end: Any, step: Any) -> None:
    one = carray(step, (1,), STEP)[0]
    run(one, begin, end, np.empty(0, np.int16), np.empty(0, np.int16))


def _run_bf16(begin: Any, end: Any, step: Any) -> None:
    one = carray(step, (1,), STEP)[0]
    run(one, begin, end, np.empty(0, np.uint16), np.empty(0, np.uint16))


TASKS: dict[torch.dtype, Callable[[Any, Any, Any], None]] = {
    torch.float32: _run_fp32,
    torch.float16: _run_fp16,
    torch.bfloat16: _run_bf16,
}

_compiling = threading.Lock()


def task_of(dtype: torch.dtype) -> int:
    """The address of the task for models of a dtype, which is compiled if it has not been."""
    with _compiling:
        return int(_compiled(dtype).address)


@functools.cache
def _compiled(dtype: torch.dtype) -> Any:
    start = perf_counter()
    waiting = threading.Timer(SLOW_SECONDS, _announce, [str(dtype).removeprefix("torch.")])
    waiting.daemon = True
    waiting.start()
    try:
        with own_cache() as kept:
            return cfunc(
                types.void(types.int64, types.int64, types.voidptr),
                cache=kept,
                error_model="numpy",
            )(TASKS[dtype])
    finally:
        waiting.cancel()
        logger.debug("CPU kernels for %s were there after %.1f s", dtype, perf_counter() - start)


def _announce(name: str) -> None:
    logger.warning("compiling CPU kernels for %s: about a minute, once on this machine", name)


def compile_all() -> None:
    """Compile for all dtypes, side by side: before a test run, or into an image of a container.

    python -c "from arkcache.kernels.numba_launch import compile_all; compile_all()"
    """
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(task_of, TASKS))


def kept_dtypes() -> list[str]:
    """The dtypes whose task was compiled by an earlier run and is kept: to be had at once."""
    found = []
    with own_cache() as kept:
        for dtype, task in TASKS.items() if kept else ():
            folder = Path(FunctionCache(task).cache_path)
            if any(folder.glob(f"*.{task.__name__}-*.nbc")):
                found.append(str(dtype).removeprefix("torch."))
    return found


_Task = ctypes.PYFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
"""A task as a function, for what is done sooner than another thread is awake."""


@functools.cache
def _parallel_for() -> Any:
    folder = Path(torch.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("*torch_cpu.*"))))
    function = library.torch_parallel_for
    function.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2
    function.restype = ctypes.c_int32
    return function


# -- the record -----------------------------------------------------------------------------------


AT = {name: field[1] // 8 for name, field in (STEP.fields or {}).items()}
"""Which of the words of a record is which entry; scale and softcap are half words."""

PACK_STEP = Struct("=5q2f").pack_into
"""Writes `PER_STEP`: at once, because a step's own memory has left the caches since the last."""


class Scratch:
    """Memory that the layers of a cache use one after another, and that means nothing between.

    Copies and pickles of it are empty.

    Attributes:
        generation: grows when anything moves.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}
        self.generation = 0

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        return Scratch, ()

    def array(self, name: str) -> Array:
        """The array of this name."""
        return self._arrays[name]

    def at_least(self, name: str, size: int, dtype: Any) -> int:
        """The address of an array of this name, with room for `size` elements."""
        held = self._arrays.get(name)
        if held is None or len(held) < size:
            held = self._arrays[name] = np.zeros(size + size // 8, dtype)
            self.generation += 1
        return address_of(held)


def address_of(array: Array) -> int:
    """Where a numpy array lies."""
    return int(array.__array_interface__["data"][0])


class Counts(NamedTuple):
    """int64: tokens and sealed pages of each sequence [batch], pages that a row may select [rows],
    and which piece of the host tier has which handle [handles]."""

    lengths: Ids
    sealed: Ids
    budgets: Ids
    positions: Ids


class Digests(NamedTuple):
    """Digests of all pages, in one run of bytes for each row (see `numba_score`); `num_pages`
    pages of a row have room there."""

    data: Tensor
    num_pages: int


class Lists(NamedTuple):
    """What a step leaves behind, int64: pages that each row attends [rows, max_pages], how many
    [rows], and counters [rows, NUM_COUNTERS] (`numba_step.ATTENDED` and so on)."""

    pages: Ids
    num_pages: Ids
    counters: Ids


class Query(NamedTuple):
    """What attends: query and index_query [batch, heads, 1, head_dim], of the dtype of the keys;
    fp32 sink_logits [heads]; bias [rows, lanes, tokens], added to the logits by token number;
    hidden uint8 [rows, pages], which pages behind the sinks are not to be chosen."""

    query: Tensor
    index_query: Tensor
    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    bias: Tensor | None = None
    hidden: Tensor | None = None


class DecodeStep:
    """The steps of one layer.

    Args:
        dtype: of keys and values.
        scratch: of the cache.
        sizes: those of `numba_step.SIZES` that do not change from step to step.
    """

    def __init__(self, dtype: torch.dtype, scratch: Scratch, **sizes: int) -> None:
        self._dtype, self._scratch, self._sizes = dtype, scratch, sizes
        # Entry by entry, which costs a tenth of the fields of a record.
        self._record = np.zeros(STEP.itemsize // 8, np.int64)
        self._buffer = self._record.data
        self._address = address_of(self._record)
        self._task, self._parallel_for = task_of(dtype), _parallel_for()
        self._alone = _Task(self._task)
        self._extra: tuple[Tensor | None, ...] | None = None
        self._counts: Counts | None = None
        self._set(**sizes)

    def _set(self, **entries: int) -> None:
        for name, number in entries.items():
            self._record[AT[name]] = number

    def bind(
        self, window: tuple[Tensor, Tensor], digests: Digests, handles: Ids, lists: Lists
    ) -> None:
        """Take over what changes only when a page is sealed, after checking that it fits.

        window: keys and values [batch, kv_heads, window_tokens, dim]; handles int64 [batch, pages]:
        the piece of the host tier that holds each page. Raises `InputError`.
        """
        sizes = self._sizes
        batch, heads = sizes["batch"], sizes["kv_heads"]
        rows, window_tokens, max_pages = batch * heads, window[0].shape[2], lists.pages.shape[1]
        for plane, name in zip(window, ("key", "value"), strict=True):
            dim = sizes["head_dim" if name == "key" else "value_dim"]
            _require(f"window {name}", plane, (batch, heads, window_tokens, dim), self._dtype)
        _require("digests", digests.data, tuple(digests.data.shape), digests.data.dtype)
        self._set(
            window_tokens=window_tokens,
            window_key=window[0].data_ptr(),
            window_value=window[1].data_ptr(),
            digests=digests.data.data_ptr(),
            digest_bytes=digests.data.nbytes // rows,
            page_capacity=-(-max(digests.num_pages, 1) // BLOCK) * BLOCK,
            handle_stride=handles.shape[1],
            handles=_address("handles", handles, (batch, handles.shape[1])),
            max_pages=max_pages,
            pages=_address("pages", lists.pages, (rows, max_pages)),
            num_pages=_address("num_pages", lists.num_pages, (rows,)),
            counters=_address("counters", lists.counters, (rows, NUM_COUNTERS)),
        )
        self._num_tokens = max_pages * sizes["page_size"] + window_tokens
        self._held = (window, digests, handles, lists)  # alive while they are pointed at
        self._counts, self._shared_out = None, (0, 0)

    def write(self, key: Tensor, value: Tensor, counts: Counts) -> None:
        """Write a token [batch, kv_heads, 1, dim] into the windows, behind those that are counted,
        and count it."""
        record, key, value = self._record, key.contiguous(), value.contiguous()
        record[AT["new_key"]], record[AT["new_value"]] = key.data_ptr(), value.data_ptr()
        self._count(counts)
        self._run_alone(WRITE)

    def seal(self, pieces: Tensor) -> None:
        """Seal the pages that have become full with the tokens that are counted now, and count
        them: pieces are there for them, with their handles, and digests have room."""
        self._record[AT["pieces"]] = pieces.data_ptr()
        self._run_alone(SEAL)

    def attend(
        self,
        query: Query,
        pieces: Tensor,
        counts: Counts,
        lap: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Run a step: [batch, heads, 1, value_dim]. pieces: uint8, the host tier.

        lap: told after each part, `SCORE`, `SELECT` and `ATTEND`, which are run one by one for it.
        """
        batch, heads = self._sizes["batch"], self._sizes["kv_heads"] * self._sizes["group"]
        output = query.query.new_empty((batch, heads, 1, self._sizes["value_dim"]))
        self._fill(query, pieces, counts, output.data_ptr())
        self._launch(batch * self._sizes["kv_heads"], lap)
        return output

    def _fill(self, query: Query, pieces: Tensor, counts: Counts, output: int) -> None:
        """Tell the step what it attends, and where its output is to go."""
        states = index = query.query.contiguous()
        if query.index_query is not query.query:
            index = query.index_query.contiguous()
        self._inputs = (states, index)  # alive until the step is over
        addresses = (output, states.data_ptr(), index.data_ptr(), pieces.data_ptr())
        PACK_STEP(self._buffer, 0, WHOLE_ROWS, *addresses, query.scale, query.softcap or 0.0)
        is_plain = query.sink_logits is None and query.bias is None and query.hidden is None
        if not is_plain or self._extra is not None:
            self._set_extra(query.sink_logits, query.bias, query.hidden)
        self._count(counts)

    def ratings(self, query: Query, pieces: Tensor, counts: Counts, num_pages: int) -> Tensor:
        """What pages would be chosen by: fp32 [rows, num_pages], counted from the first behind the
        sinks, undefined where a row has fewer.

        counts.budgets is to be -1. The lists that the step is bound to change.
        """
        rows = self._sizes["batch"] * self._sizes["kv_heads"]
        self._fill(query, pieces, counts, 0)
        threads = torch.get_num_threads()
        self._share_out(rows, threads, max(rows, threads))
        for phase in (SCORE, SELECT):
            self._run(phase, threads)
        rating = self._scratch.array("rating")[: rows * int(self._record[AT["page_capacity"]])]
        return torch.from_numpy(rating.reshape(rows, -1)[:, :num_pages].copy())

    def _set_extra(
        self, sink_logits: Tensor | None, bias: Tensor | None, hidden: Tensor | None
    ) -> None:
        sink_logits, bias, hidden = (
            None if tensor is None else tensor.contiguous()
            for tensor in (sink_logits, bias, hidden)
        )
        self._extra = (sink_logits, bias, hidden)  # alive until the next step
        if not any(tensor is not None for tensor in self._extra):
            self._extra = None
        self._set(
            sink_logits=0 if sink_logits is None else sink_logits.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            bias_tokens=0 if bias is None else bias.shape[2],
            hidden=0 if hidden is None else hidden.data_ptr(),
            hidden_stride=0 if hidden is None else hidden.shape[1],
        )

    def _count(self, counts: Counts) -> None:
        """Have these counts, which change in place, or are other arrays now."""
        if self._counts is not None and all(map(is_, counts, self._counts)):
            return
        batch, rows = self._sizes["batch"], self._sizes["batch"] * self._sizes["kv_heads"]
        self._set(
            lengths=_address("lengths", counts.lengths, (batch,)),
            sealed=_address("sealed", counts.sealed, (batch,)),
            budgets=_address("budgets", counts.budgets, (rows,)),
            positions=_address("positions", counts.positions, (len(counts.positions),)),
        )
        self._counts = counts

    def _launch(self, rows: int, lap: Callable[[int], None] | None) -> None:
        threads = torch.get_num_threads()
        whole_rows = threads == 1 or rows % threads == 0 or rows >= FEW_ROWS * threads
        if lap is not None:
            self._launch_parts(rows, threads, whole_rows, lap)
            return
        if (threads, self._scratch.generation) != self._shared_out:
            self._share_out(rows, threads, threads if whole_rows else max(rows, threads))
        for phase in (WHOLE_ROWS,) if whole_rows else (SCORE, SELECT, ATTEND):
            self._run(phase, threads)
        if not whole_rows:
            self._run_alone(MERGE)

    def _launch_parts(
        self, rows: int, threads: int, whole_rows: bool, lap: Callable[[int], None]
    ) -> None:
        """The same step in parts, to the bit."""
        self._share_out(rows, threads, max(rows, threads))
        score, attend = (SCORE_ROWS, ATTEND_ROWS) if whole_rows else (SCORE, ATTEND)
        self._run(score, threads)
        lap(SCORE)
        self._run(SELECT, threads)
        lap(SELECT)
        self._run(attend, threads)
        if not whole_rows:
            self._run_alone(MERGE)
        lap(ATTEND)

    def _run(self, phase: int, shares: int) -> None:
        self._record[AT["phase"]] = phase
        self._parallel_for(0, shares, 1, self._task, self._address)

    def _run_alone(self, phase: int) -> None:
        self._record[AT["phase"]] = phase
        self._alone(0, 1, self._address)

    def _share_out(self, rows: int, threads: int, slots: int) -> None:
        """Have scratch for so many threads; `slots` rows are under way at a time."""
        record, sizes, scratch = self._record, self._sizes, self._scratch
        pages, lanes = int(record[AT["page_capacity"]]), sizes["lanes"]
        # Behind the logits of each thread some room, see `numba_step.attend_row`.
        tokens = self._num_tokens + 16 * (threads + 1)
        part = lanes * (sizes["value_dim"] + 2)
        for name, size, dtype in (
            ("score", slots * lanes * pages, np.float32),
            ("rating", slots * pages, np.float32),
            ("order", slots * pages, np.int32),
            ("chosen", slots * int(record[AT["max_pages"]]), np.int64),
            ("logits", slots * lanes * tokens, np.float32),
            ("parts", rows * threads * part, np.float32),
        ):
            record[AT[name]] = scratch.at_least(name, size, dtype)
        self._set(token_capacity=tokens, shares=threads)
        self._shared_out = (threads, scratch.generation)


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fits = tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.device.type == "cpu"
    if not fits or not tensor.is_contiguous():
        raise InputError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device} with strides "
            f"{tensor.stride()}: expected {dtype} {list(shape)} on the CPU, contiguous"
        )


def _address(name: str, array: Array, shape: tuple[int, ...]) -> int:
    if array.dtype != np.int64 or array.shape != shape or not array.flags.c_contiguous:
        raise InputError(
            f"{name} is {array.dtype} {list(array.shape)}: expected int64 {list(shape)}, contiguous"
        )
    return address_of(array)
