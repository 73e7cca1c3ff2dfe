"""The GPU check: what `benchmarks/gpu_check.py` runs.

`catalogue` lists the checks in their order. `supervisor` runs them in processes of their own, each
of which `worker` serves; neither imports torch. Checks of correctness are in `tests/gpu/`, checks
of speed in the other modules here.
"""
