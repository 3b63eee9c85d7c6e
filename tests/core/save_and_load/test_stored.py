"""Whatever is damaged in a stored file is said in two lines: never a raw error, never taken.

Each file is damaged in every place that the schema describes, with digests made again, so that it
is the schema alone that can refuse it. In core and in vLLM's plug-in, which read by one schema.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offramp.adapter.adapter import Adapter
from offramp.adapter.certificate import Certificate, PathResult, Run
from offramp.adapter.shipped import load_tiny, tiny_exits
from offramp.core.errors import OfframpError
from offramp.core.save_and_load import ATTEMPTS, CONFIG, read_config
from offramp.core.save_and_load.config import sealed
from offramp.core.storage import digest_file, digest_rows, schema
from offramp.engines import auto
from offramp_vllm.adapter import read_exported
from offramp_vllm.refuse import Refused

PHOTO = Path(__file__).parents[3] / "photo-model" / "offramp_photo" / "exits"
NOT_A_NUMBER: tuple[Any, ...] = (
    float("nan"),
    float("inf"),
    True,
    "0.5",
    [],
    {},
    json.loads("[" * 300 + "]" * 300),
)
NOT_A_SHARE = (*NOT_A_NUMBER, -0.1, 1.5, 2**70, None)
NOT_A_TARGET = (*NOT_A_NUMBER, -1, 0, 5)
NOT_A_COUNT = (*NOT_A_NUMBER, -1, 0.5, 2**70)
NOT_A_TEXT: tuple[Any, ...] = (3, True, [], {})
NOT_A_LIST: tuple[Any, ...] = (3, "x", {}, None, ["\ud800", {}], [float("nan")])
NOT_AN_OBJECT: tuple[Any, ...] = (3, "x", [], [{}])

Place = tuple[Any, ...]
ADAPTER: dict[Place, tuple[Any, ...]] = {
    ("policy", "thresholds", "2"): NOT_A_SHARE,
    ("policy", "thresholds", "02"): (0.5,),
    ("policy", "thresholds", "3"): (0.5,),
    ("policy", "drafts", "2"): NOT_A_SHARE,
    ("policy", "first"): NOT_AN_OBJECT,
    ("policy", "max_draft"): (*NOT_A_COUNT, 0, None),
    ("policy", "lossless"): (0, 1, "x", None),
    ("policy", "score"): (*NOT_A_TEXT, "of tomorrow"),
    ("policy", "of tomorrow"): (1,),
    ("policy",): NOT_AN_OBJECT,
    ("of tomorrow",): (1,),
    ("depths",): (*NOT_A_LIST, [], [2, 2], [4, 2], [0], [-1], [2.0], [True], [2**70], ["2"]),
    ("exit_kind",): (*NOT_A_TEXT, None),
    ("backbone",): NOT_AN_OBJECT,
    ("backbone", "name"): (*NOT_A_TEXT, None),
    ("backbone", "fingerprint"): NOT_AN_OBJECT,
    ("backbone", "fingerprint", "layers"): (*NOT_A_COUNT, None),
    ("backbone", "fingerprint", "weights"): (*NOT_A_LIST, [2**15], [0.5], [[]], [0] * 10**5),
    ("backbone", "fingerprint", "parts", "vision"): (*NOT_A_LIST, [[2**15]], [3]),
    ("calibration",): NOT_AN_OBJECT,
    ("calibration", "target"): NOT_A_TARGET,
    ("calibration", "confidence"): (*NOT_A_NUMBER, -0.1, 95),
    ("calibration", "level"): (*NOT_A_NUMBER, -0.1, 95),
    ("calibration", "measured"): (*NOT_A_NUMBER, 0.9),
    ("calibration", "bound"): (*NOT_A_NUMBER, 0.9),
    ("calibration", "n"): NOT_A_COUNT,
    ("calibration", "answers"): NOT_A_COUNT,
    ("calibration", "attempt"): NOT_A_COUNT,
    ("calibration", "risk"): NOT_A_TEXT,
    ("calibration", "reason"): NOT_A_TEXT,
    ("calibration", "watched"): (*NOT_AN_OBJECT, {}, {"risk": "consistency", "targets": {"": 5}}),
    ("calibration", "kinds"): (3, {}, [3], [{"kind": "", "target": -1}]),
    ("calibration", "conditions"): NOT_AN_OBJECT,
    ("calibration", "conditions", "prompts"): (3, [3], [[]], [[3]]),
    ("calibration", "conditions", "thresholds"): (3, {"2": "x"}, {"2": -1}, {"x": 0.5}),
    ("calibration", "likeness"): NOT_AN_OBJECT,
    ("calibration", "likeness", "Caption:"): NOT_AN_OBJECT,
    ("calibration", "likeness", "Caption:", "n"): (*NOT_A_COUNT, 0, None),
    ("calibration", "likeness", "Caption:", "low"): (*NOT_A_LIST, []),
    ("calibration", "likeness", "Caption:", "looks", "n"): (*NOT_A_COUNT, 0, None),
    ("calibration", "likeness", "Caption:", "looks", "center"): (
        *NOT_A_LIST,
        [],
        [0.0] * 19,
        [0.0] * 20_000,
    ),
    ("calibration", "likeness", "Caption:", "looks", "whitened"): (*NOT_A_LIST, [], [0.0] * 209),
    ("elsewhere",): (3, "x", [], {"llama.cpp": 3}, {"llama.cpp": {"target": 5}}),
    ("metrics",): (*NOT_AN_OBJECT, {"agreement": {"2": 2}}, {"agreement": 3}),
    ("provenance",): (*NOT_AN_OBJECT, None),
    ("files",): (3, "x", [], {}, {"exits.safetensors": "0" * 63}, {"exits.safetensors": None}),
    ("decoding",): (*NOT_AN_OBJECT, {"lossless": 3}, {"prompts": [3]}, {"of tomorrow": 1}),
}
GONE: tuple[Place, ...] = (
    ("backbone",),
    ("depths",),
    ("policy",),
    ("metrics",),
    ("provenance",),
    ("format",),
    ("policy", "thresholds"),
    ("backbone", "name"),
    ("backbone", "fingerprint"),
    ("backbone", "fingerprint", "weights"),
    ("calibration", "likeness", "Caption:", "n"),
    ("calibration", "likeness", "Caption:", "looks", "center"),
)
VLLM: dict[Place, tuple[Any, ...]] = {
    ("format",): (1, 3, "2", None, True),
    ("exits",): (*NOT_A_TEXT, "0" * 64, "x"),
    ("layers",): (*NOT_A_COUNT, 0, 2, None),
    ("copied",): (*NOT_AN_OBJECT, {}, {"2": 99}, {"2": -1}, {"2": "2"}, {"02": 2}),
    ("first_may_exit",): (0, "x", None),
    ("dtype",): (*NOT_A_TEXT, None),
    ("sampled",): (*NOT_AN_OBJECT, {"a": -1}, {"a": 1e9}, {"a": 10**6}, {"a": "3"}),
    ("checked",): (*NOT_A_LIST, [3], [{}]),
    ("checked", 0, "prompt"): (*NOT_A_LIST, [], [-1], [0.5], [2**70], ["3"]),
    ("checked", 0, "tokens"): (*NOT_A_LIST, [], [1, 2]),
    ("checked", 0, "depths"): (*NOT_A_LIST, [], [-1]),
    ("checked", 0, "full"): (*NOT_A_LIST, []),
    ("checked", 0, "image"): (3, [], {}),
}
ATTEMPT: dict[Place, tuple[Any, ...]] = {
    (0, "number"): (*NOT_A_COUNT, 0, None),
    (0, "images"): (*NOT_A_LIST, [3]),
    (0, "members"): (*NOT_A_LIST, [3]),
    (0, "path"): (*NOT_A_LIST, [3], [{"2": -1}], [{"2": 5}], [{"x": 0.5}], [{"02": 0.5}]),
    (0, "asked"): (*NOT_A_TEXT, None),
    (0, "settings"): NOT_AN_OBJECT,
    (0, "outcome"): NOT_AN_OBJECT,
    (0, "looked"): NOT_A_COUNT,
    (0, "of tomorrow"): (1,),
}
RUN: dict[Place, tuple[Any, ...]] = {
    (0, "engine"): (*NOT_A_TEXT, None),
    (0, "prompts"): (*NOT_A_COUNT, None),
    (0, "paths"): (*NOT_A_LIST, [3], [{}]),
    (0, "paths", 0, "tokens"): (*NOT_A_COUNT, None),
    (0, "paths", 0, "tokens_differ"): (*NOT_A_COUNT, None),
    (0, "paths", 0, "promised"): (0, "x", None),
    (0, "paths", 0, "scores_apart"): (*NOT_A_NUMBER, -1),
}
WAY: dict[Place, tuple[Any, ...]] = {
    ("ways",): (*NOT_A_LIST, [], [3], [{}]),
    ("threads",): (*NOT_A_NUMBER, 0),
    ("backbone",): (*NOT_A_TEXT, None),
    ("ways", 0, "answer"): (*NOT_A_NUMBER, -1, 0),
    ("ways", 0, "load"): (*NOT_A_NUMBER, -1),
    ("ways", 0, "engine"): (*NOT_A_TEXT, None),
    ("ways", 0, "conditions"): NOT_AN_OBJECT,
}
TEXTS = (
    b"",
    b"\x00" * 99,
    b"null",
    b"3",
    b'"x"',
    b"[" * 10**5,
    b"\xff\xfe",
    b'{"a": 1e999}',
    b"{}",
)


def damaged(whole: Any, places: dict[Place, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
    """What is done, and the value that has it done in one place."""
    for place, values in places.items():
        for value in values:
            made = copy.deepcopy(whole)
            inside = made
            for name in place[:-1]:
                inside = inside[name]
            inside[place[-1]] = value
            yield f"{place} = {value!r:.60}", made


def without(whole: Any, places: tuple[Place, ...]) -> Iterator[tuple[str, Any]]:
    for place in places:
        made = copy.deepcopy(whole)
        inside = made
        for name in place[:-1]:
            inside = inside[name]
        del inside[place[-1]]
        yield f"no {place}", made


def texts(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Files that are cut off, are none, or are larger than any."""
    for n in range(1, 20):
        yield f"cut at {n} of 20", content[: n * len(content) // 20]
    for text in TEXTS:
        yield repr(text[:20]), text
    yield "huge", content[:-2] + b" " * 2**23 + content[-2:]


def signed(config: dict[str, Any]) -> bytes:
    """adapter.json with a digest, where one can be made of it."""
    with contextlib.suppress(OfframpError):  # NaN, or half a surrogate pair
        config = sealed(config)
    return json.dumps(config).encode()


def assert_refused(what: str, read: Any, *errors: type[Exception]) -> None:
    try:
        read()
    except errors as error:
        lines = str(error).split("\n")
        assert len(lines) == 2 and max(map(len, lines)) < 1000, (what, lines)
    except Exception as error:
        raise AssertionError(f"{what}: {error!r:.200}") from error
    else:
        raise AssertionError(f"{what} was taken")


@pytest.fixture(scope="module")
def backbone() -> Any:
    return load_tiny("opt", device="cpu")[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_exits("opt"), tmp_path / "exits"))


