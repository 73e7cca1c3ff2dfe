"""What this machine has and how fast it is: memory paths, decode steps, prompts, kernels."""
