"""Names that people type: of the hub, and of files that may be misspelt."""

import difflib
import os
import re
from pathlib import Path

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_name(name: str) -> bool:
    """Return True if a name may be one of the hub, OWNER/NAME, and is no path on this machine:
    neither a file or folder, nor a new name in an existing folder."""
    if _HUB_NAME.fullmatch(name) is None or os.path.exists(name):
        return False
    return not os.path.isdir(name.partition("/")[0])


def close_name(path: str | Path) -> str:
    """Return a question with the file or folder that a misspelt path may mean; "" for none."""
    folder, name = os.path.split(os.path.normpath(path))
    try:
        there = os.listdir(folder or ".")
    except OSError:
        return ""
    close = difflib.get_close_matches(name, there, n=1, cutoff=0.75)
    return f"Did you mean {os.path.join(folder, close[0])!r}? " if close else ""
