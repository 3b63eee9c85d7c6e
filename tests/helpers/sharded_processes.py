"""One of two processes that split a model; `models/test_sharded_models.py` starts it.

It trains, decodes and saves what came of that; the test compares it to one process's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import torch
from sharded_runs import DEPTHS, POLICIES, TRAINED, UNLABELLED, decoded
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_runs import trainer
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

from offramp.adapter import answers
from offramp.adapter.adapter import Adapter
from offramp.core.engine.generate import generate
from offramp.core.errors import OfframpError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.models.fingerprint import fingerprint
from offramp.features.compiled.compiled import COMPILED
from offramp.training import feature_store
from offramp.training import trainer as module

torch.set_num_threads(1)
OUT, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
distributed.init_process_group("gloo")


def tensor_parallel() -> Any:
    how = DistributedConfig(tp_plan="auto")
    return AutoModelForImageTextToText.from_pretrained(OUT / "model", distributed_config=how)


def layers_alone() -> Any:
    model = families.build("llava")
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    return model


def fsdp2() -> Any:
    return fully_shard(layers_alone(), mesh=init_device_mesh("cpu", (2,)))


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("one process writes")


def save(name: str, value: Any) -> None:
    torch.save(value, OUT / f"{name}-{RANK}.pt")


def train(backbone: Backbone, name: str, config: Any, *, resume: bool = False) -> Adapter:
    made = trainer(backbone, OUT / name, config, 13, "llava").run(resume)
    save(name, made.exits.modules.state_dict())
    return made


def stop(backbone: Backbone, name: str) -> None:
    """Train two steps of a run."""
    halted = trainer(backbone, OUT / name, TRAINED, 13, "llava")
    first_half = halted._step

    def stops(batch: Any, step: int) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return first_half(batch, step)

    halted._step = stops  # type: ignore[method-assign]
    with suppress(KeyboardInterrupt):
        halted.run()


def refusal(make: Callable[[], Any]) -> str:
    try:
        make()
    except OfframpError as error:
        return str(error)
    return ""


def decode(name: str, model: Any) -> Backbone:
    """Decode on a model as it was loaded, and on an adapter that one process trained."""
    backbone = Backbone(model)
    exits = Exits(backbone, DEPTHS)
    inputs = families.KINDS["llava"].inputs(1)
    own = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    found = [decoded(backbone, exits, policy) for policy in POLICIES]
    loaded = Adapter.load(OUT / "one", backbone)
    save(
        name,
        {
            "full": generate(backbone, inputs, max_new_tokens=6, do_sample=False).sequences,
            "own": own,
            "exits": exits.state_dict(),
            "kinds": sorted({type(p).__name__ for p in exits.parameters()}),
            "decoded": found,
            "fingerprint": json.dumps(fingerprint(backbone)),
            "loaded": loaded.exits.modules.state_dict(),
            "held": sum(p.to_local().numel() for p in backbone.layers.parameters() if _split(p)),
        },
    )
    return backbone


def _split(parameter: Any) -> bool:
    return hasattr(parameter, "to_local")


if RANK:
    module.save_state = forbidden
    module.JsonlLog = forbidden  # type: ignore[assignment, misc]
    module.Adapter.save = forbidden  # type: ignore[method-assign]

alone = decode("layers-alone", layers_alone())
fsdp = decode("fsdp2", fsdp2())
tensor = decode("tensor-parallel", tensor_parallel())

# Data parallel: what two processes with whole models do, those with parts do.
for name, config in (("labelled", TRAINED), ("unlabelled", UNLABELLED)):
    train(Backbone(families.build("llava")), f"whole-{name}", config)
    train(fsdp, f"fsdp2-{name}", config)
train(fsdp, "fsdp2-streams", replace(UNLABELLED, cache="stream"))
train(fsdp, "fsdp2-goes-on", TRAINED, resume=True)
stop(alone, "fsdp2-stopped")

# Tensor parallel: one process's batches, written by one.
if RANK:
    answers.JsonlLog = forbidden  # type: ignore[assignment, misc]
    feature_store._save = forbidden
train(tensor, "tensor-labelled", replace(TRAINED, cache="disk"))
train(tensor, "tensor-unlabelled", replace(UNLABELLED, cache="disk"))
train(tensor, "tensor-goes-on", TRAINED, resume=True)
stop(tensor, "tensor-stopped")


whole = fully_shard(families.build("llava"), mesh=init_device_mesh("cpu", (2,)))
told = {
    "no units": refusal(lambda: Backbone(whole)),
    "compiled": refusal(lambda: tensor.with_decoding(instead=COMPILED)),
}
(OUT / f"refused-{RANK}.json").write_text(json.dumps(told))

# The page's program, which ends what the processes share.
os.chdir(OUT)
sys.argv[1:] = ["MODEL", "photos"]
exec(compile((OUT / "split.py").read_text(), "split.py", "exec"))
