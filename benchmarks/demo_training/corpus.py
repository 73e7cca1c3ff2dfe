"""The text that the demonstration model reads: what every Python installation carries.

Documents are the topics of `pydoc_data` (English) and the standard library's source. A fifth of
the topics and an eighth of the modules are held out: neither the tokenizer nor the model sees them.
"""

import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from arkcache.demo import facts

END_OF_TEXT = "<|endoftext|>"
_NUM_BPE_TOKENS = 1280  # 256 bytes and 1024 merges
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}


class Corpus(NamedTuple):
    """Documents by kind: English topics and Python source."""

    english: list[str]
    source: list[str]


def load_corpus(*, held_out: bool) -> Corpus:
    """The training documents, or the held-out ones; which is which depends on names alone."""
    english = [text for name, text in sorted(topics.items()) if _is_held_out(name, 5) == held_out]
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts)
        and _is_held_out(path.relative_to(root).as_posix(), 8) == held_out
    ]
    return Corpus(english, [path.read_text("utf-8", errors="replace") for path in paths])


def _is_held_out(name: str, one_in: int) -> bool:
    return zlib.crc32(name.encode()) % one_in == 0


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every name and every value, with its space, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_NUM_BPE_TOKENS + 1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # English is a twentieth of the text; repeated, it gets its share of the merges.
    tokenizer.train_from_iterator(corpus.english * 8 + corpus.source, trainer)
    words = [f" {word}" for word in (*facts.names(), *facts.values())]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """All documents' ids in one array, int64, each closed by the end-of-text token."""
    closing = [tokenizer.eos_token_id]
    ids = [tokenizer(document)["input_ids"] + closing for document in documents]
    return np.concatenate([np.asarray(part) for part in ids])
