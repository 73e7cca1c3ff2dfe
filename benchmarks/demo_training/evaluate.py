"""How often the model answers right, with full attention, by length of context and depth."""

import random
from dataclasses import dataclass

import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from arkcache.demo import facts

_PREFILL_TOKENS = 4096
_ANSWER_TOKENS = 2  # the value and the full stop
_TOKENS_PER_FACT = 10
NUM_FACTS, NUM_IN_A_ROW, NUM_DEPTHS = 32, 16, 4


@dataclass(frozen=True)
class Score:
    """Right answers at one length; `by_depth` are shares, from the text's first quarter on."""

    length: int
    num_questions: int
    right: float
    num_in_a_row: int
    right_in_a_row: float
    by_depth: tuple[float, ...]


class Reader:
    """Reads a text once into a full cache, then answers questions about it."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._cache = DynamicCache(config=model.config)

    def read(self, text: str) -> None:
        """Appends a text to the context, in chunks, so that memory stays bounded."""
        for chunk in self._encode(text).split(_PREFILL_TOKENS, dim=1):
            self._forward(chunk)

    def ask(self, name: str, *, keep: bool) -> str:
        """The greedy answer to the question for `name`; `keep` leaves both in the context."""
        length = self._cache.get_seq_length()
        step = self._encode("\n" + facts.render_question(name))
        answer: list[int] = []
        for _ in range(_ANSWER_TOKENS if keep else 1):
            step = self._forward(step).argmax(-1, keepdim=True)
            answer.append(int(step))
        if keep:
            self._forward(step)
        else:
            self._cache.crop(length - self._cache.get_seq_length())  # negative: so many go
        return self._tokenizer.decode(answer)

    def _encode(self, text: str) -> torch.Tensor:
        ids = self._tokenizer(text, return_tensors="pt")["input_ids"]
        return ids.to(self._model.device)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [1, vocab] of the last token."""
        output = self._model(ids, past_key_values=self._cache, logits_to_keep=1)
        return output.logits[:, -1]


def cut_text(documents: list[str], num_chars: int, rng: random.Random) -> str:
    """A stretch of the documents in random order, repeated where they are too short."""
    order = rng.sample(documents, len(documents))
    text = "\n".join(order)
    text *= -(-num_chars // len(text))
    return text[:num_chars]


@torch.inference_mode()
def score_length(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[str],
    length: int,
    num_texts: int,
) -> Score:
    """Hides facts in `num_texts` texts of about `length` tokens and asks for each of them.

    Every question is asked of the bare text; then some are asked one after another, question and
    generated answer staying in the context.
    """
    by_depth: list[list[bool]] = [[] for _ in range(NUM_DEPTHS)]
    in_a_row: list[bool] = []
    for seed in range(num_texts):
        rng = random.Random(seed)
        hidden = facts.draw_facts(NUM_FACTS, rng)
        depths = facts.spread_depths(NUM_FACTS, rng)
        text = cut_text(documents, length * 4, rng)
        ids = tokenizer(text)["input_ids"][: length - _TOKENS_PER_FACT * NUM_FACTS]
        reader = Reader(model, tokenizer)
        reader.read(facts.hide_in_text(tokenizer.decode(ids), hidden, depths))
        for fact, depth in zip(hidden, depths, strict=True):
            right = facts.is_right(reader.ask(fact.name, keep=False), fact)
            by_depth[int(depth * NUM_DEPTHS)].append(right)
        in_a_row += [
            facts.is_right(reader.ask(fact.name, keep=True), fact)
            for fact in rng.sample(hidden, NUM_IN_A_ROW)
        ]
    answers = [right for part in by_depth for right in part]
    return Score(
        length=length,
        num_questions=len(answers),
        right=sum(answers) / len(answers),
        num_in_a_row=len(in_a_row),
        right_in_a_row=sum(in_a_row) / len(in_a_row),
        by_depth=tuple(sum(part) / len(part) for part in by_depth),
    )
