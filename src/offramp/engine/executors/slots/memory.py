"""How much memory is free, asked before slots are allocated."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_bytes(device: torch.device | None = None) -> int | None:
    """Memory that can be had without swapping; None where the system does not report it.

    device: of an accelerator, whose own memory is meant; else the machine's.
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
