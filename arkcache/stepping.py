"""A decode step in two halves: books on the host, and launches that a CUDA graph can replay.

The launches of a step depend on nothing that the books count, so that they can be recorded once and
replayed while only the books go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from arkcache.pages import Ids
from arkcache.step import Step


class StaticLayer(Protocol):
    """A layer whose steps come in two halves: what `ring.py` and `resident.py` define."""

    columns: int

    def reserve(self, tokens: int) -> None:
        """Make room for sequences of so many tokens, so that no address changes until then."""
        ...

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the tensors that grow are now."""
        ...

    def seals_at(self, lengths: Ids) -> bool:
        """Whether growing to these lengths seals a page."""
        ...

    def book_token(self, rows: slice) -> bool:
        """Enter one more token of these sequences; returns whether any seals a page with it."""
        ...

    def count_attended(self) -> None:
        """Note how many tokens the step under way attends."""
        ...

    def held(self) -> tuple[Ids, ...]:
        """What the books say, for `undo`."""
        ...

    def undo(self, *held: Ids) -> None:
        """Hold what was `held` before a token was booked, however far its step came."""
        ...

    def launch_append(self, rows: slice, key: Tensor, value: Tensor, seals: bool) -> None:
        """Queue the storing of one token of each sequence; `seals` is what `book_token` said."""
        ...

    def launch_attend(self, step: Step) -> Tensor:
        """Queue the attention of one new token."""
        ...

    def join(self) -> None:
        """Have the next kernel wait for what other lanes do for this layer."""
        ...

    def abandon(self) -> None:
        """Forget what other lanes were asked for: recording it failed, so nobody does it."""
        ...


class StaticSteps:
    """The steps of a manager whose layers all come in two halves.

    Args:
        layers: all of them.

    Attributes:
        launching: while a step that was booked is launched, whether it seals pages; None otherwise.
        saw_mask: whether a step was attended with a mask, which a recording would keep as it was.
    """

    def __init__(self, layers: Sequence[StaticLayer]) -> None:
        self.layers = layers
        self.launching: bool | None = None
        self.saw_mask = False
        self._before: list[tuple[int, tuple[Ids, ...]]] = []

    def reserve(self, tokens: int) -> None:
        """Make room on the device for so many tokens of every sequence."""
        for layer in self.layers:
            layer.reserve(tokens)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where everything is that moves when it grows: what a graph was captured with."""
        return tuple(address for layer in self.layers for address in layer.addresses)

    def seals_at(self, lengths: Ids) -> bool:
        """Whether a step to these lengths seals pages."""
        return any(layer.seals_at(lengths) for layer in self.layers)

    def remember(self) -> None:
        """Note what the books say, for `undo`."""
        self._before = [(layer.columns, layer.held()) for layer in self.layers]

    def undo(self) -> None:
        """Go back to what was remembered, after a step that did not come to its end."""
        for layer, (columns, held) in zip(self.layers, self._before, strict=True):
            layer.undo(*held)
            layer.columns = columns

    def book(self, batch: int) -> bool:
        """Enter one token of every sequence in the books of all layers; whether pages seal."""
        seals = False
        self.join()  # a graph cannot wait for what was asked for outside it
        for layer in self.layers:
            seals |= layer.book_token(slice(0, batch))
            layer.columns += 1
            layer.count_attended()
        return seals

    def join(self) -> None:
        """Have the next kernels wait for what other lanes do for any layer."""
        for layer in self.layers:
            layer.join()

    @contextmanager
    def launch(self, seals: bool, *, recorded: bool = False) -> Iterator[None]:
        """Within it a manager's `append` and `attend` launch what is booked, and book nothing.

        recorded: what is launched is not done now but recorded, so that after a failure there is
            nothing to wait for.
        """
        self.launching = seals
        try:
            yield
            self.join()
        except BaseException:
            if recorded:
                self.abandon()
            else:
                self.join()  # other lanes are still at it
            raise
        finally:
            self.launching = None

    def abandon(self) -> None:
        """Forget what other lanes were asked for in a step that was to be recorded."""
        for layer in self.layers:
            layer.abandon()
