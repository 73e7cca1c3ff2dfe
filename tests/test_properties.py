"""Random traces against the dense oracle: whatever is done to a cache, it answers as one would."""

import copy
import os
import pickle
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from torch import Tensor

from arkcache import CacheConfig, KVCacheManager, SessionError
from arkcache.config import GROUP_REDUCTIONS, INDEXES, MASS_INDEXES, SHARE_MEAN
from tests.marks import needs_interpreter
from tests.twins import Twins, check_references

NUM_LAYERS, NUM_KV_HEADS, MAX_COLUMNS = 2, 2, 320


@st.composite
def formats(draw: st.DrawFn, index: str, head_dim: int, value_dim: int) -> dict[str, Any]:
    """How pages are sealed, and whether they are demoted later."""
    key_bits, value_bits = draw(st.sampled_from([(16, 16), (8, 4), (4, 2), (2, 16), (16, 4)]))
    settings: dict[str, Any] = {"key_bits": key_bits, "value_bits": value_bits}
    settings["group_size"] = draw(
        st.sampled_from([size for size in range(1, value_dim + 1) if value_dim % size == 0])
    )
    if draw(st.booleans()) and value_bits > 2:
        settings["coarse_value_bits"] = 2
        settings["demote_after"] = draw(st.integers(0, 3))
        settings["demote_below"] = draw(st.sampled_from([0.5, 1.0, 2.0]))
    else:
        settings["packed_slots"] = draw(st.sampled_from([None, True]))
    # A token's code, and with it a page's rating, may hang on the rounding of a rotation.
    keys, values = head_dim % 2 == 0 and index != "tokens", value_dim % 2 == 0
    fits = {"none": True, "keys": keys, "values": values, "both": keys and values}
    settings["rotation"] = draw(st.sampled_from([name for name, fit in fits.items() if fit]))
    return settings


