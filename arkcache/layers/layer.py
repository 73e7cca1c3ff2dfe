"""What a manager asks of every layer, and what a layer does where nothing else is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from arkcache.engines.capture import Capturable
from arkcache.engines.engine import Blocks, State
from arkcache.engines.missed import MissedLog
from arkcache.engines.step import Step
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.counts import Counters, LayerTokens
from arkcache.pages.index import PageIndex
from arkcache.stats import CacheStats
from arkcache.tiering.device import DeviceTier, Geometry
from arkcache.tiering.host import HostTier
from arkcache.tracing.recorder import LayerTrace


class Layer(ABC):
    """The cache of one attention layer.

    Args:
        geometry: sizes.

    Attributes:
        tokens: how many there are.
        counters: what steps did.
    """

    attends_everything = True
    """Whether a step of one token attends all tokens, whatever it is asked for."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.tokens = LayerTokens(geometry.batch)
        self.counters = Counters()

    # -- tokens -----------------------------------------------------------------------------------

    @property
    def takes_ragged(self) -> bool:
        """Whether one token may be appended to sequences of different lengths at once: kernels
        count for every row by itself."""
        return self.capturable is not None

    @property
    def capturable(self) -> Capturable | None:
        """What counts and launches the layer's steps in two halves; None where nothing does."""
        return None

    def append(self, seqs: slice, key: Tensor, value: Tensor) -> None:
        """Append tokens [seqs, kv_heads, new, dim] to sequences of equal length; one token to any,
        where the layer `takes_ragged`."""
        launcher = self.capturable
        if launcher is not None and key.shape[2] == 1:
            launcher.append_token(seqs, key, value)
            return
        self._join()  # before anything moves that other streams read
        self._append(seqs, key, value)
        if launcher is not None:
            launcher.counted(seqs)

    def append_next(self, _key: Tensor, _value: Tensor) -> bool:
        """Append a token [batch, kv_heads, 1, dim] to every sequence where writing it is all there
        is to do; False where there is more, and nothing was done."""
        return False

    @abstractmethod
    def _append(self, seqs: slice, key: Tensor, value: Tensor) -> None:
        """Append tokens [seqs, kv_heads, new, dim] to sequences of equal length."""

    def _join(self) -> None:
        """Have what follows wait for what other streams do for this layer."""
        if self.capturable is not None:
            self.capturable.join()

    @abstractmethod
    def attend_one(self, step: Step) -> Tensor:
        """Attend one new token [batch, heads, 1, value_dim]."""

    @abstractmethod
    def blocks(self) -> Blocks:
        """All tokens. A block may be overwritten when the next one is asked for."""

    def prompt_step(self, step: Step, _visible: Ids) -> Step:
        """See `Engine.prompt_step`."""
        return step

    def lost_pages(self, _lengths: Ids) -> Ids:
        """Pages that shortening every sequence to these lengths would have to bring back, and that
        are lost."""
        return np.zeros(0, dtype=np.int64)

    def crop(self, lengths: Ids) -> None:
        """Shorten every sequence to `lengths`; unsealed pages go back to the window, as they were
        kept: quantised pages do not regain what quantising took."""
        self._join()
        self._crop(lengths)
        self.tokens.replace(lengths)
        if self.capturable is not None:
            self.capturable.counted(slice(0, self.geometry.batch))

    def ready_to_crop(self, _lengths: Ids) -> None:  # noqa: B027
        """Raise `SessionError` where `crop` could not read what it must; nothing changes."""

    def name_of(self, _handle: int) -> str:
        """What an error calls a piece of the host tier; empty where it is none of this layer's."""
        return ""

    def _crop(self, _lengths: Ids) -> None:  # noqa: B027 - what is counted says what is held
        """Do what shortening every sequence takes, beside counting."""

    @abstractmethod
    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """Make sequence i what sequence `index[i]` was.

        device_tier: a new one, for as many sequences as `index` has; num_selected: pages that a
        step may select there, per KV head.
        """

    # -- what is written down, and read again -----------------------------------------------------

    @property
    def digest_kind(self) -> str:
        """See `Engine.digest_kind`; empty where no page is digested."""
        return ""

    def state(self) -> State:
        """What the layer holds, on the CPU: all that `restore` needs beside the host tier's bytes.

        Whole numbers are int64. Counters are no part of it.
        """
        self._join()
        columns = torch.tensor(self.tokens.columns)
        return {
            "columns": columns,
            "lengths": torch.from_numpy(self.tokens.lengths.copy()),
            **{name: plane.cpu().contiguous() for name, plane in self._state().items()},
        }

    @abstractmethod
    def _state(self) -> State:
        """What the layer holds beside counts of tokens, on any device."""

    def restore(self, state: State) -> None:
        """Hold what `state` says, in a layer that is empty and has as many sequences."""
        self._restore(state)
        self.tokens.columns = int(state["columns"])
        self.tokens.replace(state["lengths"].numpy())
        if self.capturable is not None:
            self.capturable.counted(slice(0, self.geometry.batch))

    @abstractmethod
    def _restore(self, state: State) -> None:
        """Hold it; counts of tokens come afterwards."""

    def demote(self) -> None:  # noqa: B027 - most layers have one format
        """Keep pages that were attended little in the coarse format, if there is one."""

    # -- pieces of the host tier: none, unless a layer keeps its pages there ---------------------

    def may_seal(self, _columns: int) -> bool:
        """Whether so many more columns may fill a page, of which pieces are needed. Costs nothing,
        as it is asked in every layer of every step."""
        return False

    def pieces_needed(self, _new_lengths: Ids) -> int:
        """Pieces of the host tier that growing to these lengths takes."""
        return 0

    def held_pieces(self) -> Ids:
        """Pieces of the host tier that the layer refers to, one entry per sequence and piece."""
        return np.zeros(0, dtype=np.int64)

    def move_pieces(self, _host: HostTier) -> None:  # noqa: B027
        """Follow the layer's pages into a tier that was extracted from the present one."""

    def release(self) -> None:  # noqa: B027
        """Free what the layer holds outside itself."""

    # -- to look at -------------------------------------------------------------------------------

    @abstractmethod
    def check(self) -> None:
        """Raise `IntegrityError` if the metadata contradicts itself or the tiers differ."""

    @abstractmethod
    def stats(self) -> CacheStats:
        """Counters and sizes; the device tier and the host tier are counted by the manager."""

    def rate_with(self, _make: Callable[[], PageIndex]) -> None:  # noqa: B027
        """Rate pages by another index from now on, if the layer selects any."""

    def page_tokens(self) -> Ids | None:
        """The token numbers of all sealed pages [batch, kv_heads, pages, page_size], undefined
        where a sequence has no such page; None where nothing is selected."""
        return None

    def ratings(self, _step: Step) -> Tensor | None:
        """What selects for a step: all selectable pages [rows, pages], the best the highest; None
        where nothing is selected, or where it cannot be looked at."""
        return None

    def time_parts(self, _step: Step) -> dict[str, float] | None:
        """Run a step in parts that are launched one by one: the seconds of each; None where a step
        has no parts."""
        return None

    def log_missed(self, _log: MissedLog) -> None:  # noqa: B027
        """Note what steps miss in this log from now on, if the layer can tell."""

    def trace(self, _trace: LayerTrace | None) -> None:  # noqa: B027
        """Tell this what decode steps do from now on, if the layer selects any pages."""
