"""Marks that several test modules share; what imports this needs pytest."""

import importlib.util
import os

import pytest

needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs Triton kernels on a CPU",
)
