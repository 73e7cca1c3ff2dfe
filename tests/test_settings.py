"""Settings from outside: which file, which variable, what counts first, what an error names."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from arkcache import CacheConfig, ConfigError, load_config
from arkcache.config import BACKENDS, GROUP_REDUCTIONS, INDEXES, ROTATIONS, SHARE_MEAN
from arkcache.settings import find_file, from_environment, gather


def written(value: Any) -> str:
    """A field's value as it is written in TOML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(written, value))}]"
    return '"none"' if value is None else json.dumps(value)


BITS = st.sampled_from((16, 8, 4, 2))
LEAF = st.one_of(st.integers(2048, 1 << 40), st.just("auto"))
LAYER = st.one_of(LEAF, st.none(), st.lists(LEAF, min_size=1, max_size=3).map(tuple))
SETTINGS = {
    "page_size": st.one_of(st.none(), st.integers(1, 128)),
    "budget_tokens": st.one_of(LAYER, st.lists(LAYER, min_size=1, max_size=3).map(tuple)),
    "num_sink_tokens": st.integers(0, 64),
    "num_recent_tokens": st.integers(1, 256),
    "device_pool_factor": st.one_of(st.none(), st.floats(1, 1e9), st.integers(1, 9)),
    "key_bits": BITS,
    "value_bits": BITS,
    "rotation": st.sampled_from(ROTATIONS),
    "coarse_key_bits": st.one_of(st.none(), BITS),
    "demote_below": st.floats(0, 1e300),
    "packed_slots": st.sampled_from((None, True, False)),
    "backend": st.sampled_from(BACKENDS),
    "speculative_recall": st.booleans(),
    "index": st.sampled_from(INDEXES),
    "group_reduction": st.sampled_from((SHARE_MEAN, *GROUP_REDUCTIONS)),
    "estimate_pages": st.one_of(st.none(), st.integers(0, 1 << 70)),
    "target_missed_mass": st.one_of(st.none(), st.floats(1e-6, 0.999)),
    "device_bytes": st.one_of(st.none(), st.integers(1, 1 << 50)),
}


@given(settings=st.fixed_dictionaries({}, optional=SETTINGS))
def test_what_is_written_is_what_is_loaded(
    settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        config = CacheConfig(**settings)
    except ConfigError:
        assume(False)
    file = tmp_path_factory.getbasetemp() / "round-trip.toml"
    values = asdict(config)
    file.write_text("".join(f"{name} = {written(value)}\n" for name, value in values.items()))
    assert load_config(file, environ={}) == config
    environ = {f"ARKCACHE_{name.upper()}": written(value) for name, value in values.items()}
    assert load_config(os.devnull, environ=environ) == config
    assert load_config(os.devnull, environ={}, **values) == config


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("budget_tokens", "4096", 4096),
        ("budget_tokens", "none", None),
        ("budget_tokens", '[2048, "none", [512, 1_024]]', (2048, None, (512, 1024))),
        ("device_bytes", "2GiB", 2 << 30),
        ("host_bytes", "500 MB", 500_000_000),
        ("packed_slots", "True", True),
        ("packed_slots", "none", None),
        ("rotation", "none", "none"),
        ("rotation", '"keys"', "keys"),
        ("page_size", "none", None),
        ("demote_below", "1", 1),
    ],
)
def test_words_of_the_environment(name: str, text: str, expected: object) -> None:
    found = from_environment({f"ARKCACHE_{name.upper()}": text})
    assert found[name].value == expected
    assert type(found[name].value) is type(expected)


def test_the_environment_counts_before_the_file_and_arguments_before_both(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("page_size = 16\nbudget_tokens = 1024\nnum_recent_tokens = 64\n")
    environ = {"ARKCACHE_BUDGET_TOKENS": "512", "ARKCACHE_NUM_RECENT_TOKENS": "48"}
    config = load_config(file, environ=environ, num_recent_tokens=40)
    assert (config.page_size, config.budget_tokens, config.num_recent_tokens) == (16, 512, 40)
    sources = {name: one.source for name, one in gather(file, environ).items()}
    assert sources == {
        "page_size": f"{file}:1",
        "budget_tokens": "ARKCACHE_BUDGET_TOKENS",
        "num_recent_tokens": "ARKCACHE_NUM_RECENT_TOKENS",
    }


def test_a_value_that_is_overruled_need_not_be_possible(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("budget_tokens = 1\n")
    assert load_config(file, environ={}, budget_tokens=512).budget_tokens == 512


def test_which_file_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"HOME": str(tmp_path / "home")}
    assert find_file(environ) is find_file({}) is None
    places = [
        (tmp_path / "home" / ".config" / "arkcache" / "config.toml", {}),
        (tmp_path / "xdg" / "arkcache" / "config.toml", {"XDG_CONFIG_HOME": f"{tmp_path}/xdg"}),
        (tmp_path / "arkcache.toml", {}),
        (tmp_path / "named.toml", {"ARKCACHE_CONFIG": str(tmp_path / "named.toml")}),
    ]
    for number, (place, more) in enumerate(places, start=1):
        environ |= more
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"demote_after = {number}\n")
        assert load_config(environ=environ).demote_after == number
    assert load_config(places[0][0], environ=environ).demote_after == 1


