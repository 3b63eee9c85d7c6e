"""The commands for BLIP-2 run from end to end: on the tiny model, over miniature official files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from offramp import cli
from offramp_lab.recipes.blip2 import BACKBONES, DATA, commands

TINY = {BACKBONES["opt"]: "tiny-opt", BACKBONES["t5"]: "tiny-t5", "4096": "64"}
SHORT = ("--steps", "2", "--evaluate-every", "1", "--batch-size", "4", "--max-new-tokens", "8")
COUNT = 8
FAST = {"captions": "CIDEr", "dialogue": "mrr"}  # the others need Java, or many candidates


def write(root: Path, name: str, content: Any) -> None:
    (root / name).write_text(json.dumps(content))


def picture(root: Path, name: str, number: int) -> str:
    place = root / name
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (number % 256, 40 * number % 256, 90)).save(place)
    return place.name


def captions(root: Path) -> None:
    """COCO by Karpathy's splits, and NoCaps."""
    rows = []
    for place, split in enumerate(("train", "val", "test")):
        folder = "train2014" if split == "train" else "val2014"
        for n in range(COUNT):
            file = picture(root, f"{folder}/{split}{n}.jpg", 50 * place + n)
            row = {"split": split, "filepath": folder, "filename": file}
            rows.append({**row, "sentences": [{"raw": "A dog on grass."}, {"raw": "A dog."}]})
    write(root, "dataset_coco.json", {"images": rows})
    images = [
        {"id": n, "file_name": picture(root, f"nocaps/{n}.jpg", 200 + n)} for n in range(COUNT)
    ]
    said = [{"image_id": n, "caption": "A cat."} for n in range(COUNT)]
    write(root, "nocaps_val_4500_captions.json", {"images": images, "annotations": said})


def questions(root: Path) -> None:
    """VQA v2 and OK-VQA, which share their layout and COCO's images; and GQA."""
    for place, split in enumerate(("train", "val")):
        asked, answered = [], []
        for n in range(COUNT):
            picture(root, f"{split}2014/COCO_{split}2014_{n:012d}.jpg", 100 * place + n)
            asked.append({"question_id": n, "image_id": n, "question": "is it red?"})
            answers = [{"answer": "yes"} for _ in range(10)]
            answered.append({"question_id": n, "image_id": n, "answers": answers})
        for before, mark in (("v2_OpenEnded_mscoco", "v2_mscoco"), ("OpenEnded_mscoco", "mscoco")):
            write(root, f"{before}_{split}2014_questions.json",
                  {"data_subtype": f"{split}2014", "questions": asked})  # fmt: skip
            write(root, f"{mark}_{split}2014_annotations.json", {"annotations": answered})
    for place, name in enumerate(("train_balanced", "val_balanced", "testdev_balanced")):
        rows = {}
        for n in range(COUNT):
            image = picture(root, f"gqa/{name}{n}.jpg", 60 * place + n).removesuffix(".jpg")
            rows[str(n)] = {"imageId": image, "question": "what is it?", "answer": "dog"}
        write(root, f"{name}_questions.json", rows)


def dialogues(root: Path) -> None:
    for place, split in enumerate(("train", "val")):
        told = []
        for n in range(COUNT):
            name = f"train2014/COCO_train2014_{n + 500:012d}.jpg"
            if split == "val":
                name = f"VisualDialog_val2018/VisualDialog_val2018_{n + 900:012d}.jpg"
            picture(root, name, 120 * place + n)
            turn = {"question": 0, "answer_options": [0, 1], "gt_index": 0}
            image = n + (900 if split == "val" else 500)
            told.append({"image_id": image, "caption": "a dog", "dialog": [turn]})
        data = {"questions": ["is it big"], "answers": ["yes", "no"], "dialogs": told}
        write(root, f"visdial_1.0_{split}.json", {"split": split, "data": data})


@pytest.mark.parametrize("kind, name", [*(("opt", n) for n in DATA), ("t5", "vqav2")])
def test_train_calibrate_and_evaluate(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for make in (captions, questions, dialogues):
        make(tmp_path)
    monkeypatch.chdir(tmp_path)
    steps = commands(name, kind, device="cpu", extra=SHORT)
    if name == "nocaps":  # takes what COCO left
        steps = [*commands("coco", kind, device="cpu", extra=SHORT)[:2], *steps]
    for step in steps:
        options = [TINY.get(part, part) for part in step[1:]]
        if options[0] == "calibrate":  # half of what the test would see, or nothing is left of it
            options[options.index("--limit") + 1] = str(COUNT // 2)
            options.append("--write")  # so few can guarantee nothing, and would leave the adapter
        options.append("--json")
        if options[0] == "eval" and DATA[name].task in FAST:
            options += ["--metrics", FAST[DATA[name].task]]
        assert cli.main(options) == 0, capsys.readouterr().err
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    used = DATA[name].test == DATA[name].calibration
    assert shown["n"] == COUNT - used * COUNT // 2
    assert set(shown["modes"]) == {"full", "early_exit"}


def test_several_processes_train_by_accelerate() -> None:
    train, calibrate, _ = commands("coco", "t5", processes=4)
    assert train[:6] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "4", "-m"]
    assert calibrate[0] == "offramp"
