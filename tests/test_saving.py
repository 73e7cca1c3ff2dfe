"""Saved caches: what is loaded is what was saved to the bit, or an error and nothing at all."""

import copy
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

import arkcache
from arkcache import (
    ArkCache,
    CacheConfig,
    ConfigError,
    HostTierFullError,
    InputError,
    KVCacheManager,
    SessionError,
)
from arkcache.config import INDEXES
from arkcache.huggingface.saving import load_cache
from arkcache.saving import folder as saving
from arkcache.saving.folder import HEADER
from arkcache.saving.managers import NAME, read_manager
from tests.marks import needs_interpreter
from tests.quantised import config_of
from tests.test_huggingface import SPARSE, continued, make_model, prompt
from tests.twins import Twins, check_references, small_config

LEFT_PADDED = torch.arange(90) >= torch.tensor([[0], [25]])
HOLES = torch.rand(2, 90, generator=torch.Generator().manual_seed(5)) < 0.5


def filled(
    config: CacheConfig, mask: Tensor | None = None, *, prompt: int = 80, **sizes: Any
) -> Twins:
    """A cache after a prompt, decode steps and a retry, beside its oracle."""
    twins = Twins(config, **({"num_layers": 2} | sizes))
    twins.append(prompt, None if mask is None else mask[:, :prompt])
    for column in range(prompt, 90):
        twins.append(1, None if mask is None else mask[:, column : column + 1])
        twins.attend()
    twins.crop(87)
    return twins


def goes_on(twins: Twins, steps: Sequence[int] = (1, 1, 1, 1, 6, 1)) -> list[Tensor]:
    """Steps of so many tokens, a retry and beams; all outputs."""
    outputs = twins.attend()
    for new_tokens in steps:
        twins.append(new_tokens)
        outputs += twins.attend(new_tokens)
    twins.crop(70)
    outputs += twins.attend()
    twins.keep_sequences([1, 0, 0])
    twins.append(1)
    outputs += twins.attend()
    twins.check()
    return outputs


