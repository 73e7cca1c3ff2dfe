"""A folder that holds one saved state: files of tensors and pages, and a header that names them.

The header, `session.json`, is written last and renamed into place, and every save writes files of
new names: whatever interrupts it, the header that is there names a state that is whole. Nothing in
a folder is executed when it is read; everything has a checksum.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from arkcache.errors import ArkCacheError, SessionError

HEADER = "session.json"
FORMAT = "arkcache-session"
VERSION = 2
"""Of the format. A change that older code cannot read, or that older folders lack, is a new one."""

OWN_NAMES = re.compile(r"session\.json(\.[0-9a-f]{12})?|.+-[0-9a-f]{12}\.(safetensors|bin)")
"""What saves call their files: others in a folder are left alone."""

SPARE_BYTES = 1 << 20
"""What a save may take on the disk beside what its contents add up to."""


class FolderWriter:
    """Writes files into a folder, which `commit` then makes its contents.

    Made by `writing`. Files that are not committed are removed.

    Args:
        folder: exists, and holds nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, dict[str, Any]] = {}
        self._token = secrets.token_hex(6)

    def add_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors, which are on the CPU and contiguous, as a file that is called `name`."""
        path = self._new_file(name, "safetensors")
        save_file(tensors, path)
        _flush(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._files[name] |= {"bytes": path.stat().st_size, "sha256": digest}

    @contextmanager
    def add_bytes(self, name: str) -> Iterator[BinaryIO]:
        """A file that is called `name`, to be written to; it has no checksum of its own."""
        path = self._new_file(name, "bin")
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        self._files[name] |= {"bytes": path.stat().st_size}

    def add_links(self, names: Sequence[str], link: Callable[[list[Path]], bool]) -> bool:
        """Files that are called so, by what gives paths to such as are there; False where it could
        not. They may grow, and have no checksums of their own."""
        paths = [self._new_file(name, "bin") for name in names]
        if not link(paths):
            for name, path in zip(names, paths, strict=True):
                path.unlink(missing_ok=True)
                del self._files[name]
            return False
        for name, path in zip(names, paths, strict=True):
            self._files[name] |= {"bytes": path.stat().st_size, "grows": True}
        return True

    def _new_file(self, name: str, suffix: str) -> Path:
        path = self.folder / f"{name}-{self._token}.{suffix}"
        self._files[name] = {"file": path.name}
        return path

    def commit(self, contents: dict[str, Any]) -> None:
        """Make the files the folder's contents, described by `contents`, which JSON can say."""
        body = {"format": FORMAT, "version": VERSION, "files": self._files, **contents}
        body = json.loads(json.dumps(body))  # as it will be read: numbers that are keys are not
        header = {"sha256": _digest(body), "session": body}
        draft = self.folder / f"{HEADER}.{self._token}"
        draft.write_text(json.dumps(header), encoding="utf-8")
        _flush(draft)
        _flush(self.folder)
        draft.replace(self.folder / HEADER)
        _flush(self.folder)
        self._remove_others()

    def _remove_others(self) -> None:
        """Remove what earlier saves, and those that were killed, have left."""
        own = {HEADER, *(entry["file"] for entry in self._files.values())}
        for path in self.folder.iterdir():
            if OWN_NAMES.fullmatch(path.name) and path.name not in own:
                path.unlink()

    def discard(self) -> None:
        """Remove what was written so far, unless it is the folder's contents by now: what fails
        after that, or in the middle of it, has been saved."""
        header = self.folder / HEADER
        if header.exists() and self._token in header.read_text(encoding="utf-8"):
            return
        for path in self.folder.glob(f"*{self._token}*"):
            path.unlink()


