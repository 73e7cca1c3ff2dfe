"""Bad input: a clear error before anything changes, and a cache that goes on as if nothing was."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arkcache import (
    ArkCacheError,
    ConfigError,
    HostTierFullError,
    InputError,
    IntegrityError,
    KVCacheManager,
    UnconsumedStepError,
    UnsupportedModelError,
)
from arkcache.layers import sealing
from arkcache.pages.bookkeeping import TokenLog
from arkcache.tiering import host as host_module
from tests.twins import Twins, small_config

LAYERS, HEADS, DIM, COLUMNS = 3, 2, 8, 60


def test_the_tree_of_errors() -> None:
    for error, also in (
        (ConfigError, ValueError),
        (InputError, ValueError),
        (UnsupportedModelError, InputError),
        (HostTierFullError, MemoryError),
        (UnconsumedStepError, RuntimeError),
        (IntegrityError, AssertionError),
    ):
        assert issubclass(error, ArkCacheError)
        assert issubclass(error, also)
    assert not issubclass(HostTierFullError, ValueError)


# -- building a manager ---------------------------------------------------------------------------

GOOD: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "value_dim"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2"])
def test_impossible_sizes(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"{name}={value!r}: expected an integer of at least 1"):
        KVCacheManager(**(GOOD | {name: value}))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"dtype": torch.int64}, InputError, "int64.*expected one of"),
        ({"dtype": "float32"}, InputError, "float32.*expected one of"),
        ({"config": {"page_size": 4}}, ConfigError, "dict.*CacheConfig"),
        ({"config": small_config(budget_tokens=(32,))}, ConfigError, "1 entries.*2 layers"),
        ({"config": small_config(budget_tokens=((32,), 32))}, ConfigError, "2 KV heads"),
        ({"device": "nowhere"}, InputError, "nowhere"),
    ],
)
def test_impossible_managers(settings: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        KVCacheManager(**(GOOD | settings))


# -- calls that do not fit ------------------------------------------------------------------------

Call = Callable[[KVCacheManager], object]


def new(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape or (2, HEADS, 1, DIM), **options)


def append(key: Any = None, value: Any = None, mask: Any = None, layer: Any = 0) -> Call:
    key = new() if key is None else key
    return lambda m: m.append(layer, key, key if value is None else value, mask)


def attend(query: Any = None, layer: Any = 0, **how: Any) -> Call:
    query = new(2, 4, 1, DIM) if query is None else query
    return lambda m: m.attend(layer, query, **how)


def crop(num_columns: Any) -> Call:
    return lambda m: m.crop(num_columns)


def keep(index: Any) -> Call:
    return lambda m: m.keep_sequences(index)


META = {"device": "meta"}
LAYER_ERRORS = [
    (f"{name} layer {layer!r}", call(layer=layer), rf"layer {layer!r}.*0\.\.2")
    for name, call in (("append", append), ("attend", attend))
    for layer in (-1, 3, 1.5, "0")
]
APPEND_ERRORS = [
    ("key of 3 dimensions", append(new(2, HEADS, DIM)), r"key of shape \[2, 2, 8\].*num_kv_heads"),
    ("key of another batch", append(new(3, HEADS, 1, DIM)), r"\[3, 2, 1, 8\].*\[2, 2, 1, 8\]"),
    ("key of another head", append(new(2, 1, 1, DIM)), r"\[2, 1, 1, 8\].*\[2, 2, 1, 8\]"),
    ("key of another dim", append(new(2, HEADS, 1, 9)), r"\[2, 2, 1, 9\].*\[2, 2, 1, 8\]"),
    ("no new token", append(new(2, HEADS, 0, DIM)), "at least one"),
    (
        "value of other tokens",
        append(value=new(2, HEADS, 2, DIM)),
        r"value of shape \[2, 2, 2, 8\]",
    ),
    ("value of another dim", append(value=new(2, HEADS, 1, 4)), r"value of shape \[2, 2, 1, 4\]"),
    ("key of another dtype", append(new(dtype=torch.float16)), r"float16.*float32"),
    ("value of another dtype", append(value=new(dtype=torch.float64)), r"float64.*float32"),
    ("key elsewhere", append(new(**META)), r"meta.*cpu"),
    ("value elsewhere", append(value=new(**META)), r"meta.*cpu"),
    ("mask of other tokens", append(mask=torch.ones(2, 2)), r"mask of shape \[2, 2\].*\[2, 1\]"),
    ("mask of another batch", append(mask=torch.ones(1, 1)), r"mask of shape \[1, 1\].*\[2, 1\]"),
    ("mask of numbers", append(mask=torch.ones(2, 1)), r"float32.*booleans"),
    ("mask of 1 dimension", append(mask=torch.ones(2)), r"mask of shape \[2\].*\[2, 1\]"),
]
QUERY_ERRORS = [
    ("query of 3 dimensions", attend(new(2, 4, DIM)), r"query of shape \[2, 4, 8\]"),
    ("query of another batch", attend(new(1, 4, 1, DIM)), r"\[1, 4, 1, 8\].*batch=2"),
    ("odd number of heads", attend(new(2, 3, 1, DIM)), r"\[2, 3, 1, 8\].*multiple of 2"),
    ("no heads", attend(new(2, 0, 1, DIM)), r"\[2, 0, 1, 8\].*multiple of 2"),
    ("no query", attend(new(2, 4, 0, DIM)), r"1 to 60 new tokens"),
    ("more queries than tokens", attend(new(2, 4, 61, DIM)), r"61.*1 to 60 new tokens"),
    ("query of another dim", attend(new(2, 4, 1, 9)), r"\[2, 4, 1, 9\].*head_dim=8"),
    ("query of another dtype", attend(new(2, 4, 1, DIM, dtype=torch.float64)), "float64.*float32"),
    ("queries of another dtype", attend(new(2, 4, 3, DIM, dtype=torch.half)), "float16.*float32"),
    ("query elsewhere", attend(new(2, 4, 1, DIM, **META)), "meta.*cpu"),
]
BAD_MASKS = [(60,), (1, 60), (1, 1, 60), (1, 1, 1, 59), (1, 1, 1, 61), (1, 2, 1, 60)]
BAD_MASKS += [(3, 1, 1, 60), (1, 1, 2, 60), (1, 1, 1, 1)]
MASK_ERRORS = [
    (f"mask of shape {list(shape)}", attend(mask=new(*shape)), r"mask of shape \[.*\[2, 4, 1, 60\]")
    for shape in BAD_MASKS
]
OPTION_ERRORS = [
    ("mask of integers", attend(mask=new(1, 1, 1, 60, dtype=torch.long)), r"int64.*booleans"),
    ("sinks of another number", attend(sinks=new(3)), r"sinks of shape \[3\].*num_heads=4"),
    ("sinks elsewhere", attend(sinks=new(4, **META)), "sinks.*meta.*cpu"),
    ("attention mask elsewhere", attend(mask=new(1, 1, 1, 60, **META)), "mask.*meta.*cpu"),
    ("softcap of zero", attend(softcap=0.0), "softcap=0.0"),
    ("index query of another dim", attend(index_query=new(2, 4, 1, 5)), "index_query.*5"),
    ("index query of other heads", attend(index_query=new(2, 3, 1, DIM)), "index_query.*3"),
]
STATE_ERRORS = [
    *((f"crop {n!r}", crop(n), rf"crop\({n!r}\).*60") for n in (-1, 61, 2.5, True, "3", None)),
    *(
        (f"sequences {index!r}", keep(index), r"sequences .*0\.\.1")
        for index in ([], [2], [-3], [0, 5], [[0]], [0.5], [True, False], ["a"], [[0], [1, 0]], 0)
    ),
    ("no sequences", keep(torch.empty(0)), r"0\.\.1"),
    ("a mask of sequences", keep(torch.tensor([True, False])), r"0\.\.1"),
    ("fractional sequences", keep(np.array([0.0, 1.0])), r"0\.\.1"),
]
ERRORS = [
    *LAYER_ERRORS,
    *APPEND_ERRORS,
    *QUERY_ERRORS,
    *MASK_ERRORS,
    *OPTION_ERRORS,
    *STATE_ERRORS,
]


def filled(**settings: Any) -> Twins:
    """A dense layer and two paged ones, one sequence padded on the left."""
    config = small_config(**({"num_dense_layers": 1} | settings))
    twins = Twins(config, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM)
    twins.append(COLUMNS, torch.arange(COLUMNS) >= torch.tensor([[0], [24]]))
    twins.attend()
    return twins


def assert_refused(twins: Twins, call: Call, error: type[Exception], words: str) -> None:
    """The call fails with these words; counters, contents and answers are what they were."""
    query = [twins.query() for _ in range(LAYERS)]
    outputs = [twins.attend_layer(layer, query[layer]) for layer in range(LAYERS)]
    stats = twins.manager.stats()
    with pytest.raises(error, match=words) as caught:
        call(twins.manager)
    assert isinstance(caught.value, ArkCacheError)
    assert twins.manager.stats() == stats
    twins.check()
    again = [twins.attend_layer(layer, query[layer]) for layer in range(LAYERS)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


def assert_goes_on(twins: Twins) -> None:
    """A later valid call works."""
    twins.append(9)
    twins.attend()
    twins.attend(3)
    twins.check()


@pytest.mark.parametrize(
    ("call", "words"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS]
)
def test_bad_calls_change_nothing(call: Call, words: str) -> None:
    twins = filled()
    assert_refused(twins, call, InputError, words)
    assert_goes_on(twins)


def test_attend_before_append() -> None:
    manager = KVCacheManager(LAYERS, HEADS, DIM, small_config())
    with pytest.raises(InputError, match="layer 0 holds no tokens yet: append before attend"):
        manager.attend(0, new(2, 4, 1, DIM))
    manager.append(0, new(), new())
    with pytest.raises(InputError, match="layer 1 holds no tokens yet"):
        manager.attend(1, new(2, 4, 1, DIM))


@pytest.mark.parametrize("call", [append(new(2, 1, 1, DIM)), append(new(**META)), append(layer=9)])
def test_a_bad_first_append_allocates_nothing(call: Call) -> None:
    """Another batch may follow."""
    twins = Twins(small_config(), num_layers=LAYERS, batch=3)
    with pytest.raises(InputError):
        call(twins.manager)
    assert twins.manager.batch == 0
    twins.check()
    assert_goes_on(twins)


def test_an_error_between_two_layers() -> None:
    """The layers that received the step keep it; the one that refused receives it again."""
    twins = filled()
    twins.append_layer(0, 5)
    with pytest.raises(InputError):
        twins.manager.append(1, new(2, HEADS, 5, DIM + 1), new(2, HEADS, 5, DIM + 1))
    assert [twins.manager.columns_of(layer) for layer in range(3)] == [65, 60, 60]
    twins.append_layer(1, 5)
    twins.append_layer(2, 5)
    assert_goes_on(twins)


def test_empty_caches_accept_what_means_nothing() -> None:
    manager = KVCacheManager(LAYERS, HEADS, DIM, small_config())
    manager.crop(0)
    manager.reset()
    manager.keep_sequences(torch.tensor([0]))
    manager.check_integrity()
    with pytest.raises(InputError, match=r"crop\(1\)"):
        manager.crop(1)


# -- a host tier that is full ---------------------------------------------------------------------


def pages(twins: Twins) -> int:
    return twins.manager.stats().host_bytes // twins.whole_page_bytes


def whole_page_bytes() -> int:
    return Twins(small_config()).whole_page_bytes


def test_a_full_host_tier_refuses_at_the_first_layer() -> None:
    """Room for the first layer but not for all is no room: the error comes before any changed."""
    twins = filled(host_bytes=(2 * (14 + 8) + 1) * whole_page_bytes())
    held = pages(twins)
    assert held == 2 * (14 + 8)
    step = new(2, HEADS, 4, DIM)
    for layer in range(LAYERS):  # whichever layer is the first to hear of the new columns
        assert_refused(twins, append(step, layer=layer), HostTierFullError, "host_bytes")
        assert [twins.manager.columns_of(i) for i in range(LAYERS)] == [60, 60, 60]
    twins.append(1)  # fits the windows
    twins.attend()
    twins.crop(30)  # and giving pages back makes room
    assert pages(twins) < held
    twins.append(10)
    assert_goes_on(twins)


def test_an_append_that_is_interrupted_while_it_logs_padding_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its padding must not become that of the columns that come instead."""
    twins, extend = filled(), TokenLog.extend

    def interrupted(log: TokenLog, *columns: Any) -> None:
        extend(log, *columns)
        log.num_columns -= 4  # as between the two things that it does
        raise KeyboardInterrupt

    padding = torch.tensor([[False, True, True, True]] * 2)
    step = new(2, HEADS, 4, DIM)
    monkeypatch.setattr(TokenLog, "extend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        twins.manager.append(0, step, step, padding)
    monkeypatch.undo()
    twins.append(4)
    assert_goes_on(twins)


def test_the_message_says_how_much_is_held_and_needed() -> None:
    twins = filled(host_bytes=47 * whole_page_bytes())
    with pytest.raises(HostTierFullError) as caught:
        twins.append(40)
    message = str(caught.value)
    for number in (44 * whole_page_bytes(), 47 * whole_page_bytes(), 2 * 20 * whole_page_bytes()):
        assert str(number) in message


def test_a_prompt_that_does_not_fit_leaves_an_empty_cache() -> None:
    twins = Twins(small_config(host_bytes=20 * whole_page_bytes()), num_layers=LAYERS, batch=3)
    with pytest.raises(HostTierFullError):
        twins.manager.append(0, new(1, HEADS, 100, DIM), new(1, HEADS, 100, DIM))
    assert twins.manager.batch == 0
    twins.check()
    assert_goes_on(twins)


def test_a_cropped_cache_stays_as_it_was() -> None:
    """Even where nothing is left in it."""
    twins = filled(host_bytes=60 * whole_page_bytes())
    twins.crop(0)
    stats = twins.manager.stats()
    with pytest.raises(HostTierFullError):
        twins.manager.append(0, new(2, HEADS, 200, DIM), new(2, HEADS, 200, DIM))
    assert twins.manager.stats() == stats
    assert twins.manager.batch == 2
    assert_goes_on(twins)


def test_the_limit_itself_is_usable() -> None:
    """Exactly as many pages as fit, and not one more."""
    twins = Twins(small_config(host_bytes=24 * whole_page_bytes()), batch=1)
    twins.append(100 + 3)
    assert pages(twins) == 24
    with pytest.raises(HostTierFullError):
        twins.manager.append(0, new(1, HEADS, 1, DIM), new(1, HEADS, 1, DIM))
    twins.attend()
    twins.check()


def test_copies_share_the_limit() -> None:
    twins = filled(host_bytes=60 * whole_page_bytes())
    clone = copy.deepcopy(twins)
    clone.append(12)
    assert_refused(twins, append(new(2, HEADS, 12, DIM)), HostTierFullError, "host_bytes")
    clone.reset()
    twins.append(12)
    assert_goes_on(Twins(small_config()))
    twins.attend()
    twins.check()


@pytest.mark.parametrize("room", [0, 2, 4])
def test_room_taken_by_a_copy_between_two_layers(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each append is refused whole or done whole, whoever took the room."""
    monkeypatch.setattr(sealing, "SEAL_PAGES", 1)
    twins = filled(host_bytes=(44 + 6 + 12 + room) * whole_page_bytes())
    clone = copy.deepcopy(twins)
    twins.append_layer(0, 12)
    twins.append_layer(1, 12)
    clone.append(12)
    columns = [twins.manager.columns_of(layer) for layer in range(LAYERS)]
    with pytest.raises(HostTierFullError):
        twins.manager.append(2, new(2, HEADS, 12, DIM), new(2, HEADS, 12, DIM))
    assert [twins.manager.columns_of(layer) for layer in range(LAYERS)] == columns
    twins.check()
    clone.reset()
    twins.append_layer(2, 12)
    assert_goes_on(clone)
    twins.attend()
    twins.check()


def test_refused_address_space_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may refuse the mapping when the first page is sealed."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    twins = Twins(small_config(), num_layers=LAYERS)
    twins.append(7)
    twins.attend()
    with monkeypatch.context() as patch:
        patch.setattr(host_module.mmap, "mmap", refuse)
        assert_refused(twins, append(new(2, HEADS, 9, DIM)), HostTierFullError, "host_bytes")
        assert [twins.manager.columns_of(layer) for layer in range(LAYERS)] == [7, 7, 7]
    twins.append(9, torch.rand(2, 9) < 0.5)
    assert_goes_on(twins)
