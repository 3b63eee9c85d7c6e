"""Names that people type: of the hub, and of files that may be misspelt."""

import difflib
import os
import re
from pathlib import Path

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_name(name: str) -> bool:
    """Return True if it may name something on the hub, as OWNER/NAME, and nothing on this machine:
    no file or folder, nor what was to be one in a folder that is there."""
    if _HUB_NAME.fullmatch(name) is None or os.path.exists(name):
        return False
    return not os.path.isdir(name.partition("/")[0])


def close_name(path: str | Path) -> str:
    """A question that names the file or folder which a misspelt one may be, or ""."""
    folder, name = os.path.split(os.path.normpath(path))
    try:
        there = os.listdir(folder or ".")
    except OSError:
        return ""
    close = difflib.get_close_matches(name, there, n=1, cutoff=0.75)
    return f"Did you mean {os.path.join(folder, close[0])!r}? " if close else ""
