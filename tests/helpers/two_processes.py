"""One of two processes that train together; `training/test_two_processes.py` starts it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fakes
import families
import torch
from command_line import TRAIN
from training_runs import SHARED

from offramp import cli
from offramp.core.errors import TrainingError
from offramp.core.models.backbone import Backbone
from offramp.training import trainer as module

torch.set_num_threads(1)
OUT, PHOTOS, RANK = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("only the main process writes")


def trainer(name: str, config: Any) -> module.Trainer:
    processor = fakes.Blip2FakeProcessor("blip2-opt")
    backbone = Backbone(families.build("blip2-opt"))
    return module.Trainer(backbone, processor, fakes.examples(13), config, OUT / name)


def finish(name: str, config: Any, *, resume: bool = False) -> None:
    run = trainer(name, config)
    assert run.accelerator.num_processes == 2
    run.run(resume)
    state = {
        "exits": run.exits.state_dict(),
        "discriminators": run.discriminators.state_dict(),
        "progress": asdict(run.progress),
        "checks": {} if run.shortlist is None else {"shortlist": run.shortlist},
    }
    torch.save(state, OUT / f"{name}-{RANK}.pt")


if RANK:
    module.save_state = forbidden
    module.JsonlLog = forbidden  # type: ignore[assignment, misc]
    module.Adapter.save = forbidden  # type: ignore[method-assign]

finish("supervised", SHARED)
# A regime that drops other numbers in each process, a game, and an early stop.
pseudo = replace(SHARED, regime="pseudo", min_confidence=0.04, adversarial=0.1)
finish("pseudo", replace(pseudo, steps=30, evaluate_every=2, patience=1, shortlist=9))


# Two machines without a shared disk: the main process alone has a checkpoint; all go on from it.
def stops(batch: Any, step: int) -> Any:
    if step == 3:
        raise KeyboardInterrupt
    return first_half(batch, step)


own = f"apart-{RANK}"
run = trainer(own, SHARED)
first_half = run._step
run._step = stops  # type: ignore[method-assign]
with suppress(KeyboardInterrupt):
    run.run()
if RANK == 0:
    (OUT / "damaged").mkdir()
    shutil.copytree(OUT / own / module.FOLDER, OUT / "damaged" / module.FOLDER)
finish(own, SHARED, resume=True)
if RANK == 0:
    state = OUT / "damaged" / module.FOLDER / "state.pt"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
try:
    trainer("damaged" if RANK == 0 else "nowhere", SHARED).run(resume=True)
except TrainingError as error:
    (OUT / f"damaged-{RANK}.json").write_text(json.dumps(str(error)))

run = trainer("poisoned", SHARED)
real = run._step


def poison(batch: Any, step: int) -> Any:
    if step == 1 and RANK == 1:
        batch = replace(batch, teacher=batch.teacher * float("nan"))
    return real(batch, step)


run._step = poison  # type: ignore[method-assign]
try:
    run.run()
except TrainingError as error:
    (OUT / f"poisoned-{RANK}.json").write_text(json.dumps(str(error)))

# The command line last: it ends what the processes share.
data = ["--data", str(PHOTOS), "--max-new-tokens", "8"]
sys.exit(cli.main(["train", "--json", *map(str, TRAIN), *data, "--out", str(OUT / "exits")]))
