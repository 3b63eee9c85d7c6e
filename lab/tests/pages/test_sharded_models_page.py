"""The page on models that are too large for one card: its program runs, in two processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image
from smolvlm import save_smolvlm

from offramp_lab.places import ROOT

PAGE = (ROOT / "docs/sharded-models.md").read_text(encoding="utf-8")
LOADED = """
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(name)
"""


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_page_runs_in_two_processes_on_a_tiny_model(tmp_path: Path) -> None:
    save_smolvlm(tmp_path / "MODEL")
    lines = []
    for number in range(8):
        name = f"{number}.png"
        Image.new("RGB", (32, 32), (30 * number, 0, 0)).save(tmp_path / name)
        lines.append(json.dumps({"image": name, "caption": "a red dog"}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    program, by_hand = blocks("python")
    program, end = program.replace("steps=2000", "steps=2").rsplit("distributed.", 1)
    by_hand = by_hand.replace("language_model", "text_model")  # where this family's layers are
    by_hand += "assert backbone.split\n"
    (tmp_path / "split.py").write_text(f"{program}{LOADED}{by_hand}distributed.{end}")
    (command,) = blocks("bash")
    first, *rest = command.replace("nproc_per_node 8", "nproc_per_node 2").split()
    assert first == "torchrun"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *rest],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3  # one process's answer
    assert (tmp_path / "exits" / "adapter.json").is_file()
