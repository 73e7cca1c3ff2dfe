"""Metrics as Prometheus sees them: scraped over HTTP while a model generates."""

import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from transformers import LlamaConfig, LlamaForCausalLM

from arkcache import ArkCache, CacheConfig, InputError, KVCacheManager
from arkcache.demo.models import SHIPPED
from arkcache.metrics import COUNTERS, CacheMetrics, served

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 96
LAYERS = 2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def generate(model: Any, cache: ArkCache, count: int = 30) -> None:
    ids = torch.randint(0, 64, (1, 300))
    if cache.get_seq_length():
        cache.reset()
    mask = torch.ones_like(ids)
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 63}
    model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        min_new_tokens=count,
        max_new_tokens=count,
        **how,
    )


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Values by name and labels."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    return {
        (one.name, *(one.labels[label] for label in sorted(one.labels))): one.value
        for one in samples
    }


@pytest.fixture
def metrics() -> CacheMetrics:
    return CacheMetrics()


@pytest.fixture
def port(metrics: CacheMetrics) -> Iterator[int]:
    with served(metrics, 0) as taken:
        yield taken


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_what_is_scraped_is_what_the_cache_says(
    model: Any, metrics: CacheMetrics, port: int, backend: str
) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    cache = ArkCache(model, budget_tokens=BUDGET, page_size=8, backend=backend)
    metrics.watch(cache, "mine")
    assert scrape(port)["arkcache:layer_steps_total", "mine"] == 0
    generate(model, cache)
    stats, found = cache.stats(), scrape(port)
    expected = {
        ("arkcache:kv_offload_load_bytes_total", "mine"): stats.bytes_recalled
        + stats.bytes_streamed,
        ("arkcache:kv_offload_store_bytes_total", "mine"): stats.bytes_backed_up,
        ("arkcache:kv_offload_load_time_total", "mine"): stats.load_seconds,
        ("arkcache:kv_offload_store_time_total", "mine"): stats.store_seconds,
        ("arkcache:recalled_bytes_total", "mine"): stats.bytes_recalled,
        ("arkcache:page_queries_total", "mine"): stats.pages_hit + stats.pages_recalled,
        ("arkcache:page_hits_total", "mine"): stats.pages_hit,
        ("arkcache:pages_evicted_total", "mine"): stats.pages_evicted,
        ("arkcache:pages_demoted_total", "mine"): 0,
        ("arkcache:layer_steps_total", "mine"): stats.decode_steps,
        ("arkcache:kv_cache_bytes", "mine", "host"): stats.host_bytes,
        ("arkcache:kv_cache_bytes", "mine", "device"): stats.device_bytes,
        ("arkcache:kv_cache_bytes", "mine", "index"): stats.digest_bytes,
        ("arkcache:kv_cache_tokens", "mine", "host"): stats.host_tokens,
        ("arkcache:kv_cache_tokens", "mine", "device"): stats.total_tokens - stats.host_tokens,
        ("arkcache:page_hit_rate", "mine"): stats.hit_rate,
        ("arkcache:recalled_bytes_per_layer_step", "mine"): stats.bytes_recalled
        / stats.decode_steps,
    }
    assert found == pytest.approx(expected)
    assert min(stats.load_seconds, stats.store_seconds) > 0
    # 300 of the prompt, and all generated tokens but the last, which is not attended
    assert stats.total_tokens == LAYERS * 329
    assert stats.host_tokens == LAYERS * 8 * ((329 - 32) // 8)
    assert stats.decode_steps == LAYERS * 29 - LAYERS  # the one after the prompt is exact
    assert min(stats.bytes_recalled, stats.bytes_backed_up, stats.pages_recalled) > 0


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_scrapes_while_steps_run_neither_fail_nor_disturb(
    model: Any, metrics: CacheMetrics, port: int, backend: str
) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    cache = ArkCache(model, budget_tokens=BUDGET, page_size=8, backend=backend)
    alone = ArkCache(model, budget_tokens=BUDGET, page_size=8, backend=backend)
    torch.manual_seed(1)
    generate(model, alone, 60)
    metrics.watch(cache)
    found: list[dict[tuple[str, ...], float]] = []
    failed: list[BaseException] = []
    over = threading.Event()

    def scraping() -> None:
        try:
            while not over.is_set():
                found.append(scrape(port))
        except BaseException as error:  # a thread's own would only be printed
            failed.append(error)

    thread = threading.Thread(target=scraping)
    thread.start()
    torch.manual_seed(1)
    generate(model, cache, 60)
    over.set()
    thread.join()
    assert failed == []
    assert len(found) > 3
    for before, after in zip(found, [*found[1:], scrape(port)], strict=True):
        for name in COUNTERS:
            key = f"arkcache:{name}_total", ""
            assert after.get(key, 0) >= before.get(key, 0)
    assert cache.stats() == alone.stats()  # nothing that was counted was lost
    assert scrape(port)["arkcache:page_hits_total", ""] == alone.stats().pages_hit


def test_counters_never_go_down(model: Any, metrics: CacheMetrics, port: int) -> None:
    cache = ArkCache(model, budget_tokens=BUDGET, page_size=8)
    metrics.watch(cache)
    generate(model, cache)
    once = scrape(port)
    stored = ("arkcache:kv_offload_store_bytes_total", "")
    assert once[stored] > 0
    cache.reset()
    again = scrape(port)
    assert again[stored] == once[stored]
    assert again["arkcache:kv_cache_tokens", "", "host"] == 0
    generate(model, cache)
    assert scrape(port)[stored] == 2 * once[stored]
    del cache
    gc.collect()
    after = scrape(port)
    assert after[stored] == 2 * once[stored]
    assert after["arkcache:kv_cache_bytes", "", "device"] == 0


def test_what_is_counted_after_a_reset_counts(model: Any, metrics: CacheMetrics, port: int) -> None:
    """Also where nobody looked in between."""
    cache = ArkCache(model, budget_tokens=BUDGET, page_size=8)
    metrics.watch(cache)
    generate(model, cache, 40)
    stored = ("arkcache:layer_steps_total", "")
    once = scrape(port)[stored]
    cache.reset()
    generate(model, cache, 10)
    now = cache.stats().decode_steps
    assert 0 < now < once
    assert scrape(port)[stored] == once + now


def test_caches_are_held_weakly_and_added_up(metrics: CacheMetrics, port: int) -> None:
    settings = CacheConfig(budget_tokens=64, page_size=8, num_recent_tokens=8)
    caches = [KVCacheManager(1, 2, 16, settings) for _ in range(3)]
    for cache, name in zip(caches, ("a", "a", "b"), strict=True):
        metrics.watch(cache, name)
        states = torch.randn(1, 2, 40, 16)
        cache.append(0, states, states)
    with pytest.raises(InputError, match="watched already"):
        metrics.watch(caches[0])
    found = scrape(port)
    assert found["arkcache:kv_cache_tokens", "a", "host"] == 64
    assert found["arkcache:kv_cache_tokens", "b", "host"] == 32
    assert found["arkcache:kv_cache_tokens", "b", "device"] == 8
    metrics.forget(caches[0])
    assert scrape(port)["arkcache:kv_cache_tokens", "a", "host"] == 32
    del caches[1:], cache
    gc.collect()
    assert scrape(port)["arkcache:kv_cache_tokens", "a", "host"] == 0


def test_nothing_is_lost_while_a_block_watches(model: Any, metrics: CacheMetrics) -> None:
    for turn in range(1, 3):
        cache = ArkCache(model, budget_tokens=BUDGET, page_size=8)
        with metrics.watching(cache, "short"):
            generate(model, cache, 4)
        stored = cache.stats().bytes_backed_up
        del cache
        registry = CollectorRegistry()
        registry.register(metrics)
        value = registry.get_sample_value(
            "arkcache:kv_offload_store_bytes_total", {"cache": "short"}
        )
        assert value == turn * stored > 0


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_copies_are_timed_while_a_cache_is_watched(
    model: Any, metrics: CacheMetrics, port: int, backend: str
) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    cache = ArkCache(model, budget_tokens=BUDGET, page_size=8, backend=backend)

    def seconds() -> tuple[float, float]:
        stats = cache.stats()
        return stats.load_seconds, stats.store_seconds

    generate(model, cache)
    assert seconds() == (0, 0)
    assert ("arkcache:kv_offload_load_time_total", "") not in scrape(port)
    start = time.perf_counter()
    with metrics.watching(cache):
        ids = torch.randint(0, 64, (1, 40))
        with torch.inference_mode():
            model(ids, past_key_values=cache)  # streams what is held, and seals five pages a layer
        assert ("arkcache:kv_offload_load_time_total", "") in scrape(port)
        cache.reset()
        generate(model, cache)  # managers made anew are timed as well
    taken = seconds()
    assert 0 < min(taken) < sum(taken) < time.perf_counter() - start
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    assert seconds() == taken


def test_the_share_of_a_limit(metrics: CacheMetrics, port: int) -> None:
    settings = {"budget_tokens": 64, "page_size": 8, "num_recent_tokens": 8}
    limits = {"host_bytes": 1 << 20, "device_bytes": 1 << 19}
    limited = KVCacheManager(1, 2, 16, CacheConfig(**settings, **limits))
    usage = "arkcache:kv_cache_usage_perc"
    metrics.watch(limited, "mine")
    states = torch.randn(1, 2, 40, 16)
    limited.append(0, states, states)
    found, stats = scrape(port), limited.stats()
    assert found[usage, "mine", "host"] == stats.host_bytes / (1 << 20) > 0
    assert found[usage, "mine", "device"] == stats.device_bytes / (1 << 19) > 0
    other = KVCacheManager(1, 2, 16, CacheConfig(**settings, host_bytes=1 << 20))
    metrics.watch(other, "mine")
    found = scrape(port)
    assert found[usage, "mine", "host"] == stats.host_bytes / (2 << 20)
    assert (usage, "mine", "device") not in found  # one of them has no limit


def test_what_steps_missed_is_there_where_it_is_measured(
    model: Any, metrics: CacheMetrics, port: int
) -> None:
    cache = ArkCache(model, budget_tokens=BUDGET, page_size=8, target_missed_mass=0.05)
    metrics.watch(cache)
    assert ("arkcache:missed_mass", "") not in scrape(port)
    generate(model, cache)
    assert scrape(port)["arkcache:missed_mass", ""] == cache.stats().missed.estimated


def test_a_port_that_is_taken(metrics: CacheMetrics, port: int) -> None:
    with pytest.raises(InputError, match=f"cannot serve metrics at 127.0.0.1:{port}: "):
        served(CacheMetrics(), port).__enter__()
    with pytest.raises(InputError, match=r"cannot serve metrics at 127.0.0.1:70000"):
        served(CacheMetrics(), 70000).__enter__()


def test_a_chat_serves_its_own(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The value of amber is 712. " * 40)
    options = ["--model", str(SHIPPED), "--max-tokens", "4", "--budget", "128", "--file", str(text)]
    command = [sys.executable, "-m", "arkcache.cli", "chat", "--metrics-port", "0", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment, text=True, **pipes) as chat:
        try:
            said = re.fullmatch(
                r"Metrics at http://127\.0\.0\.1:(\d+)/metrics\n", chat.stderr.readline()
            )
            assert said is not None
            chat.stdin.write("What is the value of amber?\n")
            chat.stdin.flush()
            found: dict[tuple[str, ...], float] = {}
            while not found.get(("arkcache:layer_steps_total", "chat")):
                time.sleep(0.05)
                found = scrape(int(said[1]))
            assert found["arkcache:kv_cache_tokens", "chat", "host"] > 400
            chat.stdin.close()
            assert chat.wait(timeout=60) == 0
        finally:
            chat.kill()


def test_a_missing_extra_is_told_in_a_line() -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        f"sys.argv = ['arkcache', 'chat', '--metrics-port', '0', '--model', {str(SHIPPED)!r}]\n"
        "from arkcache.cli import main; main()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "arkcache: prometheus_client is not installed; metrics need: pip install "
        "'arkcache[metrics]'"
    )
