"""One sequence and KV head under a retention, densely: what a layer must keep and answer.

Knows nothing of tiers, tables or rings: a list of keys, what they received, and ten lines for each
paper's rule.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from arkcache import CacheConfig

SNAP_WINDOW, POOL, HISTORY, NEWEST = 16, 5, 20, 6


@dataclass
class Row:
    """Tokens of a row.

    Attributes:
        config: of the cache.
        rule: a name of `CHOICES`.
        keep: pages beside sinks and window.
        key, value: [tokens, dim].
        mass: attention received by each token from all queries.
        snapped: the same from the last queries of the prompt.
        rates: for each query, what it gives each token, and how many tokens it sees.
        gone: pages that were given up.
    """

    config: CacheConfig
    rule: str
    keep: int
    key: Tensor
    value: Tensor
    mass: Tensor = field(default_factory=lambda: torch.zeros(0))
    snapped: Tensor = field(default_factory=lambda: torch.zeros(0))
    rates: list[tuple[Tensor, int]] = field(default_factory=list)
    prompt_length: int = 0
    gone: set[int] = field(default_factory=set)
    ended: bool = False

    @property
    def sealed(self) -> int:
        return max(0, (len(self.key) - self.config.num_recent_tokens) // self.config.page_size)

    @property
    def candidates(self) -> list[int]:
        return [p for p in range(self.config.num_sink_pages, self.sealed) if p not in self.gone]

    @property
    def budget(self) -> int:
        config = self.config
        fixed = config.num_sink_pages * config.page_size + config.window_tokens - 1
        return fixed + self.keep * config.page_size

    def read(self, key: Tensor, value: Tensor, query: Tensor) -> Tensor:
        """A prompt, or a part of it: query [group, new, dim]; what its tokens answer."""
        self.key, self.value = torch.cat((self.key, key)), torch.cat((self.value, value))
        count, first = len(self.key), len(self.key) - len(key)
        outputs = [self.attend(query[:, i], first + i + 1) for i in range(len(key))]
        self.prompt_length, self.ended = count, True
        given = torch.stack(
            [torch.nn.functional.pad(r, (0, count - len(r))) for r, _ in self.rates]
        )
        self.snapped = given[-min(SNAP_WINDOW, len(key)) :].sum(0)
        return torch.stack(outputs, dim=1)

    def decode(self, key: Tensor, value: Tensor, query: Tensor) -> Tensor:
        """One new token [dim], query [group, dim]; what it answers where all that is kept fits."""
        self.key, self.value = (
            torch.cat((self.key, key[None])),
            torch.cat((self.value, value[None])),
        )
        if self.ended or len(self.candidates) > self.keep:
            kept = CHOICES[self.rule](self)
            self.gone |= {page for page in self.candidates if page not in kept}
        self.ended = False
        return self.attend(query, len(self.key))

    def attend(self, query: Tensor, visible: int) -> Tensor:
        size = self.config.page_size
        lost = torch.tensor([t // size in self.gone for t in range(visible)])
        logits = query @ self.key[:visible].T * query.shape[1] ** -0.5
        shares = logits.masked_fill(lost, -torch.inf).softmax(dim=-1)
        self.mass = torch.nn.functional.pad(self.mass, (0, len(self.key) - len(self.mass)))
        self.mass[:visible] += shares.mean(0)
        self.rates.append((shares.mean(0), visible))
        return shares @ self.value[:visible]

    def by_page(self, received: Tensor) -> Tensor:
        size = self.config.page_size
        return (
            torch.nn.functional.pad(received, (0, -len(received) % size))
            .unflatten(0, (-1, size))
            .sum(1)
        )

    def best(self, score: Tensor, keep: int) -> list[int]:
        """The newest candidate, and those of the highest score; of equal ones the newest."""
        score[self.sealed - 1] = torch.inf
        return sorted(self.candidates, key=lambda p: (float(score[p]), p), reverse=True)[:keep]


def streaming(row: Row) -> list[int]:
    return row.candidates[-row.keep :] if row.keep else []


def heavy_hitters(row: Row) -> list[int]:
    oldest = (len(row.key) - row.budget // 2) // row.config.page_size
    recent = [page for page in row.candidates if page >= oldest]
    score = row.by_page(row.mass)
    score[recent] = torch.inf
    return row.best(score, row.keep)


def scissors(row: Row) -> list[int]:
    if len(row.candidates) <= row.keep:
        return row.candidates
    counters, size = torch.zeros(row.sealed + 64), row.config.page_size
    for received, seen in row.rates[-HISTORY:]:
        held = row.by_page(torch.ones(seen))
        counters[: len(held)] += row.by_page(received) < held / seen
    oldest = (len(row.key) - NEWEST) // size
    counters[oldest:] = -1
    return row.best(-counters, row.keep - row.keep // 2)


def snap(row: Row) -> list[int]:
    if not row.ended:
        return row.candidates
    begin = row.prompt_length - min(SNAP_WINDOW, row.budget // 2)
    pooled = torch.nn.functional.avg_pool1d(
        row.snapped[None, :begin], POOL, stride=1, padding=POOL // 2
    )[0]
    score = row.by_page(torch.nn.functional.pad(pooled, (0, len(row.key) - begin)))
    score[(begin // row.config.page_size) :] = torch.inf
    return row.best(score, row.keep)


CHOICES = {
    "streamingllm": streaming,
    "h2o": heavy_hitters,
    "scissorhands": scissors,
    "snapkv": snap,
    "pyramidkv": snap,
}