def plain(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    del config["digest"]
    return config


def of_adapter(folder: Path) -> Iterator[tuple[str, bytes]]:
    config = plain(folder)
    config["policy"].setdefault("first", {})
    for what, made in [*damaged(config, ADAPTER), *without(config, GONE)]:
        yield what, signed(made)
    yield from texts((folder / CONFIG).read_bytes())


@pytest.mark.slow
def test_a_damaged_adapter_is_said(folder: Path, backbone: Any) -> None:
    cases = [*of_adapter(folder)]
    assert len(cases) > 300
    for what, content in cases:
        (folder / CONFIG).write_bytes(content)
        assert_refused(what, lambda: Adapter.load(folder, backbone), OfframpError)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from offramp_vllm.exports.vllm import export_vllm

    adapter = Adapter.load(tiny_exits("opt"), load_tiny("opt", device="cpu")[0])
    out = tmp_path_factory.mktemp("vllm") / "exits"
    assert export_vllm(adapter, out, [[5, 6, 7]], max_new_tokens=3) == 1
    return out


@pytest.mark.slow
def test_a_damaged_export_is_said_by_vllms_plug_in(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "exits"))
    assert read_exported(folder).depths == (2,)
    more = json.loads((folder / "vllm.json").read_text())
    of_vllm = [(what, json.dumps(made).encode()) for what, made in damaged(more, VLLM)]
    gone = [
        (what, json.dumps(made).encode())
        for what, made in without(more, tuple((name,) for name in more))
    ]
    cut = [*texts((folder / "vllm.json").read_bytes())]
    unsigned = [
        case for case in of_adapter(folder) if "score" not in case[0] and "exit_kind" not in case[0]
    ]
    for name, cases in ((CONFIG, unsigned), ("vllm.json", [*of_vllm, *gone, *cut])):
        content = (folder / name).read_bytes()
        for what, made in cases:
            (folder / name).write_bytes(made)
            assert_refused(f"{name}: {what}", lambda: read_exported(folder), Refused)
        (folder / name).write_bytes(content)


