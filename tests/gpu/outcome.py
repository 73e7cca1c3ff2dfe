"""What a check may say beside that it passed or failed."""


class Skipped(Exception):
    """Why a check cannot be done here."""
