"""Demotion in a cache: pages that nobody attends are rewritten in the coarse format."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from arkcache import HostTierFullError, KVCacheManager
from arkcache.formats import PageFormat, PageLayout
from tests.quantised import config_of
from tests.twins import Twins, check_references, follow_demotions

HOT = [{2, 5, 9}, {3, 7}]
"""Per KV head, the pages that are attended."""

AFTER = 8


class Attended:
    """A cache in which all attention goes to `HOT`: their keys point where queries do."""

    def __init__(
        self, batch: int = 1, name: str = "K8V4+K4V2", num_layers: int = 1, **settings: Any
    ) -> None:
        config = config_of(name, demote_after=AFTER, demote_below=0.5, **settings)
        self.twins = Twins(config, batch=batch, group=1, num_layers=num_layers)
        self.sealed_at: list[int] = []
        self.steps = 0
        key = self.twins.randn(batch, 2, 60, 8) * 0.1
        key[..., 0] = -5.0
        for head, pages in enumerate(HOT):
            for page in pages:
                key[:, head, 4 * page : 4 * page + 4, 0] = 5.0
        self.append(key)

    def append(self, key: Tensor) -> None:
        value = self.twins.randn(*key.shape)
        for layer in range(self.twins.num_layers):
            self.twins.manager.append(layer, key, value)
            self.twins.oracle.append(layer, key, value)
        follow_demotions(self.twins.manager, self.twins.oracle)
        new_pages = self.twins.oracle.sealed(0, 0) - len(self.sealed_at)
        self.sealed_at += [self.steps] * new_pages

    def step(self) -> None:
        """A token that nobody attends, and the attention of both heads to what is hot."""
        key = self.twins.randn(self.twins.batch, 2, 1, 8) * 0.1
        key[..., 0] = -5.0
        self.append(key)
        query = torch.zeros(self.twins.batch, 2, 1, 8)
        query[..., 0] = 5.0
        for layer in range(self.twins.num_layers):
            self.twins.attend_layer(layer, query, scale=1.0)
        self.steps += 1

    def fine(self) -> list[set[int]]:
        """Per row, the pages in the first format: those that the manager says are not coarse."""
        oracle = self.twins.oracle
        follow_demotions(self.twins.manager, oracle)
        return [
            {p for p in range(oracle.sealed(0, s)) if (s, h, p) not in oracle.coarse[0]}
            for s in range(oracle.batch)
            for h in range(self.twins.num_kv_heads)
        ]

    def expected(self, steps: int) -> list[set[int]]:
        """Per KV head: the sinks, what is hot and what is too young to be judged."""
        young = {page for page, at in enumerate(self.sealed_at) if steps - at < AFTER}
        return [{0} | hot | young for hot in HOT]


def demoted(**settings: Any) -> Attended:
    """A cache in which pages have just been demoted."""
    cache = Attended(**settings)
    while not cache.twins.manager.stats().pages_demoted:
        cache.step()
    return cache


def test_pages_that_nobody_attends_are_demoted() -> None:
    """At the first page that is sealed after they have been judged, and only those."""
    cache = Attended(batch=2)
    for _ in range(30):
        before = cache.steps
        num_pages = len(cache.sealed_at)
        cache.step()
        if len(cache.sealed_at) > num_pages:
            assert cache.fine() == cache.expected(before) * 2
    cache.twins.check()
    num_fine = sum(map(len, cache.fine()))
    assert num_fine == 2 * (4 + 3) + 2 * 2 * (len(cache.sealed_at) - 14 - 5)
    num_coarse = 2 * 2 * len(cache.sealed_at) - num_fine
    assert cache.twins.manager.stats().pages_demoted == num_coarse


def test_residents_are_rewritten() -> None:
    """What is attended is the same whether a page stayed or is recalled."""
    cache = demoted()
    for head, fine in enumerate(cache.fine()):
        # Fewer pages stayed fine than are resident, and the last was sealed just now.
        assert len(fine - {0}) - 1 < cache.twins.oracle.num_selected(0, head)
    cache.twins.check()
    for _ in range(20):
        cache.twins.attend(size=3.0)
    cache.twins.check()


def test_host_bytes_shrink_by_what_was_demoted() -> None:
    cache = Attended()
    twins, coarse_format = cache.twins, cast("PageFormat", cache.twins.config.coarse_format)
    fine_bytes, coarse_bytes = twins.page_bytes(), twins.page_bytes(coarse_format)
    assert coarse_bytes < fine_bytes
    while not twins.manager.stats().pages_demoted:
        assert twins.manager.stats().host_bytes == 2 * len(cache.sealed_at) * fine_bytes
        cache.step()
    num_fine = sum(map(len, cache.fine()))
    num_coarse = 2 * len(cache.sealed_at) - num_fine
    # The prompt's pages, the first that was sealed after it, and not the sinks.
    assert num_coarse == twins.manager.stats().pages_demoted == 2 * (13 + 1) - 5
    expected = num_fine * fine_bytes + num_coarse * coarse_bytes
    assert twins.manager.stats().host_bytes == expected
    check_references([twins.manager])


def test_shared_pages_stay_fine_in_the_copy() -> None:
    cache = Attended()
    cache.step()
    clone = copy.deepcopy(cache)
    before = [set(pages) for pages in clone.fine()]
    while not cache.twins.manager.stats().pages_demoted:
        cache.step()
    assert clone.fine() == before == [set(range(14))] * 2
    clone.twins.check()
    clone.twins.attend()
    cache.twins.check()
    check_references([cache.twins.manager, clone.twins.manager])
    assert len(cache.twins.held[1]) == cache.twins.manager.stats().pages_demoted
    while not clone.twins.manager.stats().pages_demoted:
        clone.step()
    clone.twins.check()
    cache.twins.reset()
    clone.twins.check()
    clone.twins.attend()


def test_beams_demote_for_themselves() -> None:
    """Sequences that share pages, repeated and then apart."""
    cache = Attended()
    cache.step()
    cache.twins.keep_sequences([0, 0])
    while not cache.twins.manager.stats().pages_demoted:
        cache.step()
    assert cache.fine()[:2] == cache.fine()[2:]
    cache.twins.check()
    cache.twins.keep_sequences([1, 0, 1])
    cache.twins.attend()
    cache.twins.check()


def test_coarse_pages_go_back_to_the_window_and_are_sealed_fine() -> None:
    cache = demoted()
    twins = cache.twins
    twins.crop(30)
    twins.check()
    twins.attend()
    twins.append(30)
    assert all(set(range(6, 14)) <= pages for pages in cache.fine())
    assert not any({1, 4} & pages for pages in cache.fine())
    twins.attend()
    twins.check()


def test_demotion_makes_room() -> None:
    """In a tier with room for a single page more, a conversation goes on for many."""
    name = "K16V16+K2V2"
    host_bytes = 17 * Attended(name=name).twins.whole_page_bytes
    cache = Attended(name=name, host_bytes=host_bytes)
    with pytest.raises(HostTierFullError):
        copy.deepcopy(cache).twins.append(4 * 4)
    for _ in range(6 * 4):
        cache.step()
    assert len(cache.sealed_at) == 20
    cache.twins.check()
    assert cache.twins.manager.stats().host_bytes <= host_bytes


@pytest.mark.parametrize(
    ("num_layers", "room"),
    [
        *[(1, room) for room in (0, 1504, 1600, 2000, 2016, 2300)],
        *[(2, room) for room in (0, 1504, 1600, 2016, 3000, 4032)],
    ],
)
def test_demotion_of_shared_pages_takes_no_room_that_was_promised(
    num_layers: int, room: int
) -> None:
    """A step that is let in seals its pages in all layers, whatever is demoted before.

    When the third page is sealed, 21 shared pages of 96 bytes may be demoted, and 2 of its own that
    give back 160 bytes each; the page itself needs 512.
    """
    name = "K16V16+K2V2"
    host_bytes = num_layers * (14 + 3) * Attended(name=name).twins.whole_page_bytes + room
    cache = Attended(name=name, num_layers=num_layers, host_bytes=host_bytes)
    clone = copy.deepcopy(cache)
    for _ in range(12):
        cache.step()
    assert cache.twins.manager.stats().pages_demoted >= 2
    cache.twins.check()
    clone.twins.check()
    clone.twins.attend()
    cache.twins.attend()


def test_demotion_does_not_depend_on_the_neighbours() -> None:
    """A short sequence keeps beside a long one what it keeps alone."""
    config = config_of("K8V8+K2V2", demote_below=0.8, demote_after=4)
    keys, queries = torch.randn(24, 2, 2, 1, 8), torch.randn(24, 2, 4, 1, 8)
    past = torch.randn(2, 2, 240, 8)
    mask = torch.ones(2, 240, dtype=torch.bool)
    mask[0, :180] = False
    both, alone = KVCacheManager(1, 2, 8, config), KVCacheManager(1, 2, 8, config)
    both.append(0, past, past, mask)
    alone.append(0, past[:1, :, 180:], past[:1, :, 180:])
    for key, query in zip(keys, queries, strict=True):
        both.append(0, key, key)
        alone.append(0, key[:1], key[:1])
        torch.testing.assert_close(both.attend(0, query)[:1], alone.attend(0, query[:1]))
    for mine, other in zip(both.gather(0), alone.gather(0), strict=True):
        assert torch.equal(mine[:1, :, 180:], other)  # a page in another format would differ
    assert alone.stats().pages_demoted > 0


def test_beams_share_what_they_demote() -> None:
    """A second format never makes the host tier larger, however many share a page."""
    config = config_of("K8V8+K2V2", demote_below=2.0, demote_after=2)
    manager = KVCacheManager(1, 2, 8, config)
    past = torch.randn(1, 2, 100, 8)
    manager.append(0, past, past)
    manager.keep_sequences(torch.zeros(4, dtype=torch.int64))
    sizes = [manager.stats().host_bytes]
    for _ in range(3):
        key, query = torch.randn(1, 2, 1, 8).expand(4, -1, -1, -1), torch.randn(1, 4, 1, 8)
        manager.append(0, key, key)
        manager.attend(0, query.expand(4, -1, -1, -1))
    manager.append(0, *torch.randn(2, 1, 2, 4, 8).expand(2, 4, -1, -1, -1))
    sizes.append(manager.stats().host_bytes)
    assert manager.stats().pages_demoted >= 4
    fresh = 4 * 2 * PageLayout(config.format, 4, 8, 8, 4).nbytes  # one page of four rows, two heads
    assert sizes[1] < sizes[0] + 2 * fresh
    manager.check_integrity()
    check_references([manager])