def check_saved(twins: Twins, folder: Path, **how: Any) -> None:
    """What is loaded attends as what was saved does, to the bit, and as the oracle says."""
    twins.manager.save(folder)
    other = copy.deepcopy(twins)
    twins.manager = KVCacheManager.load(folder)
    twins.check()
    assert twins.manager.config == other.manager.config
    check_references([twins.manager])
    for mine, theirs in zip(goes_on(twins, **how), goes_on(other, **how), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.backends("torch", "numba")
@pytest.mark.parametrize("index", ["cuboid-mean", "sphere-max", "centroid", "tokens"])
@pytest.mark.parametrize("mask", [None, LEFT_PADDED, HOLES], ids=["plain", "left", "holes"])
def test_what_is_loaded_is_what_was_saved(index: str, mask: Tensor | None, tmp_path: Path) -> None:
    check_saved(filled(small_config(index=index), mask), tmp_path / "saved")


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("name", ["K8V4", "K2V2"])
@pytest.mark.parametrize("rotation", ["none", "both"])
def test_formats(name: str, rotation: str, backend: str, tmp_path: Path) -> None:
    config = config_of(name, backend=backend, rotation=rotation)
    check_saved(filled(config), tmp_path / "saved")


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(("name", "estimate_pages"), [("K16V16", None), ("K4V2", 0)])
def test_kernels_of_a_gpu(name: str, estimate_pages: int | None, tmp_path: Path) -> None:
    config = config_of(
        name,
        backend="triton",
        index="cuboid-mean",
        rotation="both",
        estimate_pages=estimate_pages,
        device_pool_factor=1.5,
    )
    check_saved(filled(config, HOLES, prompt=89, num_layers=1), tmp_path / "saved", steps=[1])


@needs_interpreter
@pytest.mark.slow
def test_the_token_index_on_kernels_of_a_gpu(tmp_path: Path) -> None:
    config = small_config(backend="triton", target_missed_mass=0.1)
    check_saved(filled(config, prompt=89, num_layers=1), tmp_path / "saved", steps=[1])


@pytest.mark.parametrize("name", ["K8V4+K4V2", "K16V16+K2V2"])
def test_pages_of_two_formats_and_what_demotes_them(name: str, tmp_path: Path) -> None:
    twins = filled(config_of(name))
    assert twins.manager.stats().pages_demoted > 0
    check_saved(twins, tmp_path / "saved")


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("name", ["K16V16", "K4V4"])
def test_layers_that_attend_everything(name: str, backend: str, tmp_path: Path) -> None:
    config = config_of(name, backend=backend, num_dense_layers=1)
    check_saved(filled(config, LEFT_PADDED), tmp_path / "one")
    unlimited = config_of(name, backend=backend, budget_tokens=None)
    check_saved(filled(unlimited), tmp_path / "all")


@needs_interpreter
@pytest.mark.parametrize("name", ["K16V16", pytest.param("K4V4", marks=pytest.mark.slow)])
def test_dense_layers_on_kernels_of_a_gpu(name: str, tmp_path: Path) -> None:
    config = config_of(name, backend="triton", budget_tokens=None)
    twins = filled(config, LEFT_PADDED, prompt=89, num_layers=1)
    check_saved(twins, tmp_path / "saved", steps=[1])


def test_estimates_and_targets(tmp_path: Path) -> None:
    config = small_config(estimate_pages=None, target_missed_mass=0.1)
    check_saved(filled(config), tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_dims_of_their_own(dtype: torch.dtype, tmp_path: Path) -> None:
    twins = filled(small_config(), dtype=dtype, value_dim=12, num_kv_heads=1, group=4)
    check_saved(twins, tmp_path / "saved")


@pytest.mark.parametrize("columns", [0, 1, 5, 9])
def test_little_or_nothing(columns: int, tmp_path: Path) -> None:
    """Nothing at all, or nothing that was sealed yet."""
    manager = KVCacheManager(1, 2, 8, small_config())
    if columns:
        manager.append(0, *torch.randn(2, 1, 2, columns, 8))
    manager.save(tmp_path / "saved")
    loaded = KVCacheManager.load(tmp_path / "saved")
    assert (loaded.batch, loaded.num_columns) == (manager.batch, columns)
    for one in (loaded, manager):
        torch.manual_seed(1)
        one.append(0, *torch.randn(2, 1, 2, 60, 8))
    query = torch.randn(1, 2, 1, 8)
    assert torch.equal(loaded.attend(0, query), manager.attend(0, query))


def test_beams_share_pages_after_a_load_too(tmp_path: Path) -> None:
    twins = filled(small_config())
    twins.keep_sequences([0, 0, 0, 1])
    check_saved(twins, tmp_path / "saved")


@pytest.mark.parametrize("backends", [("torch", "numba"), ("numba", "torch")])
def test_another_engine_digests_anew(backends: tuple[str, str], tmp_path: Path) -> None:
    before, after = backends
    twins = filled(small_config(backend=before))
    twins.manager.save(tmp_path / "saved")
    twins.manager = KVCacheManager.load(tmp_path / "saved", backend=after)
    assert twins.manager.planner.backend == after
    goes_on(twins)


@pytest.mark.parametrize("index", INDEXES)
def test_another_index_and_budget(index: str, tmp_path: Path) -> None:
    twins = filled(small_config(index="centroid" if index == "tokens" else "tokens"))
    twins.manager.save(tmp_path / "saved")
    query = twins.query()
    twins.manager = KVCacheManager.load(tmp_path / "saved", index=index, budget_tokens=48)
    twins.manager.attend(0, query)
    assert twins.manager.stats().attended_tokens <= 48 * 2
    fresh = KVCacheManager(1, 2, 8, small_config(index=index, budget_tokens=48))
    fresh.append(0, *twins.oracle.gather(0))
    assert torch.equal(fresh.attend(0, query), twins.manager.attend(0, query))


# -- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a saved manager."""
    filled(small_config()).manager.save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 8}, "saved with page_size=4: .* with page_size=8"),
        ({"key_bits": 4, "page_size": 4}, "saved with key_bits=16"),
        ({"num_recent_tokens": 8}, "saved with num_recent_tokens=4"),
    ],
)
def test_pages_are_read_as_they_were_kept(
    saved: Path, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(SessionError, match=message):
        KVCacheManager.load(saved, **settings)


def test_impossible_settings_and_too_little_room(saved: Path) -> None:
    with pytest.raises(ConfigError, match="budget_tokens=5"):
        KVCacheManager.load(saved, budget_tokens=5)
    with pytest.raises(HostTierFullError):
        KVCacheManager.load(saved, host_bytes=10_000)


def test_a_flipped_bit_anywhere_is_found(saved: Path) -> None:
    """Of every file, and at any offset: never is anything else loaded than what was saved."""
    chance = random.Random(0)
    expected = KVCacheManager.load(saved).gather(0)
    for path in sorted(saved.iterdir()):
        content = path.read_bytes()
        for _ in range(60):
            at, bit = chance.randrange(len(content)), chance.randrange(8)
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
            try:
                loaded = KVCacheManager.load(saved).gather(0)
            except SessionError:
                continue
            # Of the header, a space may become another.
            assert path.name == HEADER
            assert json.loads(path.read_bytes()) == json.loads(content)
            assert all(map(torch.equal, loaded, expected))
        path.write_bytes(content)


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "missing", "folder"])
def test_damaged_files(saved: Path, damage: str) -> None:
    for path in sorted(saved.iterdir()):
        content = path.read_bytes()
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage != "missing":
            path.write_bytes({"cut": content[:-1], "longer": content + b"\0"}.get(damage, b""))
        with pytest.raises(SessionError):
            KVCacheManager.load(saved)
        shutil.rmtree(path) if damage == "folder" else path.unlink(missing_ok=True)
        path.write_bytes(content)
    KVCacheManager.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "of version 1, and this ArkCache reads version 2"),
        ({"format": "zip"}, "of the format 'zip'"),
        ({"managers": []}, "checksum is another"),
    ],
)
def test_other_formats(saved: Path, change: dict[str, Any], message: str) -> None:
    header = json.loads((saved / HEADER).read_text())
    header["session"] |= change
    (saved / HEADER).write_text(json.dumps(header))
    with pytest.raises(SessionError, match=message):
        KVCacheManager.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"managers": []},
        {"managers": None},
        {"files": {}},
        {"files": {"manager0-log": {"file": "../x-0123456789ab.bin", "bytes": 0, "sha256": ""}}},
        {"files": {"manager0-log": {"file": "/dev/zero", "bytes": 0, "sha256": ""}}},
    ],
)
def test_headers_that_say_what_cannot_be(saved: Path, change: dict[str, Any]) -> None:
    """With a checksum that is right."""
    body = json.loads((saved / HEADER).read_text())["session"] | change
    (saved / HEADER).write_text(json.dumps({"sha256": saving._digest(body), "session": body}))
    with pytest.raises(SessionError, match="damaged"):
        KVCacheManager.load(saved)


