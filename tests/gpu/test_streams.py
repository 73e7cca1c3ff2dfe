"""The manager on the GPU: the host waits for nothing, and no stream overtakes another."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tests.gpu.card import Card
from tests.gpu.decoder import Decoder, captured


def test_no_waiting(card: Card) -> None:
    """Steps after a prompt while waiting is an error, and while the GPU is kept busy."""
    decoder = Decoder(card, device_pool_factor=2.0)
    page_size = decoder.config.page_size
    for prompt in card.pick((20 * page_size, 3 * page_size), (9 * page_size,)):
        decoder.step(*decoder.tokens(prompt))
        # Both kinds of steps are compiled, and memory is cached.
        decoder.steps(card.pick(2 * page_size, 1))
        captured(decoder.manager).reserve(64 * page_size)  # what grows later may be compiled anew
    steps = card.pick(2, 1) * page_size
    with card.waiting_is_an_error():
        decoder.steps(steps)
    card.note(steps=steps)
    for name, to_seal in (("plain", False), ("sealing", True)):
        while captured(decoder.manager).seals_next() != to_seal:
            decoder.steps(1)
        tokens = decoder.tokens(1)
        host_ms = card.while_busy(lambda t=tokens: decoder.step(*t))
        card.note(**{f"{name}_step_host_ms": host_ms})
    decoder.manager.check_integrity()


# -- streams that are late ------------------------------------------------------------------------


def test_races(card: Card) -> None:
    """Steps with streams held up at random: the outputs of a cache that waits after every call."""
    from arkcache.tiering.streams import streams_of

    blocks, per_block = card.pick((16, 25), (2, 2))
    streams, dice = streams_of(card.device), random.Random(0)
    hasty, patient = (Decoder(card, device_pool_factor=2.0) for _ in range(2))
    pages = hasty.config.page_size
    given = []
    for _block in range(blocks):
        counts = [dice.choice([1] * 9 + [dice.randint(2, 6 * pages)]) for _ in range(per_block)]
        tokens = [hasty.tokens(count) for count in [9 * pages, *counts]]
        outputs = []
        for step in tokens:
            stream = dice.choice((streams.backup, streams.backup, streams.side, streams.main))
            stream.run(lambda: card.delay(dice.choice((1e-4, 1e-3, 4e-3))))
            outputs.append(hasty.step(*step))
        card.synchronize()
        for number, (step, mine) in enumerate(zip(tokens, outputs, strict=True)):
            expected = _patiently(card, patient, step)
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
    card.note(
        steps=len(given),
        tokens=hasty.manager.num_columns,
        recalled=stats.pages_recalled,
        speculated=stats.pages_speculated,
    )


def _patiently(card: Card, decoder: Decoder, step: tuple[Tensor, ...]) -> list[Tensor]:
    outputs = []
    for layer in range(decoder.num_layers):
        key, value, query = (states[layer] for states in step)
        decoder.manager.append(layer, key, value)
        card.synchronize()
        outputs.append(decoder.manager.attend(layer, query))
        card.synchronize()
    return outputs
