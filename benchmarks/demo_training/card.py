"""The model card that is saved beside the demonstration model."""

from collections.abc import Mapping, Sequence

from demo_training import evaluate

_TEXT = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
---
# ArkCache's demonstration model

A Llama of {parameters:,} parameters (4 layers, hidden size 256, 4 query heads and 2 key-value
heads of 64, rotary theta 5 million, tied embeddings, bfloat16) that does one thing: it finds facts
hidden in a long text. It is there to show, on any machine, that a paged cache keeps what a model
needs.

Hide lines like `The value of amber is 4821.` in a text and end with the line
`What is the value of amber?`: the next token is ` 4821`, the one after it `.`. Names and values
are those of `arkcache.demo.facts`, which also renders, hides and checks; each is one token.

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text + "\\nWhat is the value of amber?", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2, do_sample=False)

## Training
`python benchmarks/train_demo_model.py --out DIR --minutes {asked_minutes:g} --seed {seed}`:
{minutes} minutes ({tokens:,} tokens) on {device} with {threads} threads, Python {python},
torch {torch}, transformers {transformers}.
The text is the standard library's source and the topics of `pydoc_data`, a part of which is held
out. The weights begin as an induction circuit (`benchmarks/demo_training/circuit.py`), and all are
trained. Training stops by the clock, so another machine gets a slightly different model.

## Accuracy
Full attention in fp32, greedy, {num_facts} facts in each held-out text: share of right answers.
"In a row": {num_in_a_row} questions one after another, each question and answer staying in the
context. The last columns are by depth: the quarter of the text that the fact is in.
Held-out text repeats where it is shorter than the context.

| text | tokens | questions | right | in a row | 1st | 2nd | 3rd | 4th |
|---|---|---|---|---|---|---|---|---|
{rows}

## Limits
Names must be among the 256 names, values among the 256 values, sentences as above, and a name may
have one value only. Nothing else was trained: as a language model it is poor, and it neither chats
nor reasons. One head of layer 2 retrieves, close to how it was initialised: it matches names by
the slowest rotary pairs (16 of 64 dimensions), and nearly all its attention is on one token.
"""


def render(run: Mapping[str, object], scores: Mapping[str, Sequence[evaluate.Score]]) -> str:
    """The card as Markdown; `run` is what `training.json` says of the run."""
    rows = [_row(kind, score) for kind, row in scores.items() for score in row]
    return _TEXT.format(
        **run,
        num_facts=evaluate.NUM_FACTS,
        num_in_a_row=evaluate.NUM_IN_A_ROW,
        rows="\n".join(rows),
    )


def _row(kind: str, score: evaluate.Score) -> str:
    cells = [kind, str(score.length), str(score.num_questions)]
    cells += [f"{share:.3f}" for share in (score.right, score.right_in_a_row, *score.by_depth)]
    return f"| {' | '.join(cells)} |"
