"""A decoder in plain PyTorch, without transformers, on ArkCache: `append` and `attend` are all.

    python examples/plain_decoder.py

The model is random, so its text is noise; what it shows is the wiring, and that a budget bounds
what a step attends while the whole context is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arkcache import CacheConfig, KVCacheManager

WIDTH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_LAYERS, VOCABULARY = 128, 4, 2, 32, 3, 256


def rotate(states: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of [batch, heads, new, HEAD_DIM] at `positions` [new]."""
    frequency = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = positions[:, None] * frequency
    even, odd = states[..., ::2], states[..., 1::2]
    turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


class Block(nn.Module):
    """Attention and a feed-forward layer; the cache is all that attention needs to know."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.sizes = [NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM]
        self.project = nn.Linear(WIDTH, sum(self.sizes))
        self.output = nn.Linear(NUM_HEADS * HEAD_DIM, WIDTH)
        self.feed_forward = nn.Sequential(
            nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, hidden: Tensor, cache: KVCacheManager, positions: Tensor) -> Tensor:
        """hidden [batch, new, WIDTH] to the same shape."""
        states = self.project(self.norm(hidden)).split(self.sizes, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in states)
        cache.append(self.layer, rotate(key, positions), value)
        attended = cache.attend(self.layer, rotate(query, positions))
        hidden = hidden + self.output(attended.transpose(1, 2).flatten(2))
        return hidden + self.feed_forward(hidden)


class Decoder(nn.Module):
    """Tokens [batch, new] to logits [batch, new, VOCABULARY]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(layer) for layer in range(NUM_LAYERS))
        self.unembed = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, cache: KVCacheManager) -> Tensor:
        """Read new tokens after what the cache holds."""
        start = cache.num_columns
        positions = torch.arange(start, start + tokens.shape[1])
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden, cache, positions)
        return self.unembed(hidden)


@torch.inference_mode()
def generate(model: Decoder, prompt: Tensor, num_new: int, cache: KVCacheManager) -> Tensor:
    """Greedy continuation [batch, num_new] of `prompt` [batch, tokens]."""
    tokens = []
    logits = model(prompt, cache)
    for _ in range(num_new):
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        logits = model(tokens[-1], cache)
    return torch.cat(tokens, dim=1)


def make_cache(config: CacheConfig) -> KVCacheManager:
    """A cache of this decoder's shape."""
    return KVCacheManager(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, config)


def main() -> None:
    """Generate with everything attended and with a budget, and show what each kept where."""
    torch.manual_seed(0)
    model, prompt = Decoder().eval(), torch.randint(VOCABULARY, (1, 4000))
    for budget in (None, 512):
        cache = make_cache(CacheConfig(budget_tokens=budget, num_dense_layers=0))
        text = generate(model, prompt, 16, cache)
        stats = cache.stats()
        print(f"budget {budget}: {text[0].tolist()}")
        print(f"  attended {stats.attended_tokens} of {stats.total_tokens} tokens in all layers,")
        print(f"  {stats.device_bytes} bytes on the device, {stats.host_bytes} on the host")


if __name__ == "__main__":
    main()
