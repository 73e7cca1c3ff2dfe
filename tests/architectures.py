"""Tiny, randomly initialised models of every architecture that the library is tested on.

A model takes a few milliseconds to build and is always the same. Its weights are large enough that
attention is peaked, that greedy tokens vary and that distant tokens matter.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families import BASE, FAMILIES, GENERATION, VOCAB

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers.logging.set_verbosity_error()

WEIGHT_STD = 0.2
# Far smaller than the other weights: a token's own embedding must not drown what attention brings.
EMBEDDING_STD = 0.04
OWN_KEYS = {"model_type", "head", "attention", "note", "mode"}


@dataclass(frozen=True)
class Architecture:
    """One family: how to build a tiny model of it, and what is special about it."""

    name: str
    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    head: str = "AutoModelForCausalLM"
    attention: str | None = None
    mode: str = "paged"
    note: str = ""

    @property
    def available(self) -> bool:
        """Whether the installed transformers has this family."""
        return self.model_type in CONFIG_MAPPING

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the cache under test is the self-attention half of an `EncoderDecoderCache`."""
        return self.head != "AutoModelForCausalLM"

    def build(self, seed: int = 0, attention: str | None = None) -> PreTrainedModel:
        """A new model in float32 and evaluation mode; the same seed gives the same weights.

        `attention` names the attention implementation; None is what the family defaults to.
        """
        config = AutoConfig.for_model(self.model_type, **self._config_settings())
        head = getattr(transformers, self.head)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = head.from_config(config, attn_implementation=attention or self.attention)
            _randomise(model)
        model.generation_config.update(**GENERATION)
        return model.eval()

    def prompt(
        self, length: int = 60, padding: int = 13, seed: int = 1, batch: int = 2
    ) -> dict[str, torch.Tensor]:
        """Inputs of `generate`: every second row is left-padded by `padding` tokens."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, VOCAB, (batch, length), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1::2, :padding] = 0
        tokens[mask == 0] = GENERATION["pad_token_id"]
        if not self.is_encoder_decoder:
            return {"input_ids": tokens, "attention_mask": mask}
        # Else `generate` puts one before the first prompt, which no longer fits the mask then.
        tokens[:, 0] = GENERATION["decoder_start_token_id"]
        source = self._source(batch, generator)
        return source | {"decoder_input_ids": tokens, "decoder_attention_mask": mask}

    def _source(self, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """What an encoder-decoder's encoder reads: text, mel frames or samples."""
        if self.model_type == "whisper":
            return {"input_features": torch.randn(batch, 16, 32, generator=generator)}
        if self.model_type == "moonshine":
            return {"input_values": torch.randn(batch, 2000, generator=generator)}
        source = torch.randint(3, VOCAB, (batch, 11), generator=generator)
        return {"input_ids": source, "attention_mask": torch.ones_like(source)}

    def _config_settings(self) -> dict[str, Any]:
        """The base settings, without those that this family's config derives, then its own."""
        config_class = CONFIG_MAPPING[self.model_type]
        base = {
            key: value
            for key, value in BASE.items()
            if not isinstance(getattr(config_class, key, None), property)
        }
        return base | dict(self.settings)


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Larger weights than a fresh model's, and biases and norms that are not all equal."""
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    for weight in model.parameters():
        if id(weight) in embeddings:
            weight.normal_(0, EMBEDDING_STD)
        elif weight.ndim >= 2:
            weight.normal_(0, WEIGHT_STD)
        else:
            weight.add_(torch.randn_like(weight) * 0.1)


def _read(name: str, entry: Mapping[str, Any]) -> Architecture:
    own = {key: value for key, value in entry.items() if key in OWN_KEYS}
    settings = {key: value for key, value in entry.items() if key not in OWN_KEYS}
    return Architecture(name, own.pop("model_type", name), settings, **own)


ARCHITECTURES: dict[str, Architecture] = {
    name: architecture
    for name, entry in FAMILIES.items()
    if (architecture := _read(name, entry)).available
}
