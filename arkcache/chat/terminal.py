"""A conversation in a terminal: what is typed is a question or a command, answers stream.

Start reading at `Chat.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from arkcache.chat.documents import load_document
from arkcache.chat.live import live_answer
from arkcache.chat.session import Session
from arkcache.config import CacheConfig
from arkcache.errors import ArkCacheError, InputError
from arkcache.sizes import bytes_text
from arkcache.stats import CacheStats

QUOTES = '"""'
"""Before and after what takes several lines."""


@dataclass
class Sampling:
    """How answers are drawn; see `Session.ask`."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


class Chat:
    """A conversation in a terminal.

    Args:
        session: what is asked.
        sampling: how answers are drawn.
        console: where everything is printed.
        ask_line: shows a prompt and returns a line; raises `EOFError` at the end of the input.
        quiet: print answers and what commands say, but no progress, hints or figures.
        live: on a terminal, show below an answer what the cache does, as long as it comes.

    Attributes:
        before_change: called before counters begin anew, at a reset or a load.
    """

    def __init__(
        self,
        session: Session,
        sampling: Sampling,
        console: Console,
        ask_line: Callable[[str], str] = input,
        quiet: bool = False,
        live: bool = False,
    ) -> None:
        self._session, self._sampling, self._quiet = session, sampling, quiet
        self._console, self._ask_line = console, ask_line
        self._live = live and not quiet and console.is_terminal
        self._goes_on, self._times_copies = True, False
        self.before_change: Callable[[], object] = lambda: None
        self._commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "file": (self._read_file, "PATH", "read a text file into the conversation"),
            "ask-full": (
                self._ask_full,
                "[QUESTION]",
                "ask with everything attended; without a question, the last one again",
            ),
            "undo": (self._undo, "", "forget the last question and its answer"),
            "budget": (self._set_budget, "TOKENS", "attend so many tokens a step from now on"),
            "save": (self._save, "FOLDER", "save the conversation"),
            "load": (self._load, "FOLDER", "go on with a conversation that was saved"),
            "stats": (self._show_stats, "", "what the cache holds and did"),
            "reset": (self._reset, "", "forget everything"),
            "help": (self._help, "", "this list"),
            "quit": (self._quit, "", "leave; so does Ctrl-D"),
        }

    def run(self) -> None:
        """Talk until the user leaves."""
        self._hint("Ask about the text; /help lists the commands, Ctrl-C stops an answer.")
        while self._goes_on:
            try:
                line = self._typed()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("Ctrl-D or /quit leaves.")
                continue
            try:
                if line.startswith("/"):
                    self._obey(line[1:])
                elif line:
                    self._answer(line)
            except ArkCacheError as error:
                self._console.print(f"[red]{escape(str(error))}[/]", highlight=False)
            except KeyboardInterrupt:
                self._say("stopped; everything before is kept.")

    def read(self, name: str, text: str) -> None:
        """Read a text, with a progress bar on a terminal."""
        start = time.perf_counter()
        with self._bar(f"Reading {name}", lambda rate: f"{rate:,.0f} tokens/s") as progress:
            count = self._session.read(text, progress)
        seconds = time.perf_counter() - start
        self._hint(f"{name}: {count:,} tokens read in {seconds:.0f} s.")

    @contextmanager
    def _bar(
        self, what: str, speed: Callable[[float], str]
    ) -> Iterator[Callable[[int, int], None]]:
        """A progress bar, on a terminal, and how to tell it what is done and of how much.

        speed: writes down how much is done a second.
        """
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=self._quiet or not self._console.is_terminal,
        )
        start = time.perf_counter()
        with bar:
            task = bar.add_task(escape(what), total=None, speed="")

            def progress(done: int, total: int) -> None:
                rate = done / (time.perf_counter() - start)
                bar.update(task, completed=done, total=total, speed=speed(rate) if done else "")

            yield progress

    # -- what is typed ----------------------------------------------------------------------------

    def _typed(self) -> str:
        """A line, or several: those that end in a backslash go on, and so do open quotes."""
        text = self._ask_line("\n> ").strip()
        if text.startswith(QUOTES):
            text = text[len(QUOTES) :]
            while not text.rstrip().endswith(QUOTES):
                text += "\n" + self._ask_line(". ")
            return text.rstrip()[: -len(QUOTES)].strip()
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self._ask_line(". ").rstrip()
        return text

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise InputError(f"/{name}: no such command; /help lists them")
        self._commands[name][0](rest.strip())

    # -- answers ----------------------------------------------------------------------------------

    def _answer(self, question: str, *, exact: bool = False) -> None:
        session, sampling = self._session, self._sampling
        before, held, start = session.cache.stats(), len(session.ids), time.perf_counter()
        first = start
        answer = session.ask(question, **asdict(sampling), exact=exact)
        with self._shown() as show:
            for number, part in enumerate(_spelled(answer)):
                if number == 0:
                    held, first = len(session.ids), time.perf_counter()
                show(part)
        count, seconds = len(session.ids) - held, time.perf_counter() - first
        stats = session.cache.stats()
        layers = max(1, stats.total_tokens // max(1, len(session.ids)))
        hits, recalled = (
            getattr(stats, name) - getattr(before, name) for name in ("pages_hit", "pages_recalled")
        )
        words = [
            f"{count:,} tokens in {seconds:.1f} s, the first after {first - start:.1f} s",
            f"{stats.attended_tokens // layers:,} of {len(session.ids):,} attended",
        ]
        if hits + recalled:
            words.append(f"{hits / (hits + recalled):.0%} of pages at hand")
        self._hint(", ".join(words))

    @contextmanager
    def _shown(self) -> Iterator[Callable[[str], None]]:
        """Shows the parts of an answer."""
        if self._live:
            with live_answer(self._console, self._session) as show:
                yield show
            return
        try:
            yield lambda part: self._console.out(part, end="", highlight=False)
        finally:
            self._console.out("")

    def _ask_full(self, question: str) -> None:
        question = question or self._session.undo()
        self._answer(question, exact=True)

    # -- commands ---------------------------------------------------------------------------------

    def _read_file(self, path: str) -> None:
        if not path:
            raise InputError("/file PATH: no path given")
        self.read(Path(path).name, load_document(Path(path).expanduser()))

    def _undo(self, _rest: str) -> None:
        self._say(f"forgotten: {self._session.undo()}")

    def _set_budget(self, tokens: str) -> None:
        if not tokens.isdecimal():
            raise InputError(f"/budget {tokens}: expected a number of tokens")
        self._session.cache.set_budget(int(tokens))
        self._say(f"a step attends {int(tokens):,} tokens from now on.")

    def _save(self, folder: str) -> None:
        if not folder:
            raise InputError("/save FOLDER: no folder given")
        with self._bar(f"Saving to {folder}", _bytes_a_second) as progress:
            self._session.save(Path(folder).expanduser(), progress)
        self._say(f"{len(self._session.ids):,} tokens saved; /load {folder} goes on with them.")

    def _load(self, folder: str) -> None:
        if not folder:
            raise InputError("/load FOLDER: no folder given")
        self.load(Path(folder).expanduser())

    @property
    def session(self) -> Session:
        """The conversation: another one after a load."""
        return self._session

    def stats(self) -> CacheStats:
        """Counters and sizes of the conversation's cache."""
        return self._session.cache.stats()

    @property
    def config(self) -> CacheConfig:
        """Settings of the conversation's cache."""
        return self._session.cache.config

    def time_copies(self, on: bool) -> None:
        """See `KVCacheManager.time_copies`; also after a load."""
        self._times_copies = on
        self._session.cache.time_copies(on)

    def load(self, folder: Path, **settings: Any) -> None:
        """Go on with a saved conversation, with a progress bar on a terminal.

        settings: of the cache, to replace; see `ArkCache.load`.
        """
        before = self._session
        self.before_change()
        with self._bar(f"Loading {folder}", _bytes_a_second) as progress:
            self._session = Session.load(
                before.model,
                before.tokenizer,
                folder,
                past_limit=before.past_limit,
                progress=progress,
                **settings,
            )
        self._session.cache.time_copies(self._times_copies)
        asked = self._session.questions
        last = f"; the last question was: {asked[-1]}" if asked else ""
        self._hint(f"{len(self._session.ids):,} tokens loaded{last}")

    def _show_stats(self, _rest: str) -> None:
        stats, session = self._session.cache.stats(), self._session
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in (
            ("tokens held", f"{len(session.ids):,}"),
            ("on the device", bytes_text(stats.device_bytes + stats.digest_bytes)),
            ("of which index", bytes_text(stats.digest_bytes)),
            ("in the host tier", bytes_text(stats.host_bytes)),
            ("pages recalled", f"{stats.pages_recalled:,}"),
            ("recalled", bytes_text(stats.bytes_recalled)),
            ("pages at hand", f"{stats.hit_rate:.0%}"),
        ):
            table.add_row(name, value)
        self._console.print(table)

    def _reset(self, _rest: str) -> None:
        self.before_change()
        self._session.reset()
        self._say("everything is forgotten.")

    def _help(self, _rest: str) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, (_, argument, what) in self._commands.items():
            table.add_row(escape(f"/{name} {argument}"), what)
        self._console.print(table)
        self._say(f"A line that ends in \\ goes on; {QUOTES} opens and closes several lines.")

    def _quit(self, _rest: str) -> None:
        self._goes_on = False

    def _hint(self, text: str) -> None:
        if not self._quiet:
            self._say(text)

    def _say(self, text: str) -> None:
        self._console.print(f"[dim]{escape(text)}[/]", highlight=False)


def _spelled(answer: Iterator[str]) -> Iterator[str]:
    """An answer without the spaces before its first word."""
    begun = False
    for part in answer:
        part = part if begun else part.lstrip()
        begun = begun or bool(part)
        if part:
            yield part


def _bytes_a_second(rate: float) -> str:
    return f"{bytes_text(rate)}/s"


def use_line_editing() -> None:
    """Let lines be edited and called back, where Python has GNU readline or its like."""
    with suppress(ImportError):
        import readline  # noqa: F401 - `input` uses it once it is imported
