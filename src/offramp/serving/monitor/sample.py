"""What a watched guarantee is told of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from offramp.core.decoding.policy import GenerationOutput


@dataclass(frozen=True, eq=False)
class Sample:
    """A request that was answered early. inputs, options: as submitted. image, prompt: of the
    question; image None: compared already, and dropped. client: any name of who asks. like: whether
    the request is like the calibrated ones, as far as tested. id: of the reply."""

    inputs: Mapping[str, Any]
    options: Mapping[str, Any]
    output: GenerationOutput
    image: Image.Image | None
    prompt: str
    client: str = ""
    like: bool = True
    id: str = ""
