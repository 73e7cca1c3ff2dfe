"""The command `doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from arkcache.cli.common import print_result, told_in_a_line
from arkcache.cli.options import Json, Output

DOCTOR_CODES = (
    "Exit codes: 0 all is fine; 1 hardware that is here cannot be used, or the output cannot be "
    "written; 2 wrong usage; 130 interrupted."
)


def doctor(
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Leave the memory paths unmeasured.")
    ] = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Say what this machine has, what ArkCache would run on, and what is missing for more.

    Everything missing comes with what installs it. Measuring takes about two seconds, 80 MiB of
    memory and 16 MiB of disk. Exit code 0 if all is fine, also where packages that this machine can
    do without are missing; 1 if hardware that it has cannot be used, such as a GPU without Triton
    or cupy.

        arkcache doctor --json --output machine.json
    """
    with told_in_a_line("doctor", output):
        from arkcache.bench.diagnosis import diagnose
        from arkcache.bench.diagnosis_table import render

        found = diagnose(measure=not no_measure)
        print_result(found.to_dict(), lambda: render(found), as_json, output)
        if not found.is_fine:
            raise typer.Exit(1)
