"""All tasks by name. To add one, write its class and name it here."""

from __future__ import annotations

from arkcache.errors import InputError
from arkcache.evaluation.counting import CommonWords, FrequentWords
from arkcache.evaluation.lookups import KeyValue, NumberString, PassKey
from arkcache.evaluation.needles import NIAH, Magic
from arkcache.evaluation.own import OwnOutput, Records
from arkcache.evaluation.passage import Task
from arkcache.evaluation.tracking import VariableTracking
from arkcache.evaluation.trained import Codes, Facts, Hops

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Magic(),
        *NIAH,
        PassKey(),
        NumberString(),
        KeyValue(),
        VariableTracking(),
        CommonWords(),
        FrequentWords(),
        Facts(),
        Codes(),
        Hops(),
        Records(),
        OwnOutput(),
    )
}
LANGUAGE = "language"
"""Predicting real texts: no questions, see `language.py`."""
ATTENTION = "attention"
"""What is attended in these texts: see `attention.py`."""

GROUPS = {
    "niah": tuple(task.name for task in NIAH),
    "ruler": (
        *(task.name for task in NIAH),
        "variable_tracking",
        "common_words",
        "frequent_words",
    ),
    "trained": ("facts", "codes", "hops"),
    "infinitebench": ("passkey", "number_string", "kv_retrieval"),
    "all": (*TASKS, LANGUAGE, ATTENTION),
}
"""Several tasks by one name."""


def task_names(given: str) -> tuple[str, ...]:
    """The tasks that "magic,niah,language" names, each once.

    Raises `InputError` for a name that is none.
    """
    found: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in given.split(","))):
        members = GROUPS.get(name, (name,))
        if not {*members} <= {*GROUPS["all"]}:
            expected = ", ".join((*GROUPS["all"], *GROUPS))
            raise InputError(f"task {name!r}: expected one of {expected}")
        found |= dict.fromkeys(members)
    if not found:
        raise InputError(f"tasks {given!r}: expected at least one, as in magic,language")
    return tuple(found)
