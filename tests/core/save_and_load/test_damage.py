"""A damaged file of an adapter or a checkpoint loads equal, or is refused in two lines.

2,000 seeded mutations of every file, and 600 of adapter.json and the tensors whose digests were
made again, as somebody could who wants to do harm: those load or are refused in two lines.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp.adapter.adapter import Adapter
from offramp.adapter.records import CARD
from offramp.calibration.attempts import Attempt
from offramp.common.jsonl_log import JsonlLog
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import AdapterError, DataError, OfframpError, TrainingError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.save_and_load import ATTEMPTS, CHECKS, CONFIG, EXITS, SEEN
from offramp.core.save_and_load.config import sealed
from offramp.core.storage import digest_file
from offramp.training.checkpoint import (
    DIGEST,
    HISTORY,
    STATE,
    Progress,
    load_state,
    restored,
    save_state,
    trim_history,
)

Bytes = Callable[[bytes, random.Random], bytes]
MADE_OF = {"steps": 4, "examples": "abc"}


@pytest.fixture(scope="module")
def opt() -> Backbone:
    return Backbone(families.build("blip2-opt"))


@pytest.fixture(scope="module")
def whole(opt: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with every file that one can have, and the checkpoint of its training."""
    folder = tmp_path_factory.mktemp("whole") / "exits"
    depths = (2,)
    found = {"shortlist": {"size": 4, "miss_rate": 0.01}}
    exits, ids = Exits(opt, depths), torch.tensor([9, 12, 20, 33])
    Adapter(
        opt,
        ExitSet(exits, ids, found),
        ExitPolicy({2: 0.5}, shortlist=True, drafts={2: 0.125}),
        provenance={"seed": 7, "command": "offramp train"},
        metrics={"agreement": {"2": 0.75}, "step": 10},
        calibration={"risk": "disagreement", "target": 0.01, "measured": None},
        seen={"train": ["aa", "bb"], "calibration": ["cc"]},
        attempts=[Attempt("1%", {"target": 0.01}, 1, ("aa:bb",), (), {"n": 4}).to_json()],
    ).save(folder)
    state = {"progress": vars(Progress(4, 4, 0.5, 2, 1)), "exits": exits.state_dict()}
    save_state(folder, MADE_OF, state)
    with JsonlLog(folder / HISTORY) as history:
        for step in range(4):
            history.append({"step": step, "loss": 0.5})
        history.append({"step": 4, "agreement": {"2": 0.75}})
    return folder


# -- mutations ----------------------------------------------------------------------------------


def flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def overwrite(content: bytes, draw: random.Random) -> bytes:
    place, n = draw.randrange(len(content)), draw.choice((1, 4, 64))
    return content[:place] + draw.randbytes(n) + content[place + n :]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def remove(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + content[place + draw.choice((1, 8, 512)) :]


def repeat(content: bytes, draw: random.Random) -> bytes:
    place, n = draw.randrange(len(content)), draw.choice((1, 8, 512))
    return content[: place + n] + content[place:]


def zero(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes(min(4096, len(content) - place)) + content[place + 4096 :]


def early(content: bytes, draw: random.Random) -> bytes:
    """A flip near the start, where headers are."""
    head = min(len(content), 400)
    return flip(content[:head], draw) + content[head:]


MUTATIONS: tuple[Bytes, ...] = (flip, flip, early, overwrite, cut, remove, repeat, zero)
FILES = {
    CONFIG: 700,
    EXITS: 350,
    CHECKS: 250,
    SEEN: 200,
    ATTEMPTS: 200,
    CARD: 50,
    STATE: 150,
    DIGEST: 100,
}
"""Mutations of each file: 2,000."""
REFUSED = (AdapterError, TrainingError, DataError)


def adapter_parts(folder: Path, backbone: Backbone) -> list[Any]:
    """All that loading the adapter reads, comparable."""
    loaded = Adapter.load(folder, backbone)
    exits = loaded.exits
    assert exits.shortlist is not None
    tensors = [exits.modules.state_dict(), {"shortlist": exits.shortlist}]
    plain = [loaded.policy, loaded.metrics, loaded.provenance, loaded.calibration, loaded.seen]
    return [*map(numbers, tensors), *plain, exits.measured, loaded.attempts]


def state_parts(folder: Path, _: Backbone) -> list[Any]:
    """All that going on with the training reads, comparable."""
    state = load_state(folder, MADE_OF, torch.device("cpu"))
    assert state is not None
    return [numbers(state["exits"]), state["progress"]]


def numbers(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def assert_two_lines(error: OfframpError) -> None:
    lines = str(error).split("\n")
    assert len(lines) == 2 and max(map(len, lines)) <= 2000


@pytest.mark.slow
def test_two_thousand_mutations_load_equal_or_are_refused(
    whole: Path, opt: Backbone, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "exits"))
    refused = 0
    for name, times in FILES.items():
        parts = state_parts if name in (STATE, DIGEST) else adapter_parts
        expected = parts(folder, opt)
        draw, content = random.Random(name), (folder / name).read_bytes()
        for number in range(times):
            mutation = draw.choice(MUTATIONS)
            (folder / name).write_bytes(mutation(content, draw))
            try:
                assert parts(folder, opt) == expected, f"{name}, {number}: {mutation.__name__}"
            except REFUSED as error:
                assert_two_lines(error)
                refused += 1
        (folder / name).write_bytes(content)
        assert parts(folder, opt) == expected
    assert sum(FILES.values()) == 2000 and refused > 1500


# -- somebody who wants to do harm ----------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**70,
    1e308,
    -0.5,
    2.5,
    "",
    "x",
    "\ud800",
    "9" * 5000,
    [],
    {},
    [[]],
    ["x"],
    [2**70],
    {"x": 1},
    {"2": None},
    {"2": -1.0},
    {"2": 2},
    {"\u0661": 0.5},
    {"99999999999": 1},
    {"hidden": 10**9},
    {"conditional": 3},
    json.loads("[" * 400 + "]" * 400),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else []
    return [path, *(p for key, inner in inside for p in places(inner, (*path, key)))]


def crafted(config: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A copy with one to three entries replaced, removed or added."""
    config = json.loads(json.dumps(config))
    for _ in range(draw.randint(1, 3)):
        *path, last = draw.choice([p for p in places(config) if p])
        inner = config
        for key in path:
            inner = inner[key]
        match draw.choice(("replace", "replace", "remove", "add")):
            case "replace":
                inner[last] = draw.choice(VALUES)
            case "remove":
                del inner[last]
            case _:
                inner[draw.choice(("hidden", "layers", "", "x" * 300))] = draw.choice(VALUES)
    return config


@pytest.mark.slow
def test_a_config_crafted_to_harm_loads_or_is_refused(
    whole: Path, opt: Backbone, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "exits"))
    config = json.loads((folder / CONFIG).read_text())
    del config["digest"]
    draw, refused = random.Random(1), 0
    for _ in range(400):
        changed = crafted(config, draw)
        with contextlib.suppress(OfframpError):  # what has no digest comes without
            changed = sealed(changed)
        (folder / CONFIG).write_text(json.dumps(changed))
        try:
            Adapter.load(folder, opt)
        except AdapterError as error:
            assert_two_lines(error)
            refused += 1
    assert 200 < refused < 400


@pytest.mark.parametrize(
    "change",
    [
        {"measured": 5.0},
        {"measured": 0.0076},
        {"bound": 0.3},
        {"confidence": 1.5},
        {"confidence": -0.1},
        {"target": 2},
        {"level": 90},
        {"n": -1},
        {"attempt": -3},
    ],
)
def test_a_guarantee_that_contradicts_itself_is_refused(
    change: dict[str, Any], whole: Path, opt: Backbone, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "exits"))
    data = json.loads((folder / "adapter.json").read_text())
    claim = {
        "risk": "disagreement",
        "target": 0.0075,
        "confidence": 0.95,
        "measured": 0.002,
        "bound": 0.007,
        "n": 1000,
        "level": 0.96,
        "reason": "",
    }

    def loaded(**more: Any) -> Adapter:
        config = {**data, "calibration": {**claim, **more}}
        del config["digest"]
        (folder / "adapter.json").write_text(json.dumps(config))
        return Adapter.from_pretrained(opt, folder)

    assert loaded().calibration == claim
    # One that guarantees nothing, and says why, may tell what it measured.
    assert loaded(measured=0.02, bound=0.03, reason="Too few images.").calibration
    with pytest.raises(AdapterError) as error:
        loaded(**change)
    assert_two_lines(error.value)


ATTEMPT: dict[str, Any] = {
    "asked": "a",
    "settings": {},
    "number": 1,
    "images": ["b:c"],
    "path": [{"2": 0.5}],
    "outcome": {},
    "members": ["b"],
}


@pytest.mark.parametrize(
    "change",
    [
        {"number": 0},
        {"number": -2},
        {"number": True},
        {"images": [1]},
        {"images": [None]},
        {"members": [{}]},
        {"path": [3]},
        {"path": [{"x": 0.5}]},
        {"path": [{"2": "0.5"}]},
        {"path": [{"2": None}]},
        {"path": [[]]},
        {"path": [{"2": -1}]},
        {"number": 1.0},
    ],
)
def test_attempts_of_odd_kinds_are_refused(
    change: dict[str, Any], whole: Path, opt: Backbone, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "exits"))
    data = json.loads((folder / "adapter.json").read_text())
    del data["digest"]

    def loaded(attempt: dict[str, Any]) -> Adapter:
        (folder / ATTEMPTS).write_text(json.dumps([attempt]))
        data["files"][ATTEMPTS] = digest_file(folder / ATTEMPTS)
        (folder / "adapter.json").write_text(json.dumps(data))
        return Adapter.from_pretrained(opt, folder)

    assert [*loaded(ATTEMPT).attempts] == [ATTEMPT]
    with pytest.raises(AdapterError, match="attempts"):
        loaded({**ATTEMPT, **change})


def odd_tensors(tensors: dict[str, torch.Tensor], draw: random.Random) -> None:
    """Change one of the tensors."""
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    match draw.choice(("nan", "inf", "int8", "shape", "empty", "remove", "add", "double", "huge")):
        case "nan" | "inf" as what if tensor.is_floating_point():
            tensor.view(-1)[draw.randrange(tensor.numel())] = float(what)
        case "int8":
            tensors[name] = tensor.to(torch.int8)
        case "shape":
            tensors[name] = tensor[None].contiguous()
        case "empty":
            tensors[name] = tensor.new_zeros(0)
        case "remove":
            del tensors[name]
        case "add":
            tensors[draw.choice(("gates.2.x", "gates", "3.x", "shortlist.1"))] = torch.ones(2)
        case "double":
            tensors[name] = tensor.double()
        case _:
            tensors[name] = tensor.new_full(tensor.shape, 10**9).double() * 1e300


@pytest.mark.slow
def test_tensors_crafted_to_harm_are_refused_unless_they_only_are_more_precise(
    whole: Path, opt: Backbone, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "exits"))
    config = json.loads((folder / CONFIG).read_text())
    del config["digest"]
    draw, refused = random.Random(2), 0
    expected = adapter_parts(folder, opt)
    for name in (EXITS, CHECKS):
        content = (folder / name).read_bytes()
        for _ in range(60):
            tensors = load_file(whole / name)
            odd_tensors(tensors, draw)
            save_file(tensors, folder / name)
            files = {**config["files"], name: digest_file(folder / name)}
            (folder / CONFIG).write_text(json.dumps(sealed({**config, "files": files})))
            try:
                now = adapter_parts(folder, opt)
                assert now[0] == expected[0] and len(now) == len(expected)
            except AdapterError as error:
                assert_two_lines(error)
                refused += 1
        (folder / name).write_bytes(content)
    assert refused > 60


@pytest.mark.parametrize("name", [EXITS, SEEN, ATTEMPTS])
def test_a_hole_of_terabytes_is_refused_without_being_read(
    name: str, whole: Path, tmp_path: Path, opt: Backbone
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "exits"))
    with open(folder / name, "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder, opt)
    assert len(str(caught.value).splitlines()) == 2 and name in str(caught.value)


def test_a_crash_between_two_renames_is_noticed(whole: Path, opt: Backbone, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "exits"))
    exits = Exits(opt, (2,))
    with torch.no_grad():
        next(exits.parameters()).add_(1.0)
    Adapter(opt, exits).save(tmp_path / "newer")
    shutil.copy(tmp_path / "newer" / EXITS, folder / EXITS)
    with pytest.raises(AdapterError, match="a save was interrupted"):
        Adapter.load(folder, opt)


# -- checkpoints ----------------------------------------------------------------------------------


def test_a_crash_between_the_digest_and_the_checkpoint_leaves_the_one_before(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "exits"))
    from offramp.training import checkpoint

    write, names = checkpoint.write_atomic, []

    def crash(path: Path, data: Any) -> None:
        names.append(path.name)
        if len(names) == 2:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomic", crash)
    with pytest.raises(KeyboardInterrupt):
        save_state(folder, MADE_OF, {"progress": {}})
    state = load_state(folder, MADE_OF, torch.device("cpu"))
    assert state is not None and state["progress"]["step"] == 4


@pytest.mark.parametrize("error", [KeyError("exits"), RuntimeError("size mismatch\nfor x")])
def test_a_checkpoint_whose_entries_do_not_fit_is_refused(error: Exception, whole: Path) -> None:
    with pytest.raises(TrainingError) as caught, restored(whole):
        raise error
    assert_two_lines(caught.value)


def test_a_damaged_training_log_is_refused_or_read(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "exits"))
    content, draw = (folder / HISTORY).read_bytes(), random.Random(3)
    for _ in range(200):
        (folder / HISTORY).write_bytes(draw.choice(MUTATIONS)(content, draw))
        try:
            trim_history(folder, Progress(4, 4))
        except DataError as error:
            assert_two_lines(error)


# -- wrong backbones ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("vision_model", "vision tower"),
        ("qformer", "Q-Former"),
        ("language_projection", "Q-Former"),
        ("language_model.model.decoder.embed_tokens", "embeddings"),
        ("language_model.lm_head", "LM head"),
    ],
)
def test_a_backbone_with_another_part_is_refused(
    part: str, words: str, whole: Path, opt: Backbone
) -> None:
    model = families.build("blip2-opt")
    model.language_model.lm_head.weight = torch.nn.Parameter(
        model.language_model.lm_head.weight.clone()
    )
    with torch.no_grad():
        for parameter in model.get_submodule(part).parameters():
            parameter.normal_(0.0, 0.2)
    with pytest.raises(AdapterError, match=f"{words}.* differ"):
        Adapter.load(whole, Backbone(model))


def test_another_precision_is_the_same_backbone(whole: Path) -> None:
    Adapter.load(whole, Backbone(families.build("blip2-opt", torch.bfloat16)))


def test_an_adapter_from_before_the_digests_loads(
    whole: Path, opt: Backbone, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "exits"))
    config = json.loads((folder / CONFIG).read_text())
    for name in ("digest", "files"):
        del config[name]
    del config["backbone"]["fingerprint"]["parts"]
    (folder / CONFIG).write_text(json.dumps(config))
    assert adapter_parts(folder, opt) == adapter_parts(whole, opt)
