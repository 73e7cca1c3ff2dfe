"""The examples run as they are and do what they say."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from arkcache import CacheConfig
from arkcache.demo.models import SHIPPED
from arkcache.kernels import reference

PLAIN_DECODER = Path(__file__).resolve().parents[1] / "examples" / "plain_decoder.py"


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_decoder", PLAIN_DECODER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class EverythingKept:
    """A cache with the decoder's two calls that keeps all and attends all, by the reference."""

    def __init__(self) -> None:
        self.past: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_columns(self) -> int:
        return self.past[0][0].shape[2] if self.past else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        if layer in self.past:
            key = torch.cat((self.past[layer][0], key), dim=2)
            value = torch.cat((self.past[layer][1], value), dim=2)
        self.past[layer] = key, value

    def attend(self, layer: int, query: Tensor) -> Tensor:
        key, value = self.past[layer]
        columns = torch.arange(key.shape[2])
        mask = columns <= columns[-query.shape[2] :, None]
        scale = query.shape[3] ** -0.5
        return reference.attention(query, key, value, scale=scale, mask=mask[None, None])


@pytest.mark.parametrize("budget", [None, 4096])
def test_plain_decoder_is_exact_with_budget_for_everything(
    plain: ModuleType, budget: int | None
) -> None:
    torch.manual_seed(0)
    model, prompt = plain.Decoder().eval(), torch.randint(256, (2, 300))
    cache = plain.make_cache(CacheConfig(budget_tokens=budget, num_dense_layers=0))
    expected = plain.generate(model, prompt, 40, EverythingKept())
    assert torch.equal(plain.generate(model, prompt, 40, cache), expected)
    assert len(set(expected[0].tolist())) > 5
    cache.check_integrity()


def test_plain_decoder_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(PLAIN_DECODER)], capture_output=True, text=True, check=True
    )
    assert "budget 512" in done.stdout
    assert done.stderr == ""


def test_chat(tmp_path: Path) -> None:
    """As its user runs it, with the model that the package ships."""
    text = tmp_path / "text.txt"
    text.write_text("The value of amber is 4821. " * 30)
    script = PLAIN_DECODER.with_name("chat.py")
    command = [sys.executable, str(script), str(SHIPPED), str(text), "What is the value of amber?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 1
