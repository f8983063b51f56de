"""Words for errors about names that are misspelt."""

import difflib
from collections.abc import Iterable


def meant(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...? " with the nearest of the known names, or nothing if none is near.

    >>> meant("galor", ["galore", "muon"]), meant("x", ["galore"])
    ('did you mean galore? ', '')
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""
