"""A model that two processes split decodes and trains as one that a single process holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from PIL import Image
from sharded_runs import DEPTHS, POLICIES, TRAINED, UNLABELLED, decoded
from smolvlm import save_smolvlm
from training_runs import rows, steps, trainer

from offramp.adapter.adapter import Adapter
from offramp.core.engine.generate import generate
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.models.fingerprint import fingerprint

pytestmark = pytest.mark.slow

HELPERS = Path(__file__).parents[2] / "helpers"
PAGE = (HELPERS.parents[1] / "docs" / "sharded-models.md").read_text(encoding="utf-8")
HOW = ("layers-alone", "fsdp2", "tensor-parallel")


@pytest.fixture(scope="module")
def whole() -> Backbone:
    return Backbone(families.build("llava"))


def run(whole: Backbone, out: Path, config: Any = TRAINED, *, resume: bool = False) -> Adapter:
    return trainer(whole, out, config, 13, "llava").run(resume)


@pytest.fixture(scope="module")
def out(whole: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind; before them, one trained half a run for them to go on."""
    folder = tmp_path_factory.mktemp("split")
    whole.model.save_pretrained(folder / "model")
    run(whole, folder / "one")
    for name in ("tensor-goes-on", "fsdp2-goes-on"):
        stop(whole, folder / name)
    write_page(folder)
    paths = os.pathsep.join([str(HELPERS), *sys.path])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
            *(str(HELPERS / "sharded_processes.py"), str(folder)),
        ],
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout)
    return folder


def write_page(folder: Path) -> None:
    """The page's programs as one, `split.py`, and a tiny model and photographs for it."""
    save_smolvlm(folder / "MODEL")
    (folder / "photos").mkdir()
    for number in range(6):
        Image.new("RGB", (32, 32), (30 * number, 0, 0)).save(folder / f"photos/{number}.jpg")
    program, by_hand = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    program, end = program.replace("steps=2000", "steps=2").rsplit("distributed.", 1)
    by_hand = by_hand.replace("language_model", "text_model")  # where this family has its layers
    loaded = "from transformers import AutoModelForImageTextToText\n"
    loaded += "model = AutoModelForImageTextToText.from_pretrained(name)\n"
    (folder / "split.py").write_text(f"{program}{loaded}{by_hand}distributed.{end}")


def stop(whole: Backbone, folder: Path) -> None:
    """Train two steps of a run."""
    halted = trainer(whole, folder, TRAINED, 13, "llava")
    first_half = halted._step

    def stops(batch: Any, step: int) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return first_half(batch, step)

    halted._step = stops  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        halted.run()


def both(out: Path, name: str) -> list[Any]:
    return [torch.load(out / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", HOW)
def test_tokens_and_depths_are_the_unsplit_models_in_each_process(
    out: Path, how: str, whole: Backbone
) -> None:
    exits, inputs = Exits(whole, DEPTHS), families.KINDS["llava"].inputs(1)
    full = generate(whole, inputs, max_new_tokens=6, do_sample=False).sequences
    wanted = [decoded(whole, exits, policy) for policy in POLICIES]
    assert len(set(wanted[0]["depths"].flatten().tolist())) > 1  # they differ from token to token
    for found in both(out, how):
        assert torch.equal(found["full"], full) and torch.equal(found["own"], full)
        for made, want in zip(found["decoded"], wanted, strict=True):
            assert torch.equal(made["tokens"], want["tokens"])
            assert torch.equal(made["depths"], want["depths"])


@pytest.mark.parametrize("how", HOW)
def test_exits_are_whole_copies_and_layers_stay_split(out: Path, how: str, whole: Backbone) -> None:
    wanted = Exits(whole, DEPTHS).state_dict()
    weights = sum(p.numel() for p in whole.layers.parameters())
    for found in both(out, how):
        assert list(found["exits"]) == list(wanted) and found["kinds"] == ["Parameter"]
        assert all(torch.equal(found["exits"][name], t) for name, t in wanted.items())
        assert found["held"] <= 0.51 * weights


@pytest.mark.parametrize("how", HOW)
def test_an_adapter_of_the_unsplit_model_loads(out: Path, how: str, whole: Backbone) -> None:
    wanted = Adapter.load(out / "one", whole).exits.modules.state_dict()
    for found in both(out, how):
        assert json.loads(found["fingerprint"]) == json.loads(json.dumps(fingerprint(whole)))
        assert all(torch.equal(found["loaded"][name], t) for name, t in wanted.items())


def test_with_fsdp2_each_process_learns_from_its_own_batches(out: Path, whole: Backbone) -> None:
    for name in ("labelled", "unlabelled"):
        wanted, _ = both(out, f"whole-{name}")
        for found in both(out, f"fsdp2-{name}"):
            close(found, wanted)
    Adapter.load(out / "fsdp2-labelled", whole)
    for rank, streamed in enumerate(both(out, "fsdp2-streams")):
        close(streamed, both(out, "fsdp2-unlabelled")[rank])


def test_with_tensor_parallel_both_learn_from_one_process_batches(
    out: Path, whole: Backbone, tmp_path: Path
) -> None:
    for name, config in (("labelled", TRAINED), ("unlabelled", UNLABELLED)):
        wanted = run(whole, tmp_path / name, config).exits.modules.state_dict()
        first, second = both(out, f"tensor-{name}")
        assert all(map(torch.equal, first.values(), second.values()))
        close(first, wanted)
        written = {file.name for file in (out / f"tensor-{name}").rglob("answers-*")}
        assert written == {"answers-0.jsonl"}


def test_a_run_goes_on_in_two_processes_and_in_one(out: Path, whole: Backbone) -> None:
    wanted = Adapter.load(out / "one", whole).exits.modules.state_dict()
    for how in ("tensor", "fsdp2"):
        halves = {"two": out / f"{how}-goes-on", "one": out / f"{how}-stopped"}
        assert [row["step"] for row in steps(halves["one"])] == [0, 1]
        back = run(whole, halves["one"], resume=True).exits.modules.state_dict()
        for folder in halves.values():
            assert [row["step"] for row in steps(folder)] == list(range(TRAINED.steps))
            assert rows(folder)[-1]["step"] == TRAINED.steps
        if how == "tensor":  # whose batches are one process's
            close(back, wanted)
            close(both(out, "tensor-goes-on")[0], wanted)


def test_what_cannot_be_is_refused_in_two_lines(out: Path) -> None:
    for rank in range(2):
        told = json.loads((out / f"refused-{rank}.json").read_text())
        assert "fully_shard(layer)" in told["no units"].splitlines()[1]
        assert "split between processes" in told["compiled"]
        assert all(len(text.splitlines()) == 2 for text in told.values())


def test_the_pages_program_trains_and_answers(out: Path) -> None:
    assert len((out / "said").read_text().split()) > 3  # one process's answer
    assert (out / "exits" / "adapter.json").is_file()
    assert "torchrun --nproc_per_node 8 split.py MODEL photos" in PAGE
