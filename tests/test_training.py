"""What `benchmarks/train_demo_model.py` trains on, and what its models know before any training."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from arkcache.demo import run as demo
from arkcache.demo.models import load_model
from benchmarks.demo_training import batches, circuit
from benchmarks.demo_training.batches import BatchMaker, Vocabulary

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LENGTH = 512
SPAN = 4096


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_model(None, torch.device("cpu"), "auto")[1]


@pytest.fixture(scope="module")
def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    return batches.make_vocabulary(tokenizer)


def maker(vocabulary: Vocabulary, *, looks_up: bool, seed: int = 0) -> BatchMaker:
    text = np.random.default_rng(0).integers(256, 1024, size=10000)
    return BatchMaker([text], vocabulary, seed, SPAN, looks_up=looks_up)


def answers(batch: batches.Batch) -> list[tuple[int, int, list[int]]]:
    """Every run of answer tokens: its row, its first place, its tokens."""
    found = []
    for row, weights in enumerate(batch.weights):
        places = (weights == batches.ANSWER_WEIGHT).nonzero().flatten().tolist()
        for _, run in itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0]):
            own = [place for _, place in run]
            found.append((row, own[0], batch.ids[row, own].tolist()))
    return found


@pytest.mark.parametrize("looks_up", [False, True])
def test_every_answer_was_said_before(vocabulary: Vocabulary, looks_up: bool) -> None:
    """One value, or a code's four, after the name; or those of what the name refers to."""
    batch = maker(vocabulary, looks_up=looks_up).draw(8, LENGTH)
    assert batch.ids.shape == (8, LENGTH)
    lengths, hops = set(), 0
    for row, start, answer in answers(batch):
        ids = batch.ids[row, : start - 1].tolist()
        name = batch.ids[row, start - 2].item()
        lengths.add(len(answer))
        said = [ids[i + 2 : i + 2 + len(answer)] for i in range(len(ids)) if ids[i] == name]
        if answer not in said:
            (other,) = {after[0] for after in said if after and after[0] in vocabulary.names}
            said = [ids[i + 2 : i + 3] for i in range(len(ids)) if ids[i] == other]
            hops += 1
        assert answer in said
    assert lengths == ({1, 4} if looks_up else {1})
    assert (hops > 0) == looks_up


def test_positions_jump_only_between_pieces(vocabulary: Vocabulary) -> None:
    batch = maker(vocabulary, looks_up=True).draw(8, LENGTH)
    steps = batch.position_ids.diff(dim=1)
    assert steps.min() >= 1
    assert steps.max() > 1
    assert batch.position_ids.max() < SPAN
    for row, start, answer in answers(batch):
        assert (steps[row, start - 2 : start + len(answer) - 1] == 1).all()


def test_a_seed_decides_the_batches(vocabulary: Vocabulary) -> None:
    first, again, other = (
        maker(vocabulary, looks_up=True, seed=seed).draw(2, 256) for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.ids, other.ids)


@pytest.mark.parametrize("name", ["FACTS", "LOOKUPS"])
def test_a_circuit_answers_before_training(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Among the 256 values; training is what makes a value come before all other tokens."""
    torch.manual_seed(0)
    names, values = vocabulary.names.tolist(), vocabulary.values.tolist()
    model = circuit.build_model(getattr(circuit, name), len(tokenizer), names, values).eval()
    batch = maker(vocabulary, looks_up=name == "LOOKUPS").draw(16, 128)
    with torch.inference_mode(), demo.threads(1):
        logits = model(
            batch.ids,
            position_ids=batch.position_ids,
            attention_mask=torch.ones_like(batch.ids),
            use_cache=False,
        ).logits
    said = logits[:, :, values].argmax(-1)
    right = [
        values[said[row, start + i - 1]] == token
        for row, start, answer in answers(batch)
        for i, token in enumerate(answer)
    ]
    assert sum(right) > 0.8 * len(right)


def test_a_slow_machine_warms_up_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps are small however much of the time they take: large ones undo the circuit."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("train_demo_model")
    peak, steps = script.PEAK_LEARNING_RATE, script.WARM_UP_STEPS
    assert script.learning_rate(0.2, 0) <= peak / steps
    assert script.learning_rate(0.001, 10 * steps) < peak / 10
    assert 0.9 * peak < script.learning_rate(0.1, steps) < peak
    assert script.learning_rate(1.0, 10 * steps) == pytest.approx(peak * script.FLOOR)
