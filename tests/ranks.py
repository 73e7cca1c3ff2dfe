"""Several processes of one model: how to start them, and what each does as a script.

torchrun --nproc-per-node 2 tests/ranks.py JOBS.json FOLDER
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from arkcache import ArkCache, ArkCacheError

ROOT = Path(__file__).resolve().parents[1]
NUM_PROMPT, NUM_NEW = 400, 16


def torchrun(*arguments: str, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
    """Run a script in two processes, which are gone when this returns or raises."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = inherited | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    with subprocess.Popen(
        [*command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            output, errors = launcher.communicate(timeout=timeout)
        except BaseException:
            launcher.terminate()  # it ends its workers; killed, it would leave them behind
            launcher.communicate()
            raise
    return subprocess.CompletedProcess(command, launcher.returncode, output, errors)


def answer(folder: str, settings: dict[str, Any], *, split: bool) -> dict[str, Any]:
    """What a model of a folder generates behind a cache, and what the cache says of it."""
    plan = DistributedConfig(tp_plan="auto") if split else None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=plan
    ).eval()
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, model.config.vocab_size, (1, NUM_PROMPT), generator=generator)
    try:
        cache = ArkCache(model, **settings)
    except ArkCacheError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    output = model.generate(
        prompt,
        past_key_values=cache,
        max_new_tokens=NUM_NEW,
        min_new_tokens=NUM_NEW,
        do_sample=False,
        prefill_chunk_size=128,
        return_dict_in_generate=True,
        output_logits=True,
    )
    cache.check_integrity()
    stats = cache.stats()
    return {
        "mode": cache.mode,
        "tokens": output.sequences[0, NUM_PROMPT:].tolist(),
        "logits": torch.cat(output.logits).tolist(),
        "kv_heads": [manager.num_kv_heads for manager in cache.managers],
        # As they come back from JSON, which knows no tuples.
        "stats": json.loads(json.dumps(asdict(stats))),
        "over_ranks": json.loads(json.dumps(asdict(stats.over_ranks()))),
    }


def main() -> None:
    """Do every job in all processes, and leave what came of it in a file for each."""
    transformers.logging.set_verbosity_error()
    jobs, folder = sys.argv[1:]
    answers = [answer(*job, split=True) for job in json.loads(Path(jobs).read_text())]
    Path(folder, f"{distributed.get_rank()}.json").write_text(json.dumps(answers))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