def test_a_config_by_itself_reads_nothing(tmp_path: Path) -> None:
    (tmp_path / "arkcache.toml").write_text("page_size = 16\nnonsense = 1\n")
    root = Path(__file__).resolve().parents[1]
    environ = os.environ | {"PYTHONPATH": str(root), "ARKCACHE_PAGE_SIZE": "64"}
    code = "from arkcache import CacheConfig; print(CacheConfig() == CacheConfig(page_size=None))"
    printed = subprocess.check_output(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, text=True
    )
    assert printed.strip() == "True"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\npage_sise = 8", "mine.toml:2: unknown setting 'page_sise': did you mean page_size?"),
        ("zzz = 8", "mine.toml:1: unknown setting 'zzz': expected one of page_size, budget_tokens"),
        ("\n[cache]\npage_size = 8", "mine.toml:2: unknown setting 'cache'"),
        ("# x\n\npage_size = 'x'", "mine.toml:3: page_size = 'x': expected an integer or \"none\""),
        ("page_size = true", "mine.toml:1: page_size = True: expected an integer"),
        ("page_size = 8.0", "mine.toml:1: page_size = 8.0: expected an integer"),
        (
            "page_size = 0",
            r"page_size=0: expected an integer of at least 1 \(page_size from .*:1\)",
        ),
        ("index = 4", "mine.toml:1: index = 4: expected a string"),
        ("index = 'best'", r"index='best': expected one of .* \(index from .*mine.toml:1\)"),
        ("speculative_recall = 1", "speculative_recall = 1: expected true or false"),
        ("demote_below = 'low'", "demote_below = 'low': expected a number"),
        ("host_bytes = '2 pigs'", "host_bytes = '2 pigs': expected bytes, as in 2GiB"),
        ("budget_tokens = [[[1]]]", 'expected an integer, "auto", "none", or a list'),
        ("budget_tokens = []", 'expected an integer, "auto", "none", or a list'),
        ("page_size = 8\npage_size = 8", "mine.toml: expected settings in TOML: .*line 2"),
        ("page_size = ", "mine.toml: expected settings in TOML: .*line 1"),
        ("coarse_key_bits = 16", r"coarse format .* \(coarse_key_bits from .*mine.toml:1\)"),
    ],
)
def test_a_mistake_in_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text + "\n")
    with pytest.raises(ConfigError, match=message):
        load_config(file, environ={})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none.toml: No such file"):
        load_config(environ={"ARKCACHE_CONFIG": str(tmp_path / "none.toml")})
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        load_config(tmp_path, environ={})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ConfigError, match=r"binary.toml: expected settings in TOML: 'utf-8'"):
        load_config(tmp_path / "binary.toml", environ={})


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("PAGE_SISE", "8", "ARKCACHE_PAGE_SISE, which is no setting: did you mean ARKCACHE_PAGE_S"),
        ("page_size", "8", "ARKCACHE_page_size, which is no setting: did you mean ARKCACHE_PAGE_S"),
        ("PAGE_SIZE", "big", "ARKCACHE_PAGE_SIZE: page_size = 'big': expected an integer"),
        ("PAGE_SIZE", "1\nindex_bits = 4", "ARKCACHE_PAGE_SIZE: page_size = .*: expected an int"),
        ("PAGE_SIZE", "-1", r"page_size=-1: .* \(page_size from ARKCACHE_PAGE_SIZE\)"),
        ("PACKED_SLOTS", "1", 'packed_slots = 1: expected true or false or "none"'),
    ],
)
def test_a_mistake_in_the_environment(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(os.devnull, environ={f"ARKCACHE_{variable}": text})


def test_an_empty_variable_is_none() -> None:
    assert load_config(os.devnull, environ={"ARKCACHE_PAGE_SIZE": ""}) == CacheConfig()


def test_an_argument_that_is_wrong_names_no_source() -> None:
    with pytest.raises(ConfigError, match=r"at least 1$"):
        load_config(os.devnull, environ={"ARKCACHE_INDEX": "tokens"}, page_size=0)
    with pytest.raises(ConfigError, match="unknown setting 'page'"):
        load_config(os.devnull, environ={}, page=0)


def test_every_field_can_be_given() -> None:
    """A kind of field that nobody thought of would fail here."""
    for field in fields(CacheConfig):
        variable = f"ARKCACHE_{field.name.upper()}"
        default = getattr(CacheConfig(), field.name) if field.name != "page_size" else None
        assert from_environment({variable: written(default)})[field.name].value == default
