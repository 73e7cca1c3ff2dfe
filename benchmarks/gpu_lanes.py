"""The manager on the GPU: the host waits for nothing, and no lane overtakes another."""

from __future__ import annotations

import random
from typing import Any

import torch
from gpu_common import Bench, Outcome
from torch import Tensor

from arkcache import CacheConfig, KVCacheManager


class Decoder:
    """A manager with 8 query heads over 4 KV heads of 64, and random tokens for all its layers."""

    def __init__(self, bench: Bench, **settings: Any) -> None:
        sizes = bench.pick((32, 32, 64, 512, 4), (4, 4, 4, 32, 2))
        names = ("page_size", "num_sink_tokens", "num_recent_tokens", "budget_tokens")
        given = dict(zip(names, sizes, strict=False)) | {"num_dense_layers": 1} | settings
        self.bench, self.num_layers = bench, sizes[-1]
        self.config = CacheConfig(backend="triton", **given)
        self.dtype = bench.pick(torch.bfloat16, torch.float32)
        self.manager = KVCacheManager(
            self.num_layers, 4, 64, self.config, device=bench.device, dtype=self.dtype
        )

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and queries of every layer [layers, 2, heads, count, 64]."""
        shapes = ((self.num_layers, 2, heads, count, 64) for heads in (4, 4, 8))
        key, value, query = (self.bench.randn(*shape, dtype=self.dtype) for shape in shapes)
        return key, value, query

    def step(self, key: Tensor, value: Tensor, query: Tensor) -> list[Tensor]:
        """Append to and attend in every layer."""
        outputs = []
        for layer in range(self.num_layers):
            self.manager.append(layer, key[layer], value[layer])
            outputs.append(self.manager.attend(layer, query[layer]))
        return outputs

    def steps(self, count: int) -> None:
        """So many tokens, one at a time."""
        for _ in range(count):
            self.step(*self.tokens(1))


def syncs(bench: Bench) -> Outcome:
    """Steps after a prompt while waiting is an error, and while the GPU is kept busy."""
    decoder = Decoder(bench, device_pool_factor=2.0)
    page_size = decoder.config.page_size
    for prompt in (20 * page_size, 3 * page_size):
        decoder.step(*decoder.tokens(prompt))
        # Both kinds of steps are compiled, and memory is cached.
        decoder.steps(bench.pick(2, 1) * page_size)
        decoder.manager.reserve(64 * page_size)  # what grows later may be compiled anew
    details: dict[str, Any] = {"steps": 2 * page_size}
    with bench.waiting_is_an_error():
        decoder.steps(2 * page_size)
    for name, to_seal in (("plain", False), ("sealing", True)):
        while decoder.manager.next_step_seals() != to_seal:
            decoder.steps(1)
        tokens = decoder.tokens(1)
        details[f"{name}_step_host_ms"] = bench.while_busy(lambda t=tokens: decoder.step(*t))
    decoder.manager.check_integrity()
    return Outcome(details=details)


# -- lanes that are late --------------------------------------------------------------------------


def races(bench: Bench) -> Outcome:
    """Steps with lanes held up at random: the outputs of a cache that waits after every call."""
    from arkcache.tiering.lanes import lanes_of

    blocks, per_block = bench.pick((16, 25), (2, 4))
    lanes, dice = lanes_of(bench.device), random.Random(0)
    hasty, patient = (Decoder(bench, device_pool_factor=2.0) for _ in range(2))
    pages = hasty.config.page_size
    given = []
    for _block in range(blocks):
        counts = [dice.choice([1] * 9 + [dice.randint(2, 6 * pages)]) for _ in range(per_block)]
        tokens = [hasty.tokens(count) for count in [9 * pages, *counts]]
        outputs = []
        for step in tokens:
            lane = dice.choice((lanes.backup, lanes.backup, lanes.side, lanes.main))
            lane.run(lambda: bench.delay(dice.choice((1e-4, 1e-3, 4e-3))))
            outputs.append(hasty.step(*step))
        bench.synchronize()
        for number, (step, mine) in enumerate(zip(tokens, outputs, strict=True)):
            expected = _patiently(bench, patient, step)
            for layer, (one, other) in enumerate(zip(mine, expected, strict=True)):
                assert torch.equal(one, other), f"{_block=} step {number} {layer=} differs"
        given += tokens
    for decoder in (hasty, patient):
        decoder.manager.check_integrity()
        for layer in range(decoder.num_layers):
            for held, part in zip(decoder.manager.gather(layer), (0, 1), strict=True):
                sealed = torch.cat([step[part][layer] for step in given], dim=2)
                assert torch.equal(held, sealed), f"{layer=}: the tiers hold other bytes"
    stats = hasty.manager.stats()
    return Outcome(
        details={
            "steps": len(given),
            "tokens": hasty.manager.num_columns,
            "recalled": stats.pages_recalled,
            "speculated": stats.pages_speculated,
        }
    )


def _patiently(bench: Bench, decoder: Decoder, step: tuple[Tensor, ...]) -> list[Tensor]:
    outputs = []
    for layer in range(decoder.num_layers):
        key, value, query = (states[layer] for states in step)
        decoder.manager.append(layer, key, value)
        bench.synchronize()
        outputs.append(decoder.manager.attend(layer, query))
        bench.synchronize()
    return outputs