@contextmanager
def writing(folder: Path, nbytes: int) -> Iterator[FolderWriter]:
    """Save into a folder, new or that of an earlier save, what takes about so many bytes.

    What is not committed in the end has not happened. Raises `SessionError` for a folder of other
    files, for one that cannot be written to, and for a full disk.
    """
    is_new = False
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        _check_own(folder)
        free, needed = shutil.disk_usage(folder).free, nbytes + SPARE_BYTES
        if needed > free:
            raise SessionError(f"{folder}: saving takes {needed} bytes, and {free} are free")
        with _locked(folder, exclusive=True):
            writer = FolderWriter(folder)
            try:
                yield writer
            except BaseException:
                writer.discard()
                raise
    except (OSError, SafetensorError) as error:
        raise SessionError(f"cannot save to {folder}: {_why(error)}") from error
    except ValueError as error:
        if isinstance(error, ArkCacheError):
            raise
        raise SessionError(f"cannot save to {str(folder)!r}: {error}") from error
    finally:
        if is_new and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def _check_own(folder: Path) -> None:
    """Raise `SessionError` for a folder of other files, without a save among them."""
    header = folder / HEADER
    try:
        is_own = json.loads(header.read_bytes())["session"]["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        is_own = False
    if not is_own:  # a first save that was killed, or one that was damaged
        names = [path.name for path in folder.iterdir()]
        is_own = all(map(OWN_NAMES.fullmatch, names)) and names != [HEADER]
    if not is_own:
        raise SessionError(
            f"{folder} holds other files: give a new folder, or that of an earlier save"
        )


class FolderReader:
    """Reads what a `FolderWriter` wrote. Made by `reading`, which has checked the header.

    Attributes:
        contents: as they were committed.
    """

    def __init__(self, folder: Path, contents: dict[str, Any]) -> None:
        self.folder, self.contents = folder, contents

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file. Raises `SessionError` where it is missing or damaged."""
        path, entry = self.path(name), self.contents["files"][name]
        content = path.read_bytes()  # not mapped: what is checked is what is used
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise damaged(path, "its checksum is another")
        tensors: dict[str, Tensor] = load(content)
        return tensors

    def path(self, name: str) -> Path:
        """A file of the right length. Raises `SessionError` where there is none."""
        entry = self.contents["files"][name]
        path = self.folder / str(entry["file"])
        if path.parent != self.folder or not OWN_NAMES.fullmatch(path.name):
            raise damaged(self.folder / HEADER, f"{path} is no file of a session")
        if not path.is_file():
            raise damaged(path, "it is missing")
        size, grows = path.stat().st_size, entry.get("grows", False)
        if size != entry["bytes"] and not (grows and size > entry["bytes"]):
            raise damaged(path, f"it has {size} bytes instead of {entry['bytes']}")
        return path


@contextmanager
def reading(folder: Path) -> Iterator[FolderReader]:
    """Read a folder that was saved.

    Raises `SessionError` where there is none, or one of another version, or a damaged one.
    """
    try:
        with _locked(folder, exclusive=False):
            yield FolderReader(folder, read_header(folder))
    except (OSError, SafetensorError) as error:
        raise SessionError(f"cannot read {folder}: {_why(error)}") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, ArkCacheError):
            raise
        raise damaged(folder / HEADER, f"it says what cannot be ({error!r})") from error


def read_header(folder: Path) -> dict[str, Any]:
    """What a saved folder says of its contents; see `reading`."""
    path = folder / HEADER
    if not path.is_file():
        raise SessionError(f"{folder} holds no saved session: there is no {HEADER} in it")
    try:
        header = json.loads(path.read_bytes())
        body: dict[str, Any] = header["session"]
        expected, kind, version = header["sha256"], body["format"], body["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged(path, "it is no header of a session") from None
    if kind != FORMAT:
        raise SessionError(f"{path} is of the format {kind!r}: expected {FORMAT!r}")
    if version != VERSION:
        raise SessionError(
            f"{path} is of version {version!r}, and this ArkCache reads version {VERSION}: read "
            "the text again, or use the release that wrote it"
        )
    if _digest(body) != expected:
        raise damaged(path, "its checksum is another")
    return body


def damaged(path: Path, why: str) -> SessionError:
    """The error for a file that is not what was saved."""
    return SessionError(f"{path} is damaged: {why}. What it held must be read again")


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error)


def _flush(path: Path) -> None:
    """Have the disk hold a file or the names in a folder before anything refers to them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Let no other process save into a folder while it is read, nor read or save while it is
    saved."""
    import fcntl  # where it is missing, so are the mappings that the host tier is made of

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH))
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise SessionError(
                    f"{folder} is being {'used' if exclusive else 'saved'} by another process"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # some network drives
                raise
        yield
    finally:
        os.close(descriptor)
