"""The documentation is true: its code runs, its links lead somewhere, its site is complete."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import arkcache
from arkcache.demo.models import SHIPPED

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]

NOT_RUN = {
    ("README.md", 2): "the cache is another by now, a manager; docs/gpu.md has the same, and is run"
}
"""Blocks of Python that cannot run here, by file and number, and why. In docs/ the text says so,
too, in the line above the block: <!-- not run: why -->."""


@dataclass(frozen=True)
class Block:
    """A fenced block of Python.

    Attributes:
        line: of the file, where its code begins.
        marked: why the text says that it is not run; None where it says nothing.
    """

    number: int
    line: int
    code: str
    marked: str | None


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    pattern = r"^(?:<!-- not run: (?P<why>.+) -->\n)?```python\n(?P<code>.*?)^```$"
    found = re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    return [
        Block(number, text.count("\n", 0, match.start("code")) + 1, match["code"], match["why"])
        for number, match in enumerate(found)
    ]


WITH_CODE = [path for path in TEXTS if blocks_of(path)]


@pytest.fixture(scope="module")
def tiny() -> tuple[LlamaForCausalLM, Any]:
    """A random model and a tokenizer of its vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture
def stand_ins(
    tiny: tuple[LlamaForCausalLM, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """What the texts take for granted: a model, a tokenizer, files, and sizes."""
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    for name, stand_in in (("AutoModelForCausalLM", model), ("AutoTokenizer", tokenizer)):
        load = staticmethod(lambda *_, stand_in=stand_in, **__: copy.deepcopy(stand_in))
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", load)
    text = "The value of amber is 4821. Nobody wrote a letter. " * 40
    for file in ("a_long_report.txt", "book.txt"):
        (tmp_path / file).write_text(text)
    (tmp_path / "mine.toml").write_text("num_recent_tokens = 64\n")
    monkeypatch.chdir(tmp_path)
    session = arkcache.Session(model, tokenizer, budget_tokens=256)
    session.read("The value of amber is 4821. " * 20)
    yield {
        "__name__": "__main__",
        "arkcache": arkcache,
        "torch": torch,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "model": model,
        "tokenizer": tokenizer,
        "session": session,
        "cache": arkcache.ArkCache(model, budget_tokens=256),
        "Session": arkcache.Session,
        "Path": Path,
        "inputs": tokenizer(text, return_tensors="pt"),
        "name": "a/model",
        "text": text,
        "layer": 0,
        "num_layers": 1,
        "num_kv_heads": 2,
        "head_dim": 16,
        "device": "cpu",
        "dtype": torch.float32,
        **dict(zip(("key", "value", "query"), torch.randn(3, 1, 2, 50, 16), strict=True)),
    }
    arkcache.detach(model)


@pytest.mark.filterwarnings("ignore:decode steps are not replayed:UserWarning")  # without a GPU
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # open(...).read() in a line
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_runs(path: Path, stand_ins: dict[str, Any]) -> None:
    """The blocks of a text in their order, in one namespace, as a reader would type them."""
    name = str(path.relative_to(ROOT))
    for block in blocks_of(path):
        if (name, block.number) in NOT_RUN:
            continue
        # So that an error names the line of the text.
        code = compile("\n" * (block.line - 1) + block.code, name, "exec")
        exec(code, stand_ins)


def test_what_is_not_run_is_listed() -> None:
    blocks = {
        (str(path.relative_to(ROOT)), one.number): one for path in TEXTS for one in blocks_of(path)
    }
    marked = {where: one.marked for where, one in blocks.items() if one.marked is not None}
    in_docs = {where: why for where, why in NOT_RUN.items() if where[0].startswith("docs/")}
    assert marked == in_docs
    assert {*NOT_RUN} <= {*blocks}
    assert len(NOT_RUN) <= 3


def test_a_block_that_fails_names_its_line(tmp_path: Path) -> None:
    text = tmp_path / "text.md"
    text.write_text("# A\n\n```python\na = 1\n```\n\n<!-- not run: why -->\n```python\nb\n```\n")
    first, second = blocks_of(text)
    assert (first.line, first.code, first.marked) == (4, "a = 1\n", None)
    assert (second.line, second.number, second.marked) == (9, 1, "why")


def anchors_of(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    outside = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    heads = re.findall(r"^#+ (.+)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        if "://" in target:
            continue
        if not place.exists() or (anchor and anchor not in anchors_of(place)):
            lost.append(target)
    assert lost == []


def nav_pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in nav_pages(part)]


def test_the_site_has_every_page_once() -> None:
    """A page that is new gets a line in the nav of mkdocs.yml."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [str(path.relative_to(ROOT / "docs")) for path in PAGES]
    assert sorted(nav_pages(site["nav"])) == sorted(pages)
