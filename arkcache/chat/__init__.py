"""Conversations about long texts: as a library (`Session`) and in a terminal (`arkcache chat`)."""
