"""A Python of an environment with vLLM, which is another program here."""

from __future__ import annotations

from pathlib import Path


def python_with_vllm(path: Path, program: str = "") -> Path:
    """Write it; it has every module that it is asked for. program: of the shell, which it runs in a
    server's place."""
    looks = 'for word; do case "$word" in *find_spec*) exit 0;; esac; done'
    path.write_text(f"#!/bin/sh\n{looks}\n{program}")
    path.chmod(0o755)
    return path
