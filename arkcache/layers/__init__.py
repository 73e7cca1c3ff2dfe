"""What a manager holds: a cache for each attention layer."""
