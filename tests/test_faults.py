"""Many random operations with seeded faults: an answer is the oracle's, or there is none.

    FAULT_OPERATIONS=1000000 pytest -m slow tests/test_faults.py -s

Caches of two layers are appended to, attended, cropped, copied, saved and loaded, in memory and in
files. Meanwhile bits are flipped and ends cut off in what was saved, disks are full and cannot be
read, and saves fail half way. What an operation may raise is an error of ours, and then nothing has
changed; what it answers is compared with the dense oracle.
"""

import copy
import errno
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from arkcache import HostTierFullError, KVCacheManager, SessionError
from arkcache.tiering import mapped_file
from tests.quantised import config_of
from tests.twins import Twins

MAX_COLUMNS, MAX_CACHES = 90, 4

FAULTS = {"preadv": errno.EIO, "posix_fallocate": errno.ENOSPC, "fsync": errno.ENOSPC}
"""Calls that a fault has fail, and with what."""

WEIGHTS = {"append": 30, "attend": 40, "crop": 8, "copy": 4, "reorder": 3, "save": 5, "load": 6}
WEIGHTS |= {"damage": 4, "check": 2, "forget": 1}


@dataclass
class Talk:
    """A cache with its oracle; spoilt: pages of it may be damaged, so that it may refuse."""

    twins: Twins
    spoilt: bool = False


class Storm:
    """Random operations on some caches; all follow from the seed.

    Attributes:
        done: how many of each operation; under "refused ...", those that raised.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.chance, self.done = folder, random.Random(seed), Counter[str]()
        self.talks: list[Talk] = []
        self.saved: dict[Path, Talk] = {}

    def run(self, count: int) -> None:
        """Do so many operations."""
        names, weights = [*WEIGHTS], [*WEIGHTS.values()]
        while self.done.total() < count:
            if len(self.talks) < 2:
                self.talks.append(Talk(self._new()))
            (name,) = self.chance.choices(names, weights)
            fault = self.chance.choice([*FAULTS, *[None] * 30])
            talk = self.chance.choice(self.talks)
            held = talk.twins.oracle.num_columns
            try:
                with failing(fault):
                    getattr(self, name)(talk)
            except (SessionError, HostTierFullError) as error:
                if not (fault or talk.spoilt or isinstance(error, Damaged)):
                    raise
                name = f"refused {name}"
                # No layer has changed, and so the oracle has not.
                assert talk.twins.oracle.num_columns == held
            self.done[name] += 1
            while len(self.talks) > MAX_CACHES:
                self.talks.pop(0)

    def _new(self) -> Twins:
        lies_there = self.chance.random() < 0.7
        config = config_of(
            self.chance.choice(["K16V16", "K16V16", "K4V2"]),
            backend=self.chance.choice(["torch", "numba"]),
            index=self.chance.choice(["tokens", "cuboid-mean"]),
            host_path=str(self.folder / "tier") if lies_there else None,
            host_resident_bytes=self.chance.choice([None, 100_000]),
        )
        sizes: dict[str, Any] = {"num_kv_heads": 1, "group": 1, "batch": 2}
        return Twins(config, num_layers=2, seed=self.chance.randrange(1 << 40) << 20, **sizes)

    # -- operations -------------------------------------------------------------------------------

    def append(self, talk: Talk) -> None:
        """Some tokens to all layers; a page that is full may find the disk to be so."""
        new_tokens = self.chance.choice([1, 1, 1, 5, 20])
        if talk.twins.oracle.num_columns + new_tokens <= MAX_COLUMNS:
            talk.twins.append(new_tokens)

    def attend(self, talk: Talk) -> None:
        """The newest tokens, one or some."""
        held = talk.twins.oracle.num_columns
        if held:
            talk.twins.attend(min(held, self.chance.choice([1, 1, 1, 1, 4])))

    def crop(self, talk: Talk) -> None:
        """A retry, from not far or anywhere."""
        held = talk.twins.oracle.num_columns
        talk.twins.crop(self.chance.choice([max(0, held - 3), self.chance.randint(0, held)]))

    def copy(self, talk: Talk) -> None:
        """A copy that goes its own way and shares pages."""
        self.talks.append(copy.deepcopy(talk))

    def reorder(self, talk: Talk) -> None:
        """Sequences change places, or one becomes two."""
        if talk.twins.oracle.batch:
            talk.twins.keep_sequences(self.chance.choice([[1, 0], [0, 0], [1, 1]]))

    def save(self, talk: Talk) -> None:
        """Into one of two folders, over what is there."""
        path = self.folder / f"saved{self.chance.randrange(2)}"
        talk.twins.manager.save(path)
        held = copy.copy(talk.twins)
        held.oracle = copy.deepcopy(talk.twins.oracle)
        held.manager = KVCacheManager(1, 1, 1)  # nothing of the cache lives on
        self.saved[path] = Talk(held, talk.spoilt)

    def load(self, _talk: Talk) -> None:
        """In place or into memory."""
        if self.saved:
            path = self.chance.choice(sorted(self.saved))
            self._load(path, self.saved[path], spoilt=self.saved[path].spoilt)

    def _load(self, path: Path, saved: Talk, *, spoilt: bool) -> None:
        host_path = self.chance.choice([None, str(self.folder / "tier")])
        twins = copy.copy(saved.twins)
        twins.oracle = copy.deepcopy(saved.twins.oracle)
        try:
            twins.manager = KVCacheManager.load(path, host_path=host_path)
        except SessionError as error:
            raise Damaged(str(error)) if spoilt else error from None
        self.talks.append(Talk(twins, spoilt))

    def damage(self, _talk: Talk) -> None:
        """A copy of a saved folder with a flipped bit, or an end that is missing, is loaded."""
        if not self.saved:
            return
        path, other = self.chance.choice(sorted(self.saved)), self.folder / "damaged"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(path, other)
        files = sorted(other.iterdir())
        pages = [one for one in files if "pages" in one.name]
        file = self.chance.choice(pages or files if self.chance.random() < 0.5 else files)
        content = bytearray(file.read_bytes())
        if content and self.chance.random() < 0.8:
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        else:
            del content[self.chance.randrange(len(content) + 1) :]
        file.write_bytes(content)
        self._load(other, self.saved[path], spoilt=True)

    def check(self, talk: Talk) -> None:
        """Everything there is, to the bit."""
        talk.twins.check()

    def forget(self, talk: Talk) -> None:
        """Empty again."""
        talk.twins.reset()
        talk.spoilt = False


class Damaged(SessionError):
    """Of a folder that was damaged on purpose."""


@contextmanager
def failing(name: str | None) -> Iterator[None]:
    """Within it, a call of the system fails each time."""
    if name is None:
        yield
        return

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(FAULTS[name], os.strerror(FAULTS[name]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, fail)
        yield


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name")
@pytest.mark.parametrize(
    "count",
    [1500, pytest.param(int(os.environ.get("FAULT_OPERATIONS", 100_000)), marks=pytest.mark.slow)],
)
def test_an_answer_is_right_or_there_is_none(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them: no power fails here
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    monkeypatch.setattr(mapped_file, "STEP_BYTES", 4096)  # so that disks are asked, and full
    seed = int(os.environ.get("FAULT_SEED", 0))
    with tempfile.TemporaryDirectory() as folder:
        storm = Storm(Path(folder), seed)
        try:
            storm.run(count)
        finally:
            sys.stdout.write(f"seed {seed}: {storm.done.total()} operations, {dict(storm.done)}\n")
    assert storm.done.total() == count
    refused = {name for name in storm.done if name.startswith("refused")}
    assert {"refused damage", "refused save"} <= refused