@pytest.mark.slow
def test_damaged_attempts_are_said(folder: Path, backbone: Any) -> None:
    config, attempts = plain(folder), json.loads((folder / ATTEMPTS).read_text())
    cases = [(what, json.dumps(made).encode()) for what, made in damaged(attempts, ATTEMPT)]
    for what, content in [*cases, *texts((folder / ATTEMPTS).read_bytes())]:
        if what == "huge":
            continue  # white space is no damage, and attempts are many
        (folder / ATTEMPTS).write_bytes(content)
        config["files"][ATTEMPTS] = digest_file(folder / ATTEMPTS)
        (folder / CONFIG).write_bytes(signed(config))
        assert_refused(what, lambda: Adapter.load(folder, backbone), OfframpError)


def test_a_damaged_certificate_is_said(tmp_path: Path) -> None:
    path = PathResult("early exit", "generate", True, 3, 0, 30, 0, 0.1, 0.1)
    run = Run("torch", "", "float32", "cpu", "0" * 64, "b", "c", "", 3, 40, [path], {})
    file = tmp_path / "certificate.json"
    Certificate([run]).write(file)
    assert Certificate.read(file) == Certificate([run])
    runs = [run.to_json()]
    for what, made in damaged(runs, RUN):
        try:
            digest = digest_rows(made)
        except OfframpError:
            digest = ""
        file.write_text(json.dumps({"runs": made, "digest": digest}))
        assert_refused(what, lambda: Certificate.read(file), OfframpError)
    Certificate([run]).write(file)
    for what, content in texts(file.read_bytes()):
        if what != "huge":
            file.write_bytes(content)
            assert_refused(what, lambda: Certificate.read(file), OfframpError)