@st.composite
def configs(
    draw: st.DrawFn, head_dim: int, value_dim: int, backend: str, folder: str
) -> CacheConfig:
    """Every setting, at sizes that a few dozen tokens outgrow; some with a tier in that folder."""
    index = draw(st.sampled_from(INDEXES))
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    sinks = draw(st.integers(0, 2 * page_size))
    recent = draw(st.integers(1, 2 * page_size + 2))
    segment = page_size * draw(st.sampled_from([2, 4]))
    may_group = backend != "triton" and index in MASS_INDEXES
    grouping = draw(st.sampled_from([None, None, "similar"])) if may_group else None
    sealed = page_size if grouping is None else segment
    least = -(-sinks // page_size) * page_size + recent + sealed
    budget = st.integers(least, least + 4 * page_size)
    limited = budget | st.none()
    per_head = st.tuples(*[budget] * NUM_KV_HEADS)
    whole = budget | st.tuples(*[limited | per_head] * NUM_LAYERS)
    page_format = draw(formats(index, head_dim, value_dim))
    if backend == "triton":
        page_format = {k: v for k, v in page_format.items() if not k.startswith("coarse")}
    target = None
    if backend != "triton" and index in MASS_INDEXES:
        target = draw(st.sampled_from([None, 0.01, 0.2, 0.7]))
    if "coarse_value_bits" not in page_format and target is None:
        whole |= st.none()
    estimates = st.just(0) if backend == "triton" else st.sampled_from([0, 0, None, 1, 3])
    if grouping is not None:
        estimates = st.sampled_from([None, 1, 3])
    may_lie_there = backend != "triton" and "coarse_value_bits" not in page_format
    return CacheConfig(
        page_size=page_size,
        num_sink_tokens=sinks,
        num_recent_tokens=recent,
        budget_tokens=draw(whole),
        num_dense_layers=draw(st.integers(0, 1)),
        device_pool_factor=draw(st.sampled_from([1, 1.5, 3])),
        index=index,
        index_bits=draw(st.sampled_from([None, None, 2, 4, 8])),
        group_reduction=draw(st.sampled_from((SHARE_MEAN, *GROUP_REDUCTIONS))),
        estimate_pages=draw(estimates),
        grouping=grouping,
        segment_tokens=segment,
        target_missed_mass=target,
        audit_every=None if backend == "triton" else draw(st.sampled_from([None, None, 1, 2])),
        stream_block_tokens=page_size * draw(st.sampled_from([1, 3, 8])),
        backend=backend,
        host_path=draw(st.sampled_from([None, None, folder])) if may_lie_there else None,
        **page_format,
    )


@st.composite
def padding(draw: st.DrawFn, batch: int, new_tokens: int) -> Tensor | None:
    """Which of the new columns hold tokens: all, all but a left margin, or any."""
    kind = draw(st.sampled_from(["none", "none", "left", "holes"]))
    if kind == "none":
        return None
    if kind == "left":
        margin = draw(st.lists(st.integers(0, new_tokens), min_size=batch, max_size=batch))
        return torch.arange(new_tokens) >= torch.tensor(margin)[:, None]
    seed = draw(st.integers(0, 1000))
    return torch.rand(batch, new_tokens, generator=torch.Generator().manual_seed(seed)) < 0.6


@st.composite
def options(draw: st.DrawFn, twins: Twins, new_tokens: int) -> dict[str, Any]:
    """What else `attend` takes."""
    how: dict[str, Any] = {}
    heads = twins.num_kv_heads * twins.group
    if draw(st.booleans()):
        how["scale"] = draw(st.sampled_from([0.1, 1.0]))
    if draw(st.integers(0, 3)) == 0:
        how["softcap"] = 2.0
    if draw(st.integers(0, 3)) == 0:
        how["sinks"] = twins.randn(heads)
    if draw(st.integers(0, 3)) == 0:
        shape = (
            draw(st.sampled_from([1, twins.batch])),
            draw(st.sampled_from([1, heads])),
            draw(st.sampled_from([1, new_tokens])),
            twins.oracle.num_columns,
        )
        mask = twins.randn(*shape)
        how["mask"] = mask > -1 if draw(st.booleans()) else mask
    return how


class Conversations(RuleBasedStateMachine):
    """Caches that grow, are cropped, reordered, copied and read in any order."""

    caches: Bundle[Twins] = Bundle("caches")
    backend = "auto"

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Twins] = []
        self.folder = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda _: None)  # thousands of them: no power fails here

    @initialize(
        target=caches,
        batch=st.integers(1, 3),
        group=st.integers(1, 3),
        head_dim=st.sampled_from([8, 6, 5]),
        value_dim=st.sampled_from([None, 3, 4]),
        seed=st.integers(0, 1000),
        pages=st.sampled_from([0, 5, 11, 17]),
        data=st.data(),
    )
    def begin(self, seed: int, pages: int, data: st.DataObject, **sizes: Any) -> Twins:
        """A prompt that fills some pages, or an empty cache."""
        head_dim = sizes["head_dim"]
        config = data.draw(
            configs(head_dim, sizes["value_dim"] or head_dim, self.backend, self.folder.name)
        )
        twins = Twins(
            config, num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, seed=1000 * seed, **sizes
        )
        self.alive.append(twins)
        if pages:
            columns = min(MAX_COLUMNS, pages * config.page_size + config.num_recent_tokens)
            twins.append(columns, data.draw(padding(twins.batch, columns)))
        return twins

    @rule(twins=caches, data=st.data(), most=st.sampled_from([1, 1, 8, 100]))
    def step(self, twins: Twins, data: st.DataObject, most: int) -> None:
        """What a model does: append and attend the same tokens, layer by layer."""
        new_tokens = data.draw(st.integers(1, most))
        if twins.oracle.num_columns + new_tokens > MAX_COLUMNS:
            return
        mask = data.draw(padding(twins.batch, new_tokens))
        for layer in range(NUM_LAYERS):
            twins.append_layer(layer, new_tokens, mask)
            twins.attend_layer(layer, twins.query(new_tokens))

    @rule(twins=caches, new_tokens=st.integers(1, 100), data=st.data())
    def append(self, twins: Twins, new_tokens: int, data: st.DataObject) -> None:
        if twins.oracle.num_columns + new_tokens <= MAX_COLUMNS:
            twins.append(new_tokens, data.draw(padding(twins.batch, new_tokens)))

    @rule(
        twins=caches,
        data=st.data(),
        most=st.sampled_from([1, 1, 1, 20]),
        size=st.sampled_from([1.0, 1.0, 50.0]),
    )
    def attend(self, twins: Twins, data: st.DataObject, most: int, size: float) -> None:
        """Any of the newest tokens, again and with other queries; sharp ones too."""
        if twins.oracle.num_columns == 0:
            return
        new_tokens = data.draw(st.integers(1, min(most, twins.oracle.num_columns)))
        how = data.draw(options(twins, new_tokens))
        twins.attend(new_tokens, size=size, **how)

    @rule(twins=caches, size=st.sampled_from([1.0, 20.0]), detours=st.integers(1, 4))
    def repeat(self, twins: Twins, size: float, detours: int) -> None:
        """The same query gives the same output, whatever was recalled and evicted in between."""
        if twins.oracle.num_columns == 0:
            return
        queries = [twins.query(size=size) for _ in range(NUM_LAYERS)]
        first = [twins.manager.attend(layer, query) for layer, query in enumerate(queries)]
        for _ in range(detours):
            for layer in range(NUM_LAYERS):
                twins.manager.attend(layer, twins.query(size=size))
        again = [twins.manager.attend(layer, query) for layer, query in enumerate(queries)]
        for before, after in zip(first, again, strict=True):
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)

    @rule(twins=caches, share=st.sampled_from([0.0, 0.3, 0.6, 0.9]))
    def crop(self, twins: Twins, share: float) -> None:
        """A retry from further back."""
        twins.crop(round(twins.oracle.num_columns * share))

    @rule(twins=caches, drop=st.integers(1, 6))
    def crop_few(self, twins: Twins, drop: int) -> None:
        """Rejected drafts."""
        twins.crop(max(0, twins.oracle.num_columns - drop))

    @rule(twins=caches, data=st.data())
    def keep_sequences(self, twins: Twins, data: st.DataObject) -> None:
        """Reorder, duplicate and drop."""
        if twins.oracle.batch:
            sequence = st.integers(0, twins.oracle.batch - 1)
            twins.keep_sequences(data.draw(st.lists(sequence, min_size=1, max_size=3)))

    @rule(twins=caches, really=st.sampled_from([False, False, True]))
    def reset(self, twins: Twins, really: bool) -> None:
        if really:
            twins.reset()

    @precondition(lambda self: len(self.alive) < 3)
    @rule(target=caches, twins=caches, how=st.sampled_from(["deepcopy", "pickle", "saved"]))
    def duplicate(self, twins: Twins, how: str) -> Any:
        """A copy lives its own life, and so does what it was copied from."""
        if how == "pickle" and twins.config.host_path is None:
            clone = pickle.loads(pickle.dumps(twins))
        else:
            clone = copy.deepcopy(twins)
        if how == "saved":
            twins.manager.save(self.saved)
            clone.manager = KVCacheManager.load(self.saved)
        self.alive.append(clone)
        return multiple(clone)

    @property
    def saved(self) -> Path:
        return Path(self.folder.name) / "saved"

    @rule(twins=caches, seed=st.integers(0, 1 << 20))
    def damage(self, twins: Twins, seed: int) -> None:
        """A flipped bit or an end that is missing, in any file of a saved cache: an error, or what
        was saved; and saving again mends it."""
        chance = random.Random(seed)
        twins.manager.save(self.saved)
        # A linked file is that of the tier itself.
        own = [path for path in self.saved.iterdir() if path.stat().st_size < 1 << 20]
        path = chance.choice(sorted(own))
        content = bytearray(path.read_bytes())
        if content and chance.random() < 0.7:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            del content[chance.randrange(len(content) + 1) :]
        path.write_bytes(content)
        try:
            loaded = KVCacheManager.load(self.saved)
        except SessionError:
            loaded = None
        for layer in range(NUM_LAYERS if loaded is not None and loaded.batch else 0):
            held = twins.manager.gather(layer)
            assert all(map(torch.equal, loaded.gather(layer), held))
        if len(own) == 1:  # a header alone, and damaged, may be anybody's
            shutil.rmtree(self.saved)

    @invariant()
    def metadata_balances(self) -> None:
        for twins in self.alive:
            twins.check()
        check_references([twins.manager for twins in self.alive])

    def teardown(self) -> None:
        """Nothing that happened to one cache shows in another; all memory is given back."""
        hosts = {id(t.manager._host): t.manager._host for t in self.alive}
        for twins in self.alive:
            if twins.oracle.num_columns:
                twins.attend(min(3, twins.oracle.num_columns))
                twins.attend()
            twins.reset()
            twins.check()
        # What was saved of a tier in a file stays there.
        assert all(host is None or host.num_pieces == len(host._kept) for host in hosts.values())
        self.folder.cleanup()
        self.patch.undo()


common = {"deadline": None, "suppress_health_check": list(HealthCheck)}

TestConversations = Conversations.TestCase
TestConversations.settings = settings(max_examples=60, stateful_step_count=20, **common)


class OnKernels(Conversations):
    """The same on the kernels of the GPU, interpreted."""

    backend = "triton"


@pytest.mark.slow
class TestManyConversations(Conversations.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(max_examples=400, stateful_step_count=40, **common)


@pytest.mark.slow
@needs_interpreter
class TestManyOnKernels(OnKernels.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(max_examples=20, stateful_step_count=10, **common)
