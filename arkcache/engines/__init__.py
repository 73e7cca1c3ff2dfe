"""Who runs a decode step: what it shares, what rates pages, and how steps are captured."""