def test_a_damaged_choice_of_auto_is_measured_again(tmp_path: Path) -> None:
    file, way = tmp_path / "auto.json", auto.Timed("torch", "torch", 1.0, 0.5, {"engine": "torch"})
    found = auto.Found("tiny", 1, [way])
    auto._keep(file, found)
    assert auto._read(file) == found
    content = file.read_bytes()
    cases = [(w, json.dumps(m).encode()) for w, m in damaged(json.loads(content), WAY)]
    for what, made in [*cases, *texts(content)]:
        file.write_bytes(made)
        assert auto._read(file) is None, what


@pytest.mark.parametrize("exits", [tiny_exits("opt"), PHOTO], ids=["tiny-opt", "photo"])
def test_what_ships_is_read(exits: Path) -> None:
    assert read_config(exits).depths
    schema.decoded((exits / ATTEMPTS).read_bytes(), schema.Attempts)


def test_a_short_file_takes_no_gigabytes(folder: Path) -> None:
    config = plain(folder)
    config["calibration"]["likeness"]["Caption:"]["looks"]["center"] = [0] * 22_000
    (folder / CONFIG).write_bytes(signed(config))
    tracemalloc.start()
    try:
        assert_refused("a long look", lambda: read_config(folder), OfframpError)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_the_schema_is_one_file_and_imports_nothing_of_offramp() -> None:
    import offramp_vllm.schema as of_vllm

    assert Path(of_vllm.__file__).resolve() == Path(schema.__file__).resolve()
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1]);"
        "assert not any(m.split('.')[0] in ('offramp', 'torch', 'numpy') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, schema.__file__], check=True)
