"""What Triton's interpreter cannot do with the packages at hand."""

import os
from importlib.metadata import PackageNotFoundError, version

SYMPTOM = "only 0-dimensional arrays can be converted to Python scalars"
"""What it says in kernels that count up to a number which they have read or computed."""


def why_it_fails() -> str | None:
    """Why interpreted kernels may fail though they are right; None where nothing is known.

    Until 3.7 the interpreter makes numbers of arrays of one element by `int`, which numpy takes
    from 2.4 on only of arrays without dimensions. Kernels on a GPU have nothing to do with that.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        triton, numpy = version("triton"), version("numpy")
    except PackageNotFoundError:
        return None
    if _numbers(triton) >= (3, 7) or _numbers(numpy) < (2, 4):
        return None
    return (
        f"Triton {triton}'s interpreter fails beside numpy {numpy}: it takes triton>=3.7 or "
        "numpy<2.4 (on a GPU, kernels are not interpreted and any of these do)"
    )


def is_that(error: BaseException | None) -> bool:
    """Whether an error comes of it."""
    while error is not None:
        if SYMPTOM in str(error):
            return True
        if isinstance(error, BaseExceptionGroup):
            return all(map(is_that, error.exceptions))
        error = error.__cause__ or error.__context__
    return False


def _numbers(release: str) -> tuple[int, int]:
    major, minor = release.split(".")[:2]
    return int(major), int(minor)
