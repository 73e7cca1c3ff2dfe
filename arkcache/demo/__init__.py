"""A small model that retrieves facts from long texts, and the facts it is asked about."""
