"""Two processes that train together do what one does, and only one of them writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from training_runs import SHARED, same, steps, trainer

from offramp.adapter.adapter import Adapter
from offramp.core.models.backbone import Backbone
from offramp.core.save_and_load import CONFIG
from offramp.data.scenes import world
from offramp.training.feature_store import FeatureStore
from offramp.training.labels import answers_of
from offramp.training.optimization import set_learning_rate

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def launched(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """What two processes left behind that accelerate started with `helpers/two_processes.py`."""
    out, photos = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("scenes")
    for n in range(24):  # of which each process validates one
        world.render(world.scene("train", n)).save(photos / f"{n}.png")
    script = Path(__file__).parents[1] / "helpers" / "two_processes.py"
    # `--multi_gpu` means several processes; on a CPU they talk through gloo.
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(free_port())]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, script, out, photos],
        check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture
def two_processes(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """The folder of `launched`."""
    return launched[0]


def test_under_accelerate_launch_the_command_line_trains_one_adapter(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = launched
    assert json.loads(done.stdout)["adapter"] == str(out / "exits")
    assert (out / "exits" / CONFIG).is_file()


def test_two_processes_end_with_the_same_exits(two_processes: Path) -> None:
    for name in ("supervised", "pseudo"):
        first, second = (
            torch.load(two_processes / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)
        )
        assert same(first["exits"], second["exits"])
        assert same(first["discriminators"], second["discriminators"])
        assert same(first["checks"], second["checks"]) and bool(first["checks"]) == (
            name == "pseudo"
        )
        assert first["progress"] == second["progress"]


def test_two_processes_do_what_one_does_with_the_mean_of_their_gradients(
    two_processes: Path, opt: Any, tmp_path: Path
) -> None:
    run = trainer(opt, tmp_path, SHARED, n=13)
    train_part = {row.example.key for group in run.states.record()[0]._groups for row in group}
    train_examples = [e for e in run.examples if e.key in train_part]
    stores = []
    for rank in range(2):
        found = answers_of(run.states.encoder, train_examples, SHARED, share=slice(rank, None, 2))
        fewest = len(train_examples) // 2
        stores.append(
            FeatureStore(run.states.encoder, found[:fewest], (2, 4), batch_size=4, cache="stream")
        )
    theirs = torch.load(two_processes / "supervised-0.pt", weights_only=True)
    for step in range(SHARED.steps):
        set_learning_rate(run.generator_steps, SHARED, step)
        batches = [store[run._order(step, len(store))] for store in stores]
        losses = [
            run.objective.generator_loss(run.objective.loss_inputs(batch))[0] for batch in batches
        ]
        run.generator_steps.zero_grad()
        (sum(losses) / 2).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(run.exits.parameters(), 1.0)
        run.generator_steps.step()
    for name, tensor in run.exits.state_dict().items():
        if name.endswith("k_proj.bias"):
            continue  # shifts every score alike: its gradient is rounding, which Adam scales up
        torch.testing.assert_close(theirs["exits"][name], tensor, rtol=1e-4, atol=1e-5)


def test_of_two_processes_one_writes_once(two_processes: Path) -> None:
    # The second process of the script fails if it saves, logs or checkpoints.
    for name in ("supervised", "pseudo"):
        found = [row["step"] for row in steps(two_processes / name)]
        assert found == list(range(len(found))) and found
        Adapter.load(two_processes / name, Backbone(families.build("blip2-opt")))


def test_a_loss_that_is_not_finite_in_one_process_stops_both(two_processes: Path) -> None:
    for rank in range(2):
        told = json.loads((two_processes / f"poisoned-{rank}.json").read_text())
        assert "nan at step 1" in told


def test_processes_without_a_shared_disk_go_on_from_the_same_step(two_processes: Path) -> None:
    made = {f.name for f in (two_processes / "apart-1").rglob("*") if f.is_file()}
    assert made == {"answers-1.jsonl"}  # the second has no checkpoint of its own
    whole, *apart = (
        torch.load(two_processes / f"{name}.pt", weights_only=True)
        for name in ("supervised-0", "apart-0-0", "apart-1-1")
    )
    for state in apart:
        assert same(state["exits"], whole["exits"])
        assert state["progress"] == whole["progress"]


def test_a_checkpoint_that_is_damaged_stops_all_processes(two_processes: Path) -> None:
    told = [json.loads((two_processes / f"damaged-{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1] and "is damaged" in told[0]
