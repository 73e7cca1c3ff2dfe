"""Trains the demonstration model that ships in `arkcache/demo/model`, or one for harder lookups.

    python benchmarks/train_demo_model.py --out DIR [--minutes M] [--seed S] [--device cpu|cuda]
    python benchmarks/train_demo_model.py --out DIR --kind lookups

The second answers `facts`, `codes` and `hops` of `arkcache eval --model DIR`.
The text is what every Python installation carries, the standard library's. A quarter of an hour
on two CPU cores does; a GPU needs less. Ctrl-C ends training early, saves and evaluates. The seed
fixes weights and batches, the clock how many of them there are.
"""

import enum
import json
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from demo_training import batches, card, circuit, corpus, evaluate
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from arkcache.evaluation import run as evaluation
from arkcache.evaluation.figures import task_rows
from arkcache.evaluation.run import Settings
from arkcache.evaluation.tasks import GROUPS

# Share of the time up to which batches of so many sequences of so many tokens are drawn.
STAGES = ((0.05, 32, 128), (0.2, 8, 512), (0.5, 4, 1024), (0.8, 2, 2048), (1.0, 1, 4096))
PEAK_LEARNING_RATE = 1e-3
WARM_UP, FLOOR = 0.02, 0.03  # share of the time; share of the peak that is left at the end
# Steps of the warm-up at least: on a slow machine its share of the time is a few steps, and the
# first large ones undo the circuit that the weights begin as.
WARM_UP_STEPS = 100
MAX_SPAN = 65536
REPORT_SECONDS = 20.0
EVALUATED_TASKS, NUM_QUESTIONS = GROUPS["trained"], 32
TASK_LENGTHS = (1024, 4096)
EVALUATED_LENGTHS = (1024, 4096, 8192, 16384, 32768)


class Kind(enum.StrEnum):
    """What a model is to do: find single values, or codes and references as well."""

    FACTS = "facts"
    LOOKUPS = "lookups"


CIRCUITS = {Kind.FACTS: circuit.FACTS, Kind.LOOKUPS: circuit.LOOKUPS}


def loss_of(model: LlamaForCausalLM, batch: batches.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean cross-entropy, and the share of right answers."""
    # The mask of ones keeps jumps in the positions from being read as separate sequences.
    hidden = model.model(
        batch.ids[:, :-1],
        position_ids=batch.position_ids[:, :-1],
        attention_mask=torch.ones_like(batch.ids[:, :-1]),
        use_cache=False,
    ).last_hidden_state
    target, weight = batch.ids[:, 1:], batch.weights[:, 1:]
    counts = weight > 0  # most text tokens do not: their logits are not computed
    target, weight = target[counts], weight[counts]
    logits = model.lm_head(hidden[counts]).float()
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    is_answer = weight == batches.ANSWER_WEIGHT
    right = (logits.argmax(-1) == target)[is_answer].float().mean()
    return (loss * weight).sum() / weight.sum(), right


def learning_rate(progress: float, num_steps: int) -> float:
    """Linear warm-up, then half a cosine; `progress` is the share of the time that is gone."""
    warm = min(1.0, progress / WARM_UP, (num_steps + 1) / WARM_UP_STEPS)
    cosine = (1 + math.cos(math.pi * max(0.0, progress - WARM_UP) / (1 - WARM_UP))) / 2
    return PEAK_LEARNING_RATE * warm * (FLOOR + (1 - FLOOR) * cosine)


def train(model: LlamaForCausalLM, maker: batches.BatchMaker, seconds: float) -> int:
    """Trains in place for so long, or until interrupted; returns the number of tokens seen."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    start = reported = time.monotonic()
    num_tokens = num_steps = 0
    try:
        while (progress := (time.monotonic() - start) / seconds) < 1:
            size, length = next((s, n) for end, s, n in STAGES if progress < end)
            batch = batches.Batch(*(part.to(model.device) for part in maker.draw(size, length)))
            with torch.autocast(model.device.type, torch.bfloat16):
                loss, right = loss_of(model, batch)
            optimizer.param_groups[0]["lr"] = learning_rate(progress, num_steps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            num_tokens += batch.ids.numel()
            num_steps += 1
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                print(
                    f"{progress:4.0%}  {num_steps:5d} steps  {size} x {length}  "
                    f"loss {loss.item():.3f}  right {right.item():.2f}",
                    flush=True,
                )
    except KeyboardInterrupt:
        print("interrupted; saving what is learnt")
    return num_tokens


def evaluate_folder(folder: Path, num_texts: int) -> dict[str, list[evaluate.Score]]:
    """Scores of the saved model, in fp32, on held-out documents of each kind."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    scores: dict[str, list[evaluate.Score]] = {}
    for kind, documents in corpus.load_corpus(held_out=True)._asdict().items():
        scores[kind] = []
        for length in EVALUATED_LENGTHS:
            score = evaluate.score_length(model, tokenizer, documents, length, num_texts)
            scores[kind].append(score)
            print(kind, score, flush=True)
    return scores


def evaluate_tasks(folder: Path) -> dict[str, list[dict[str, object]]]:
    """What the saved model answers of `arkcache eval`'s tasks, in fp32, with full attention."""
    settings = Settings(
        tasks=EVALUATED_TASKS,
        lengths=TASK_LENGTHS,
        budgets=("none",),
        methods=("full",),
        num_questions=NUM_QUESTIONS,
        model=str(folder),
        dtype="float32",
    )
    rows: dict[str, list[dict[str, object]]] = {task: [] for task in EVALUATED_TASKS}
    for row in task_rows(evaluation.run(settings)):
        score = {"length": row.case.length, "asked": row.num_asked, "right": row.num_right}
        rows[row.case.task].append(score)
        print(row.case.task, score, flush=True)
    return rows


def main(
    out: Annotated[Path, typer.Option(help="Folder for the model, its tokenizer and its card.")],
    kind: Annotated[Kind, typer.Option(help="What the model is to do.")] = Kind.FACTS,
    minutes: Annotated[float, typer.Option(help="Training time; evaluation comes on top.")] = 10.0,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    num_texts: Annotated[int, typer.Option(help="Texts of 32 facts for each length.")] = 4,
) -> None:
    """Trains a model, saves it (also on Ctrl-C) and measures it."""
    documents = corpus.load_corpus(held_out=False)
    tokenizer = corpus.train_tokenizer(documents)
    vocabulary = batches.make_vocabulary(tokenizer)
    texts = [corpus.encode_documents(tokenizer, kind) for kind in documents]
    torch.manual_seed(seed)
    model = circuit.build_model(
        CIRCUITS[kind], len(tokenizer), vocabulary.names.tolist(), vocabulary.values.tolist()
    ).to(device)
    looks_up = kind is Kind.LOOKUPS
    maker = batches.BatchMaker(texts, vocabulary, seed, MAX_SPAN, looks_up=looks_up)
    start = time.monotonic()
    num_tokens = train(model, maker, 60 * minutes)
    run = {
        "kind": kind.value,
        "asked_minutes": minutes,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "seed": seed,
        "tokens": num_tokens,
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": model.num_parameters(),
    }
    model.to("cpu", torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = out / "training.json"
    record.write_text(json.dumps(run, indent=2) + "\n")
    if looks_up:
        rows = evaluate_tasks(out)
    else:
        scores = evaluate_folder(out, num_texts)
        rows = {name: [asdict(score) for score in row] for name, row in scores.items()}
        (out / "README.md").write_text(card.render(run, scores))
    record.write_text(json.dumps({**run, "scores": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
