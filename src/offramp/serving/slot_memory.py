"""Whether slots fit into the memory that is free, asked before any is allocated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from offramp.core.errors import InputError
from offramp.core.executors.slots.cache import rounded
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet


def check_room(backbone: Backbone, exits: ExitSet | None, slots: int, limit: int) -> None:
    """Raise `InputError` where `slots` slots of `limit` tokens would not fit in memory."""
    config: Any = backbone.text_config
    entries = backbone.depth + (len(exits.entries) if exits is not None else 0)
    slot = 2 * entries * _widest_row(config) * rounded(limit + 1) * backbone.dtype.itemsize
    needed, free = slots * slot, free_bytes(backbone.device)
    if free is not None and needed > free:
        raise InputError(
            f"{slots} slots of {limit} tokens need {needed / 1e9:.2f} GB for keys and values, and "
            f"{free / 1e9:.2f} GB are free.",
            f"Ask for at most {max(0, int(slots * free / needed))} slots, or for shorter ones.",
        )


def _widest_row(config: Any) -> int:
    """Numbers in a layer's keys of a token; the most, where layers differ."""
    # Where their heads differ, the whole model's configuration refuses to say how wide they are.
    layers = getattr(config, "per_layer_config", None)
    return max(_row(layers[n]) for n in range(len(layers))) if layers else _row(config)


def _row(config: Any) -> int:
    heads = int(getattr(config, "num_attention_heads", 0))
    if not heads:  # it goes by other names: nothing is known of its size
        return 0
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    width = int(width or config.hidden_size // heads)
    return width * int(getattr(config, "num_key_value_heads", None) or heads)


def free_bytes(device: torch.device | None = None) -> int | None:
    """Return the free memory in bytes, without swapping; None where the system does not report it.

    device: an accelerator's own memory, or else the machine's.
    """
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):  # neither Linux nor a Unix that counts pages
        return None