@pytest.mark.parametrize("name", ["sealed", "lengths", "pieces", "columns"])
def test_counts_that_cannot_be(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels check nothing: what they read is checked when it is loaded."""
    state = KVCacheManager.layer_state

    def wrong(manager: KVCacheManager, layer: int) -> dict[str, Tensor]:
        held = state(manager, layer)
        held[name] = held[name] + 1
        return held

    with monkeypatch.context() as patch:
        patch.setattr(KVCacheManager, "layer_state", wrong)
        try:
            filled(small_config()).manager.save(tmp_path / "saved")
        except IndexError:
            return  # no such piece can be written
    with pytest.raises(SessionError, match="contradict each other"):
        KVCacheManager.load(tmp_path / "saved")


def test_what_attends_everything_stays_so(saved: Path, tmp_path: Path) -> None:
    for settings in ({"budget_tokens": None}, {"num_dense_layers": 1}):
        with pytest.raises(SessionError, match="layers that attend everything"):
            KVCacheManager.load(saved, **settings)
    filled(small_config(budget_tokens=None)).manager.save(tmp_path / "all")
    with pytest.raises(SessionError, match="layers that attend everything"):
        KVCacheManager.load(tmp_path / "all", budget_tokens=32)


def test_files_of_others_are_left_alone(saved: Path, tmp_path: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "folder").mkdir()
    filled(small_config()).manager.save(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "folder").is_dir()
    other = tmp_path / "editor"
    other.mkdir()
    (other / HEADER).write_text('{"editor": 1}')
    with pytest.raises(SessionError, match="holds other files"):
        filled(small_config()).manager.save(other)
    (saved / HEADER).write_bytes(b"damaged")
    with pytest.raises(SessionError, match="holds other files"):
        filled(small_config()).manager.save(saved)
    (saved / "notes.txt").unlink()
    (saved / "folder").rmdir()
    filled(small_config()).manager.save(saved)
    KVCacheManager.load(saved)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "manager0-pages0-0123456789ab.bin").write_bytes(b"half of it")
    filled(small_config()).manager.save(killed)
    assert not (killed / "manager0-pages0-0123456789ab.bin").exists()
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(SessionError, match="cannot save"):
            KVCacheManager(1, 2, 8).save(tmp_path / name)


def test_no_folder_and_no_session(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SessionError, match=r"holds no saved session|No such file"):
            KVCacheManager.load(path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SessionError, match="holds other files"):
        KVCacheManager(1, 2, 8).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(SessionError, match="cannot save"):
        KVCacheManager(1, 2, 8).save(tmp_path / "notes.txt")


def test_nothing_is_left_of_a_load_that_fails(saved: Path) -> None:
    pages = next(path for path in saved.iterdir() if "pages" in path.name)
    pages.write_bytes(b"\0" * pages.stat().st_size)
    manager = KVCacheManager(2, 2, 8, small_config())
    with saving.reading(saved) as reader, pytest.raises(SessionError, match="page 0 is another"):
        read_manager(reader, NAME, reader.contents["managers"][0], manager, lambda *_: None)
    assert (manager.batch, manager.stats().host_bytes) == (0, 0)
    manager.append(0, *torch.randn(2, 1, 2, 60, 8))
    manager.check_integrity()


# -- what interrupts a save -----------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_save_that_fails_has_not_happened(
    error: type[BaseException], is_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it fails: at each of the times that something reaches the disk."""
    folder, old, new = tmp_path / "saved", filled(small_config()), filled(small_config())
    if not is_first:
        old.manager.save(folder)
    before = sorted(folder.iterdir()) if folder.exists() else None
    new.append(20)
    flush, failures = os.fsync, 0
    while True:
        calls = iter(range(failures + 1))

        def fail(descriptor: int, calls: Iterator[int] = calls, last: int = failures) -> None:
            if next(calls, last + 1) == last:
                raise error(errno.ENOSPC, "No space left")
            flush(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            try:
                new.manager.save(folder)
            except (SessionError, KeyboardInterrupt):
                failures += 1
            else:
                break
        header = folder / HEADER
        if header.exists() and failures > 6:
            columns = KVCacheManager.load(folder).num_columns
            assert columns in (old.manager.num_columns, new.manager.num_columns)
        elif is_first:
            assert not folder.exists()
        else:
            assert sorted(folder.iterdir()) == before
    assert failures > 6
    assert KVCacheManager.load(folder).num_columns == new.manager.num_columns


def test_a_full_disk_is_said_before_anything_is_written(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(saved.iterdir())
    usage = shutil.disk_usage(saved)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SessionError, match=r"saving takes .* bytes, and 1048576 are free"):
        filled(small_config()).manager.save(saved)
    assert sorted(saved.iterdir()) == before


def test_a_save_replaces_the_one_before_and_clears_up(saved: Path) -> None:
    (saved / "manager0-log-0123456789ab.safetensors").write_bytes(b"of a save that was killed")
    twins = filled(small_config())
    twins.append(20)
    twins.manager.save(saved)
    assert len(list(saved.iterdir())) == 5
    assert KVCacheManager.load(saved).num_columns == twins.manager.num_columns


def test_two_savers_do_not_meet(saved: Path) -> None:
    manager = filled(small_config()).manager
    with saving.reading(saved), pytest.raises(SessionError, match="is being used"):
        manager.save(saved)
    with saving.writing(saved, 0), pytest.raises(SessionError, match="is being saved"):
        KVCacheManager.load(saved)
    KVCacheManager.load(saved)


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """Whenever a process that saves and saves is killed, the folder holds one of its states."""
    program = textwrap.dedent(
        f"""
        import torch
        from arkcache import CacheConfig, KVCacheManager
        manager = KVCacheManager(2, 2, 64, CacheConfig(backend="torch"))
        for layer in range(2):
            manager.append(layer, *torch.randn(2, 1, 2, 4000, 64))
        while True:
            for layer in range(2):
                manager.append(layer, *torch.randn(2, 1, 2, 1, 64))
            manager.save({str(tmp_path / "saved")!r})
            print("saved", flush=True)
        """
    )
    chance = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "saved\n"
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
    manager = KVCacheManager.load(tmp_path / "saved")
    assert manager.num_columns >= 4003
    manager.check_integrity()


# -- with transformers ----------------------------------------------------------------------------


def test_generation_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    model = make_model()
    cache = ArkCache(model, **SPARSE)
    text = continued(model, cache, prompt(300))
    cache.save(tmp_path / "saved")
    expected = continued(model, cache, text)
    arkcache.detach(model)
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    loaded = ArkCache.load(model, tmp_path / "saved")
    assert loaded.get_seq_length() == 323
    assert loaded.config == cache.config
    assert sum(seen) <= 24  # the probe, and no prompt
    seen.clear()
    assert torch.equal(continued(model, loaded, text), expected)
    assert seen == [1] * 24
    loaded.check_integrity()


def test_layers_that_are_not_paged_are_saved_too(tmp_path: Path) -> None:
    """Sliding windows, of which transformers keeps what is left."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=16,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    cache = ArkCache(model, **SPARSE)
    text = continued(model, cache, prompt(100))
    cache.save(tmp_path / "saved")
    loaded = ArkCache.load(model, tmp_path / "saved")
    assert torch.equal(continued(model, loaded, text), continued(model, cache, text))


def test_notes_and_what_is_loaded_do_not_hang_on_files(tmp_path: Path) -> None:
    """A note is what JSON makes of it; layers of transformers are in memory, not in the files."""
    model = make_model()
    cache = ArkCache(model, **SPARSE)
    text = continued(model, cache, prompt(100))
    cache.save(tmp_path / "saved", note={2: "a", 10: ["b", None]})
    loaded, note = load_cache(model, tmp_path / "saved", lambda *_: None)
    assert note == {"2": "a", "10": ["b", None]}
    for path in (tmp_path / "saved").iterdir():
        path.write_bytes(b"")
    assert torch.equal(continued(model, loaded, text), continued(model, cache, text))


def test_a_cache_in_the_middle_of_a_step_is_not_saved(tmp_path: Path) -> None:
    model = make_model()
    cache = ArkCache(model, **SPARSE)

    def fail(*_: Any) -> None:
        raise RuntimeError("between two layers")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="between two layers"):
        model(prompt(60), past_key_values=cache)
    hook.remove()
    with pytest.raises(InputError, match="interrupted in the middle"):
        cache.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = make_model()
    cache = ArkCache(model, **SPARSE)
    continued(model, cache, prompt(100))
    cache.save(tmp_path / "saved")
    for other, what in (
        (make_model(seed=1), "weights was"),
        (make_model(num_hidden_layers=2), "config was"),
        (make_model(rope_theta=1e6), "config was"),
        (changed(make_model()), "weights was"),
        (make_model().bfloat16(), "dtype was torch.float32 and is torch.bfloat16"),
    ):
        with pytest.raises(SessionError, match=what):
            ArkCache.load(other, tmp_path / "saved")
    same = make_model()
    same.save_pretrained(tmp_path / "model")
    again = type(same).from_pretrained(tmp_path / "model")
    assert ArkCache.load(again, tmp_path / "saved").get_seq_length() == 123


def changed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """All but the first column of a weight is another."""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, 1:] += 1
    return model


def test_other_settings_when_loaded(tmp_path: Path) -> None:
    model = make_model()
    cache = ArkCache(model, **SPARSE)
    text = continued(model, cache, prompt(200))
    cache.save(tmp_path / "saved")
    wide = ArkCache.load(model, tmp_path / "saved", budget_tokens=4096)
    with wide.exact():
        continued(model, wide, text, max_new_tokens=2)
    assert wide.config.budget_tokens == 4096
    assert wide.stats().attended_tokens == 3 * 225
    with pytest.raises(ConfigError, match="layer_count"):
        ArkCache.load(model, tmp_path / "saved", layer_count=3)
    with pytest.raises(SessionError, match="page_size"):
        ArkCache.load(model, tmp_path / "saved", page_size=16)


def test_a_cache_without_its_model_cannot_be_saved(tmp_path: Path) -> None:
    cache = ArkCache(make_model(), **SPARSE)
    with pytest.raises(InputError, match=r"call cache\.attach"):
        cache.save(tmp_path / "saved")


def test_the_two_kinds_of_folders(saved: Path, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(SessionError, match=r"KVCacheManager\.load"):
        ArkCache.load(model, saved)
    ArkCache(model, **SPARSE).save(tmp_path / "other")
    with pytest.raises(SessionError, match=r"ArkCache\.load"):
        KVCacheManager.load(tmp_path / "other")
