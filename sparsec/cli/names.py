"""What is said when a name is not known.

This file decides which names are near. It must not know what they name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean …?` with the nearest names, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    near = near or [other for other in names if name and name.lower() in other]
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names)}"
