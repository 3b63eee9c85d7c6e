"""JSON schemas drawn by a seed, and a model of random weights that writes by them."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import torch

from offramp.adapter.shipped import load_tiny
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits

Schema = dict[str, Any]


def drawn(draw: random.Random, deep: int = 2) -> Schema:
    """A schema that something satisfies, and that has short answers."""
    flat = ["integer", "boolean", "null", "string", "pattern", "enum", "const"]
    kind = draw.choice(flat if deep == 0 else [*flat, "object", "object", "object", "array", "any"])
    match kind:
        case "integer":
            low = draw.randint(-200, 200)
            return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 900)}
        case "string":
            return {"type": "string", "minLength": draw.randint(0, 2), "maxLength": 6}
        case "pattern":
            return {"type": "string", "pattern": draw.choice(["^[a-f]{1,4}$", "^(up|down) [0-9]$"])}
        case "enum":
            return {"enum": draw.sample(["é", "a b", 'q"', 7, None, True, [1, 2], {"k": "v"}], 3)}
        case "const":
            return {"const": draw.choice(["fixed\n", 3.5, -1, False, []])}
        case "array":
            least = draw.randint(0, 2)
            return {
                "type": "array",
                "items": drawn(draw, deep - 1),
                "minItems": least,
                "maxItems": least + draw.randint(0, 2),
            }
        case "any":
            return {"anyOf": [drawn(draw, deep - 1), drawn(draw, deep - 1)]}
        case "object":
            names = draw.sample(["a", "b c", "ü", 'd"', "e"], draw.randint(1, 4))
            return {
                "type": "object",
                "properties": {name: drawn(draw, deep - 1) for name in names},
                "required": draw.sample(names, draw.randint(0, len(names))),
                "additionalProperties": False,
            }
    return {"type": kind}


@cache
def random_model() -> tuple[Backbone, Exits, Any]:
    """The shipped model's shape with random weights, exits that know no more, its processor."""
    shipped, processor = load_tiny("opt", device="cpu")
    model = copy.deepcopy(shipped.model)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=draw)
    backbone = Backbone(model)
    return backbone, Exits(backbone, (1, 3)), processor
