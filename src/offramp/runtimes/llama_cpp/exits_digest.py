"""Which exits a file was exported from."""

from __future__ import annotations

import hashlib

import torch

from offramp.adapter import Adapter


def exits_digest(adapter: Adapter) -> str:
    """SHA-256 over the exits' tensors and the shortlist, the same in float32 and bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter.exits.modules.state_dict().items()):
        digest.update(name.encode())
        bits = tensor.detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16)
        digest.update(bits.numpy().tobytes())
    shortlist = adapter.exits.shortlist
    if shortlist is not None:
        digest.update(shortlist.cpu().long().numpy().tobytes())
    return digest.hexdigest()
