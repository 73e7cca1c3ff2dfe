"""Files that are written whole or not at all."""

import os
from pathlib import Path

import pytest

from arkcache import InputError
from arkcache.files import write_whole


def test_a_link_goes_on_pointing_where_it_did(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"before")
    link.symlink_to(target)
    write_whole(link, b"after")
    assert (link.is_symlink(), target.read_bytes()) == (True, b"after")
    assert sorted(tmp_path.iterdir()) == [link, target]


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"through")
    assert os.read(reader, 100) == b"through"
    assert pipe.is_fifo()
    os.close(reader)


def test_what_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def full(draft: Path, _: bytes) -> None:
        draft.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left"):
        write_whole(path, b"after")
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"before"
