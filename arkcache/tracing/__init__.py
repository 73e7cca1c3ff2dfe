"""What decode steps did, step by step: recorded, kept in a file, shown as a page."""
