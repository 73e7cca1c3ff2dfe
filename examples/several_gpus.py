"""Ask a model that is split over several GPUs (or processes on a CPU) about a long text.

    torchrun --nproc-per-node 2 examples/several_gpus.py MODEL FILE QUESTION

Every process loads its share of the model and keeps the KV heads that belong to it. See
docs/several_gpus.md.
"""

import sys
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed.configuration_utils import DistributedConfig

from arkcache import ArkCache

name, file, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
split = DistributedConfig(tp_plan="auto")
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", distributed_config=split).eval()
rank = distributed.get_rank() if distributed.is_initialized() else 0

torch.manual_seed(0)  # where the model's settings draw tokens, all ranks must draw the same
cache = ArkCache(model, budget_tokens=2048)
text = Path(file).read_text(encoding="utf-8")
inputs = tokenizer(f"{text}\n\n{question}", return_tensors="pt").to(model.device)
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=64, prefill_chunk_size=2048)

own = cache.stats()
total = own.over_ranks()  # every rank must call it
if rank == 0:
    print(f"rank 0: {own.device_bytes:,} bytes on its device, {own.host_bytes:,} on the host")
    print(f"in all: {total.device_bytes:,} bytes on devices, {total.host_bytes:,} on the host")
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
if distributed.is_initialized():
    distributed.destroy_process_group()
