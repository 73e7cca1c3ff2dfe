"""What a model still knows behind a cache: tasks, methods, figures. `run.py` is where to start."""
