"""Tensor parallelism: two real processes with half of the KV heads each say what one says."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from arkcache import CacheConfig, InputError
from arkcache.demo.models import SHIPPED
from arkcache.memory import CacheShape, plan_memory
from arkcache.stats import CacheStats, MissedMass
from tests.architectures import ARCHITECTURES
from tests.ranks import NUM_NEW, NUM_PROMPT, ROOT, answer, torchrun

Answers = list[dict[str, Any]]

SETTINGS: dict[str, dict[str, Any]] = {
    "everything": {"budget_tokens": None},
    "sparse": {"budget_tokens": 96},
    "quantised": {"budget_tokens": 96, "key_bits": 4, "value_bits": 2, "group_size": 16},
    "bytes": {"device_bytes": 150_000, "stream_block_tokens": 64},
    "missed": {"budget_tokens": 96, "target_missed_mass": 0.2, "backend": "torch"},
}

NOT_SPLIT = ("lfm2",)
"""Families that have a plan and that transformers 5.23 cannot run by it, with any cache."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random models: four KV heads, one, and one latent in place of heads."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    for name, num_kv_heads in (("even", 4), ("uneven", 1)):
        torch.manual_seed(0)
        config = LlamaConfig(
            **sizes,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=num_kv_heads,
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
    ARCHITECTURES["deepseek_v2"].build().save_pretrained(folder / "latent")
    return folder


@pytest.fixture(scope="module")
def jobs(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    jobs = {name: (str(folder / "even"), settings) for name, settings in SETTINGS.items()}
    # Not sparse: all query heads choose the pages of a latent, and a rank has half of them.
    jobs["latent"] = str(folder / "latent"), SETTINGS["everything"]
    jobs["uneven"] = str(folder / "uneven"), SETTINGS["sparse"]
    return jobs


def in_two_processes(jobs: Iterable[tuple[str, dict[str, Any]]], folder: Path) -> Iterator[Answers]:
    """For each job what each of two processes says."""
    (folder / "jobs.json").write_text(json.dumps([*jobs]))
    done = torchrun(str(ROOT / "tests" / "ranks.py"), str(folder / "jobs.json"), str(folder))
    assert done.returncode == 0, done.stderr
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    yield from map(list, zip(*said, strict=True))


@pytest.fixture(scope="module")
def ranks(
    jobs: dict[str, tuple[str, dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answers]:
    """What each of two processes says, by the name of the job."""
    answers = in_two_processes(jobs.values(), tmp_path_factory.mktemp("ranks"))
    return dict(zip(jobs, answers, strict=True))


@pytest.mark.parametrize("name", ["everything", "sparse", "quantised", "missed", "latent"])
def test_ranks_say_what_one_process_says(
    jobs: dict[str, tuple[str, dict[str, Any]]], ranks: dict[str, Answers], name: str
) -> None:
    one = answer(*jobs[name], split=False)
    expected = torch.tensor(one["logits"])
    for rank in ranks[name]:
        assert rank["mode"] == one["mode"] == "paged"
        assert rank["tokens"] == one["tokens"]
        # Not bit by bit: half of every projection's sum comes from the other process, and then a
        # quantised key may round the other way.
        rounding = 1e-2 if name == "quantised" else 1e-4
        difference = (torch.tensor(rank["logits"]) - expected).abs().max()
        assert difference < rounding * expected.abs().max()
    assert len({*one["tokens"]}) > 4


def test_everything_is_the_full_cache(
    jobs: dict[str, tuple[str, dict[str, Any]]], ranks: dict[str, Answers]
) -> None:
    model = LlamaForCausalLM.from_pretrained(jobs["everything"][0]).eval()
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 256, (1, NUM_PROMPT), generator=generator)
    full = model.generate(prompt, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False)[
        0, NUM_PROMPT:
    ]
    assert [rank["tokens"] for rank in ranks["everything"]] == [full.tolist()] * 2


@pytest.mark.parametrize("name", ["everything", "sparse", "quantised"])
def test_each_rank_holds_half(
    jobs: dict[str, tuple[str, dict[str, Any]]], ranks: dict[str, Answers], name: str
) -> None:
    one = answer(*jobs[name], split=False)
    for rank in ranks[name]:
        assert (one["kv_heads"], rank["kv_heads"]) == ([4], [2])
        for size in ("device_bytes", "host_bytes", "digest_bytes", "bytes_backed_up"):
            assert rank["stats"][size] * 2 == one["stats"][size], size
        # Every figure, as a process that has all heads counts it.
        assert rank["over_ranks"] == one["over_ranks"] == one["stats"]


def test_what_was_missed_is_told_of_all_heads(
    jobs: dict[str, tuple[str, dict[str, Any]]], ranks: dict[str, Answers]
) -> None:
    one = answer(*jobs["missed"], split=False)["stats"]["missed_by_layer"]
    (first, _) = (rank["over_ranks"]["missed_by_layer"] for rank in ranks["missed"])
    assert [len(layer) for layer in first] == [len(layer) for layer in one] == [4, 4, 4]
    for layer, expected in zip(first, one, strict=True):
        for head, alone in zip(layer, expected, strict=True):
            assert head == pytest.approx(alone, rel=1e-3)


def test_bytes_are_of_each_rank(
    jobs: dict[str, tuple[str, dict[str, Any]]], ranks: dict[str, Answers]
) -> None:
    one = answer(*jobs["bytes"], split=False)["stats"]
    limit = SETTINGS["bytes"]["device_bytes"]
    for rank in ranks["bytes"]:
        assert limit / 2 < rank["stats"]["device_bytes"] <= limit
        assert one["device_bytes"] <= limit
        # The same bytes for half of the heads are more tokens.
        assert rank["stats"]["attended_tokens"] > 1.5 * one["attended_tokens"]


def test_a_plan_for_ranks_is_what_a_rank_takes(ranks: dict[str, Answers]) -> None:
    shape = CacheShape(3, 4, 16, 16, torch.float32).split(2)
    config = CacheConfig(**SETTINGS["sparse"])
    plan = plan_memory(config, shape, NUM_PROMPT + NUM_NEW - 1, device="cpu")
    for rank in ranks["sparse"]:
        assert plan.host_bytes == rank["stats"]["host_bytes"]
        assert plan.device_bytes == rank["stats"]["device_bytes"]


def test_heads_that_do_not_divide_are_refused_on_every_rank(
    ranks: dict[str, Answers],
) -> None:
    for rank in ranks["uneven"]:
        assert rank["error"].startswith("UnsupportedModelError: LlamaForCausalLM does not run")
    with pytest.raises(InputError, match=r"6 KV heads over 4 ranks.*one of 1, 2, 3, 6 ranks"):
        CacheShape(1, 6, 16, 16, torch.float32).split(4)


@pytest.mark.slow
def test_every_family_that_can_be_split(tmp_path: Path) -> None:
    """Wherever transformers splits the model itself, ranks say what one process says."""
    everything = SETTINGS["everything"]
    jobs = {}
    for name, architecture in ARCHITECTURES.items():
        if architecture.is_encoder_decoder or architecture.mode != "paged" or name in NOT_SPLIT:
            continue
        model = architecture.build()
        if model.tp_plan:
            model.save_pretrained(tmp_path / name)
            jobs[name] = str(tmp_path / name), everything
    assert len(jobs) > 50
    for name, said in zip(jobs, in_two_processes(jobs.values(), tmp_path), strict=True):
        one = answer(*jobs[name], split=False)
        assert [rank["mode"] for rank in said] == ["paged"] * 2, name
        assert [rank["tokens"] for rank in said] == [one["tokens"]] * 2, name


def test_stats_of_ranks() -> None:
    one, two = MissedMass(num_audits=1, true_sum=0.5), MissedMass(num_audits=2, true_sum=0.1)
    parts = [
        CacheStats(attended_tokens=10, total_tokens=100, pages_hit=3, missed_by_layer=((one,),)),
        CacheStats(attended_tokens=13, total_tokens=100, pages_hit=4, missed_by_layer=((two,),)),
    ]
    assert CacheStats.of_ranks(parts) == CacheStats(
        attended_tokens=12, total_tokens=100, pages_hit=7, missed_by_layer=((one, two),)
    )
    assert parts[0].over_ranks() is parts[0]  # no process group


EXAMPLE = ROOT / "examples" / "several_gpus.py"


def held_by(output: str) -> dict[str, list[int]]:
    """Bytes on the device and on the host, as the example prints them, by who holds them."""
    lines = re.findall(r"^(.+): ([\d,]+) bytes on .+, ([\d,]+) on the host$", output, re.MULTILINE)
    return {who: [int(size.replace(",", "")) for size in sizes] for who, *sizes in lines}


@pytest.fixture
def question(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("The value of amber is 4821. " * 60)
    return [str(EXAMPLE), str(SHIPPED), str(text), "What is the value of amber?"]


@pytest.mark.slow
def test_the_example_runs_in_one_process(question: list[str]) -> None:
    done = subprocess.run([sys.executable, *question], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    held = held_by(done.stdout)
    assert {*held} == {"rank 0", "in all"}
    assert held["rank 0"] == held["in all"]


@pytest.mark.slow
def test_the_example_runs_in_two_processes(question: list[str]) -> None:
    """As its user runs it, with the model that the package ships."""
    done = torchrun(*question)
    assert done.returncode == 0, done.stderr
    held = held_by(done.stdout)
    assert {*held} == {"rank 0", "in all"}
    assert [2 * size for size in held["rank 0"]] == held["in all"]


@pytest.mark.parametrize("fails", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_process_is_left_behind(tmp_path: Path, fails: bool) -> None:
    """Neither when a rank fails while the other waits for it, nor when both wait for ever."""
    script = tmp_path / "wait.py"
    script.write_text(
        "import os, sys, time\n"
        f"open(f'{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        f"if {fails} and os.environ['RANK'] == '1':\n"
        "    sys.exit('rank 1 gave up')\n"
        "time.sleep(600)\n"
    )
    if fails:
        done = torchrun(str(script))
        assert done.returncode != 0
        assert "rank 1 gave up" in done.stderr
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            torchrun(str(script), timeout=20)
    pids = [int((tmp_path / rank).read_text()) for rank in "01"]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
