"""The search for layers that may share: what it tries first, what it accepts, what it prints."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM, PreTrainedTokenizerBase
from typer.testing import CliRunner

import arkcache
from arkcache import CacheConfig, InputError, UnsupportedModelError, cli
from arkcache.demo.models import SHIPPED
from arkcache.evaluation.judging import Judge
from arkcache.evaluation.sharing import Found, Settings, ranked_pairs, run, search, shared
from tests.architectures import ARCHITECTURES
from tests.test_huggingface import make_model, prompt
from tests.test_sharing import dense

FULL = CacheConfig(budget_tokens=None)
SMALL = Settings(num_shared=1, length=64, num_questions=2, task="facts")
runner = CliRunner(env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(SHIPPED)
    return loaded


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The attention of its last layer but one is for nothing."""
    made = make_model(vocab_size=len(tokenizer), num_hidden_layers=4)
    torch.nn.init.zeros_(made.model.layers[2].self_attn.o_proj.weight)
    return made


@pytest.fixture
def folder(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def searched(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: Settings = SMALL
) -> Found:
    found = Found({"task": "facts"}, {}, {})
    for _ in search(model, tokenizer, settings, found):
        pass
    return found


# -- which pairs come first -----------------------------------------------------------------------


def test_pairs_by_what_their_means_differ_by(model: LlamaForCausalLM) -> None:
    ids, cache = prompt(24, batch=3), DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    expected = {}
    for layer, source in itertools.product(range(4), range(4)):
        if source < layer:
            apart = []
            for states in ("keys", "values"):
                mine, its = (getattr(cache.layers[n], states) for n in (layer, source))
                norms = [
                    (mine[:, head, token].mean(0) - its[:, head, token].mean(0)).norm()
                    for head, token in itertools.product(range(2), range(24))
                ]
                apart.append(float(torch.stack(norms).mean()))
            expected[layer, source] = sum(apart) / 2
    num_layers, pairs = ranked_pairs(model, ids)
    assert num_layers == 4
    assert (
        [pair[0] for pair in pairs]
        == sorted(expected.values(), reverse=True)
        == pytest.approx([pair[0] for pair in pairs])
    )
    assert {pair[1:]: pair[0] for pair in pairs} == pytest.approx(expected)


def test_a_layer_takes_those_along_that_attend_it() -> None:
    assert shared([0, 1, 2, 3], 3, 1) == [0, 1, 2, 1]
    assert shared([0, 1, 2, 1], 1, 0) == [0, 0, 2, 0]
    assert shared([0, 0, 2, 0], 2, 1) == [0, 0, 0, 0]
    assert shared([0, 0, 2, 0], 3, 2) is None


def test_no_two_layers_that_could_share() -> None:
    model = ARCHITECTURES["gemma3"].build()
    with pytest.raises(UnsupportedModelError, match="no two layers"):
        ranked_pairs(model, prompt(24))


# -- what is accepted -----------------------------------------------------------------------------


def test_what_costs_nothing_is_found(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = searched(model, tokenizer)
    assert [one.layer for one in found.tries if one.accepted] == [2]
    assert found.layer_sources[2] < 2
    assert found.num_shared == found.wanted == 1
    assert all(one.judgement.kl > 0.1 for one in found.tries if not one.accepted)
    judged = found.judgement
    assert judged is not None
    assert judged.kl == pytest.approx(0, abs=1e-5)
    distances = [one.distance for one in found.tries]
    assert distances == sorted(distances, reverse=True)
    assert model.config._attn_implementation != "arkcache"
    assert searched(model, tokenizer).to_dict() == found.to_dict()


def test_alike_first(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = Settings(**vars(SMALL) | {"alike_first": True})
    distances = [one.distance for one in searched(model, tokenizer, settings).tries]
    assert distances == sorted(distances)


def test_as_many_as_are_wanted_or_may_be_tried(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    everything = Settings(**vars(SMALL) | {"num_shared": 3, "most_kl": 1e9})
    found = searched(model, tokenizer, everything)
    assert found.layer_sources == [0, 0, 0, 0]
    few = Settings(**vars(SMALL) | {"num_shared": 3, "most_tries": 2, "most_kl": 1e-9})
    found = searched(model, tokenizer, few)
    assert (len(found.tries), found.layer_sources) == (2, [0, 1, 2, 3])
    assert found.judgement == found.alone


def test_judged_as_a_dense_model_would_be(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    judge, sources = Judge(model, tokenizer, "facts", 64, 2, seed=0), (0, 0, 2, 3)
    with torch.inference_mode():
        alone, judged = (
            judge.of(CacheConfig(budget_tokens=None, layer_sources=one)) for one in (None, sources)
        )
        assert (alone.kl, alone.text_kl) == (0, 0)
        arkcache.detach(model)
        divergences = []
        for question, answer in zip(judge._questions, judge.answers, strict=True):
            ids = torch.tensor([judge._read + question + answer[:-1]])
            own = model(ids).logits[0, -len(answer) :].log_softmax(-1)
            with dense(model, sources) as twin:
                its = twin(ids).logits[0, -len(answer) :].log_softmax(-1)
            divergences += (own.exp() * (own - its)).sum(-1).tolist()
    assert judged.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert judged.text_kl > 0.01


def test_answers_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    """The shipped model knows them, and does not without the keys of layer 2."""
    shipped = LlamaForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    judge = Judge(shipped, tokenizer, "facts", 256, 4, seed=0)
    assert judge.of(FULL).right == 4
    judged = judge.of(CacheConfig(budget_tokens=None, layer_sources=(0, 1, 0, 3)))
    assert judged.right == 0
    assert judged.kl > 1 > judged.text_kl


# -- the command ----------------------------------------------------------------------------------


def test_interrupted(folder: Path) -> None:
    def stop(found: Found) -> None:
        if len(found.tries) == 2:
            raise KeyboardInterrupt

    settings = Settings(**vars(SMALL) | {"num_shared": 3, "most_kl": 1e9, "model": str(folder)})
    found = run(settings, keep=stop)
    assert not found.finished
    assert found.num_shared == 2
    assert found.judgement == found.tries[1].judgement


def test_the_command(folder: Path, tmp_path: Path) -> None:
    given = ["--model", str(folder), "--task", "facts", "--length", "64", "--questions", "2"]
    file = tmp_path / "shared.json"
    done = runner.invoke(cli.app, ["share", *given, "--layers", "1", "--output", str(file)])
    assert done.exit_code == 0, done.output
    sources = json.loads(file.read_text())["layer_sources"]
    assert f"--set 'layer_sources={sources}'" in done.stdout
    assert "1 of 4 layers store nothing: the cache takes 75% of the bytes." in done.stdout
    assert "Trying pairs" in done.stderr
    config = arkcache.load_config(environ={"ARKCACHE_LAYER_SOURCES": f"@{file}"})
    assert config.layer_sources == tuple(sources)
    more = ["--layers", "3", "--most-kl", "1e-9", "--tries", "1", "--json", "--quiet"]
    done = runner.invoke(cli.app, ["share", *given, *more])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert json.loads(done.stdout)["layer_sources"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_shared": 0}, "num_shared=0: expected at least 1"),
        ({"most_kl": 0}, "most_kl=0: expected more than 0"),
        ({"task": "riddles"}, "task 'riddles': expected one of magic"),
    ],
)
def test_impossible_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(Settings(**settings))
