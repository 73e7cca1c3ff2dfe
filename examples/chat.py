"""Ask a model about a long text: python examples/chat.py MODEL FILE QUESTION

MODEL is a folder or a Hugging Face id of a chat model; the text may be as long as it was made for.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from arkcache import Session

name, file, question = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
model.to("cuda" if torch.cuda.is_available() else "cpu")
session = Session(model, AutoTokenizer.from_pretrained(name), budget_tokens=2048)
session.read(Path(file).read_text(encoding="utf-8"))
for part in session.ask(question, max_new_tokens=256):
    print(part, end="", flush=True)
print()
