"""Which layers may attend another's keys and values: KVSharer's search, judged at answers.

KVSharer (Yang et al. 2024) tries pairs of layers in the order of how much their keys and values
differ, the most first, and accepts by the cosine of the final hidden states. That cosine stays high
for pairs that destroy retrieval, so pairs are accepted here by the divergence of what comes next:
at the answers to questions about a text, and in real texts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from arkcache.config import CacheConfig
from arkcache.demo import run as demo
from arkcache.demo.machine import describe_machine, versions
from arkcache.demo.models import load_model, pick_device
from arkcache.demo.run import Progress
from arkcache.errors import InputError, UnsupportedModelError
from arkcache.evaluation import language
from arkcache.evaluation.judging import Judge, Judgement
from arkcache.evaluation.tasks import TASKS
from arkcache.huggingface import detach

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_TEXTS, TEXT_TOKENS = 30, 64
"""What keys and values are averaged over (KVSharer's)."""


@dataclass(frozen=True)
class Settings:
    """What to look for, and how; see the options of `arkcache share`.

    Attributes:
        num_shared: layers that are to store nothing; None is a quarter of them.
        most_kl: divergence in nats that the layers found may cost together, the mean at answers and
            the mean in real texts each.
        most_tries: pairs to try.
        alike_first: try the pairs first whose keys and values differ least, not most.
        task: asks the questions, one of `TASKS`; None is "facts" for the shipped model, else
            "magic".
        length, num_questions: tokens of the text that is asked about, and questions about it.
    """

    num_shared: int | None = None
    most_kl: float = 0.1
    most_tries: int = 64
    alike_first: bool = False
    task: str | None = None
    length: int = 512
    num_questions: int = 8
    model: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Raise `InputError` for what cannot be looked for."""
        for name in ("num_shared", "most_tries", "length", "num_questions"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise InputError(f"{name}={size}: expected at least 1")
        if not self.most_kl > 0:
            raise InputError(f"most_kl={self.most_kl}: expected more than 0")
        if self.task is not None and self.task not in TASKS:
            raise InputError(f"task {self.task!r}: expected one of {', '.join(TASKS)}")


@dataclass(frozen=True)
class Tried:
    """A pair that was tried, beside those accepted before it.

    Attributes:
        layer, source: the former was to attend the latter.
        distance: of their keys and values.
        judgement: of all pairs together.
        accepted: whether it was kept.
    """

    layer: int
    source: int
    distance: float
    judgement: Judgement
    accepted: bool


@dataclass
class Found:
    """What a search came to.

    Attributes:
        layer_sources: for `CacheConfig`.
        wanted: layers that were to store nothing.
        alone: the model without sharing.
        num_questions: that were asked.
        tries: in their order.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, Any]
    layer_sources: list[int] = field(default_factory=list)
    wanted: int = 0
    alone: Judgement | None = None
    num_questions: int = 0
    tries: list[Tried] = field(default_factory=list)
    finished: bool = False
    seconds: float = 0.0

    @property
    def num_shared(self) -> int:
        """Layers that store nothing."""
        return sum(layer != source for layer, source in enumerate(self.layer_sources))

    @property
    def judgement(self) -> Judgement | None:
        """Of the layers found; None before the model itself was judged."""
        accepted = [one.judgement for one in self.tries if one.accepted]
        return accepted[-1] if accepted else self.alone

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; "layer_sources" first."""
        judged = self.judgement
        totals = {"num_shared": self.num_shared, "judgement": judged and asdict(judged)}
        return {"layer_sources": self.layer_sources} | totals | asdict(self)


def run(
    settings: Settings,
    progress: Progress = lambda *_: None,
    keep: Callable[[Found], None] = lambda _: None,
) -> Found:
    """Load the model and search; what was found until Ctrl-C is found.

    keep: told what was found so far, whenever a pair was tried.

    Raises `InputError` for what cannot be loaded or fitted, `UnsupportedModelError` for a model
    whose layers cannot share.
    """
    settings.check()
    device = pick_device(settings.device)
    progress("Loading the model", 0, 1)
    model, tokenizer = load_model(settings.model, device, settings.dtype)
    num_threads = demo.threads_for(settings.model)
    resolved = asdict(settings) | {
        "task": settings.task or ("facts" if settings.model is None else "magic"),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_threads": num_threads,
    }
    found = Found(resolved, describe_machine(device), versions())
    start = time.perf_counter()
    try:
        with demo.threads(num_threads):
            for _ in search(model, tokenizer, settings, found, progress):
                found.seconds = time.perf_counter() - start
                keep(found)
        found.finished = True
    except KeyboardInterrupt:  # what was found is worth having
        found.finished = False
    found.seconds = time.perf_counter() - start
    return found


@torch.inference_mode()
def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    found: Found,
    progress: Progress = lambda *_: None,
) -> Iterator[Tried]:
    """Try pairs of layers and note what comes of it in `found`; yields after each.

    The model is as it was afterwards. Errors are those of `run`.
    """
    progress("Comparing layers", 0, 1)
    num_layers, pairs = ranked_pairs(model, _texts(tokenizer, settings.seed))
    found.wanted = max(1, num_layers // 4) if settings.num_shared is None else settings.num_shared
    found.layer_sources = list(range(num_layers))
    try:
        progress("Asking the model itself", 0, 1)
        task, sizes = str(found.settings["task"]), (settings.length, settings.num_questions)
        judge = Judge(model, tokenizer, task, *sizes, settings.seed)
        found.alone, found.num_questions = judge.of(_config(None)), len(judge.answers)
        for distance, layer, source in reversed(pairs) if settings.alike_first else pairs:
            if found.num_shared == found.wanted or len(found.tries) == settings.most_tries:
                return
            sources = shared(found.layer_sources, layer, source)
            if sources is None:
                continue
            progress("Trying pairs", found.num_shared, found.wanted)
            judged = judge.of(_config(tuple(sources)))
            accepted = max(judged.kl, judged.text_kl) <= settings.most_kl
            if accepted:
                found.layer_sources = sources
            tried = Tried(layer, source, distance, judged, accepted)
            found.tries.append(tried)
            yield tried
    finally:
        detach(model)


def shared(sources: list[int], layer: int, source: int) -> list[int] | None:
    """Sources with which `layer`, and all that attend it, attend what `source` attends.

    None where the layer attends another already.
    """
    if sources[layer] != layer:
        return None
    return [sources[source] if own == layer else own for own in sources]


def _config(sources: tuple[int, ...] | None) -> CacheConfig:
    """Settings of a cache in which nothing but the layers' sources matters."""
    return CacheConfig(budget_tokens=None, layer_sources=sources)


