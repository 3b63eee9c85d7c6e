"""Print the commands that train, calibrate and evaluate exits of BLIP-2 on a data set.

Nothing runs: what is printed is for a shell, and for a scheduler.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

BACKBONES = {"opt": "Salesforce/blip2-opt-2.7b", "t5": "Salesforce/blip2-flan-t5-xl"}
DEPTHS = {"opt": 8, "t5": 6}  # a quarter of 32 and of 24 layers
PROMPTS = {
    "captions": "a photo of",
    "vqa": "Question: {question} Short answer:",
    "okvqa": "Question: {question} Short answer:",
    "gqa": "Question: {question} Short answer:",
    "dialogue": "Question: {question} Answer:",
}


@dataclass(frozen=True)
class Data:
    """Official files below one root, as they are downloaded.

    train, calibration, test: the options that name them. What calibration saw is left out of the
    test. limits: examples to train exits and to calibrate on; None there: trained on another set.
    """

    task: str
    calibration: str
    test: str
    train: str | None = None
    train_limit: int = 20_000
    calibration_limit: int = 3_000


_VQA = "--data v2_OpenEnded_mscoco_{0}2014_questions.json --images {0}2014"
_OKVQA = "--data OpenEnded_mscoco_{0}2014_questions.json --images {0}2014"
_COCO = "--data dataset_coco.json --images . --split {0}"
_VISDIAL = "--data visdial_1.0_{0}.json --images {1}"

DATA = {
    "coco": Data("captions", _COCO.format("val"), _COCO.format("test"), _COCO.format("train")),
    "nocaps": Data(
        "captions",
        _COCO.format("val"),
        "--data nocaps_val_4500_captions.json --images nocaps",
    ),
    "vqav2": Data("vqa", _VQA.format("val"), _VQA.format("val"), _VQA.format("train")),
    "okvqa": Data("okvqa", _OKVQA.format("val"), _OKVQA.format("val"), _OKVQA.format("train"),
                  calibration_limit=1_500),
    "gqa": Data(
        "gqa",
        "--data val_balanced_questions.json --images gqa",
        "--data testdev_balanced_questions.json --images gqa",
        "--data train_balanced_questions.json --images gqa",
    ),
    "visdial": Data(
        "dialogue",
        _VISDIAL.format("val", "VisualDialog_val2018"),
        _VISDIAL.format("val", "VisualDialog_val2018"),
        _VISDIAL.format("train", "."),
    ),
}  # fmt: skip
"""NoCaps is zero-shot: its exits are trained and calibrated on COCO, and so is the guarantee."""


def commands(
    name: str,
    kind: str,
    *,
    device: str = "cuda",
    processes: int = 1,
    extra: Sequence[str] = (),
) -> list[list[str]]:
    """Arguments of `offramp`, a list for each step; of `accelerate launch` where there are several
    processes to train.

    extra: more options for training, such as --steps.
    """
    data, prompt = DATA[name], PROMPTS[DATA[name].task]
    backbone = ["--backbone", BACKBONES[kind], "--dtype", "bfloat16", "--device", device]
    exits = f"exits/{'coco' if data.train is None else name}-{kind}"
    offramp = ["offramp"]
    launched = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes),
                "-m", "offramp.cli"]  # fmt: skip
    steps = []
    if data.train is not None:
        steps += [
            [*(offramp if processes == 1 else launched), "train", *backbone,
             *data.train.split(), "--prompt", prompt, "--limit", str(data.train_limit),
             "--depths", str(DEPTHS[kind]), "--shortlist", "4096", *extra, "--out", exits],
            [*offramp, "calibrate", "--adapter", exits, *backbone, *data.calibration.split(),
             "--prompt", prompt, "--limit", str(data.calibration_limit),
             "--risk", "consistency", "--target", "0.01"],
        ]  # fmt: skip
    steps.append(
        [*offramp, "eval", "--adapter", exits, *backbone, "--task", data.task,
         *data.test.split(), "--prompt", prompt, "--leave-out-seen", "--out", f"runs/{name}-{kind}"]
    )  # fmt: skip
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python -m offramp_lab.recipes.blip2 coco --backbone opt",
        description=__doc__,
    )
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--backbone", choices=BACKBONES, default="opt", help="default: opt")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--processes", type=int, default=1, help="GPUs to train on (default: 1)")
    arguments = parser.parse_args()
    for step in commands(
        arguments.data,
        arguments.backbone,
        device=arguments.device,
        processes=arguments.processes,
    ):
        print(shlex.join(step))


if __name__ == "__main__":
    main()
