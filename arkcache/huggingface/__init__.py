"""ArkCache for Hugging Face transformers: a `DynamicCache` whose full-attention layers are paged.

How a step travels: the model calls `cache.update(key, value, layer)` (`cache.py`). The first prompt
is stored and its own keys and values go back, so that the model attends it as it always did. Later
steps get only the new keys and values back, with a tag on both; the model hands them to the
attention function registered as "arkcache" (`attention.py`), which reads the tag and lets the layer
attend its pages. What belongs to a model, such as the attention to restore, rides on the name of
its attention implementation (`attachment.py`). A model is trusted with all this only after a probe
has shown that it gives the same logits (`probe.py`). On a GPU whole steps can be recorded and
replayed (`graphed.py`, `replaying.py`, `recordings.py`).
"""

from arkcache.huggingface.attachment import detach
from arkcache.huggingface.cache import ArkCache
from arkcache.huggingface.graphed import generate_graphed
from arkcache.huggingface.prefixes import PrefixCache

__all__ = ["ArkCache", "PrefixCache", "detach", "generate_graphed"]