# -- which pairs to try first -------------------------------------------------------------------


def _texts(tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
    """Tokens of real texts [texts, tokens]."""
    lots = random.Random(f"{seed} compared")
    drawn = [language.draw(tokenizer, n, TEXT_TOKENS, 1, lots).context for n in range(NUM_TEXTS)]
    return torch.tensor(drawn)


@torch.inference_mode()
def ranked_pairs(model: PreTrainedModel, ids: Tensor) -> tuple[int, list[tuple[float, int, int]]]:
    """How many layers there are; distance, layer and earlier layer of each pair, farthest first.

    The distance of two layers is that of their keys plus that of their values, halved, each the
    mean L2 norm of what the means over texts differ by.

    ids: texts [texts, tokens]. Raises `UnsupportedModelError` where no two layers are alike.
    """
    cache = DynamicCache(config=model.config)
    model(ids.to(model.device), past_key_values=cache, logits_to_keep=1)
    means = {
        number: [states.float().mean(dim=0) for states in (layer.keys, layer.values)]
        for number, layer in enumerate(cache.layers)
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None
    }
    pairs = []
    for source, layer in combinations(means, 2):
        both = list(zip(means[source], means[layer], strict=True))
        if any(mine.shape != its.shape for mine, its in both):
            continue
        apart = [float((mine - its).norm(dim=-1).mean()) for mine, its in both]
        pairs.append((sum(apart) / 2, layer, source))
    if not pairs:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no two layers that attend their whole past and store the "
            "same shapes: none can share"
        )
    return len(cache.layers), sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))
