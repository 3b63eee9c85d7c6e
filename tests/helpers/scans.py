"""A picture that costs far more to decode than its pixels are worth."""

from __future__ import annotations

import io

from PIL import Image


def scans(more: int, size: tuple[int, int] = (800, 800)) -> bytes:
    """A progressive JPEG whose last scan comes so often again."""
    file = io.BytesIO()
    Image.new("L", size, 99).save(file, "JPEG", progressive=True, quality=50)
    whole = file.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * more + b"\xff\xd9"
