"""`engine="auto"`: the fastest way to decode a model on this machine that keeps its answers.

A way is an engine with what runs the vision tower. Each is loaded as it would be to answer, writes
the answers of a few pictures, and is let go. Only ways count whose answers are PyTorch's own, token
by token, or whose vision tower rounds under a guarantee that was calibrated so; and, where the
adapter's guarantee holds in some way, under whose conditions it does. What was found is kept with
its figures in the cache folder, by the exits, the backbone, versions, the machine and the number of
threads; the least CPU seconds then decide, of loading and of the answers that are asked for. What
else the machine does meanwhile changes CPU seconds little.

Nothing is measured where that cannot pay: for a model that is tiny (PyTorch's own time is Python's)
or large (its weights would be written and loaded several times), on a GPU, for quantised weights,
and for few answers at a time.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from offramp.adapter.records import calibrations
from offramp.adapter.shipped import example_picture
from offramp.common.folders import cache_folder
from offramp.common.progress import progress_bar
from offramp.common.provenance import processor, version_of
from offramp.core.errors import InputError, OfframpError, StorageError
from offramp.core.save_and_load import AdapterConfig, exits_digest
from offramp.core.storage import digest_rows, read_json, schema, write_json
from offramp.core.storage.places import ROOM, reason
from offramp.core.storage.schema import Amount, Ordinal
from offramp.engines import AUTO, LLAMA_CPP, TORCH, engine_named
from offramp.features.towers import tower_engine
from offramp.features.vision_engine import ROUNDED
from offramp.inputs.example import Example
from offramp.promises.conditions import Conditions, differences, of_backbone

log = logging.getLogger(__name__)

FOUND = "engines"
"""The cache folder of what was measured."""
COMPILED = "compiled"
FEW, MANY = 50, 1000
"""Answers: for fewer nothing is measured; what is expected where nobody says how many."""
SMALLEST, LARGEST = 2 * 10**7, 2 * 10**9
"""Parameters of a decoder of which it is measured."""
FORMAT = "f16"
"""Of the files for llama.cpp: numbers that are hardly rounded."""
ROUNDS = 2
PROMPT = "What is shown?"
"""Where no kind of prompt was calibrated."""


class Way(NamedTuple):
    """A way to answer: the decoder's engine, the vision tower's engine, and a folder of files."""

    engine: str
    vision: str = TORCH
    gguf: str | Path | None = None


Opens = Callable[[Way], Any]
"""Opens the model by a way, for answers as for timing."""


@dataclass(frozen=True)
class Timed:
    """A measured way to answer.

    load, answer: CPU seconds of the process. conditions: of the backbone, as of
    `offramp.promises.conditions.of_backbone`. why: what rules the way out; "" for nothing.
    """

    engine: str
    vision: str
    load: Amount = 0.0
    answer: Amount = 0.0
    conditions: Mapping[str, Any] | None = None
    why: str = ""

    @property
    def words(self) -> str:
        tower = "" if self.vision == TORCH else f", vision tower in {self.vision}"
        return f"{self.engine}{f' in {FORMAT}' if self.engine == LLAMA_CPP else ''}{tower}"


@dataclass(frozen=True)
class Found:
    """The measured ways of one model. backbone: its name. threads: of the decoder. ways: PyTorch's
    first."""

    backbone: str
    threads: Ordinal
    ways: list[Timed]


def settled(
    opened: Opens,
    config: AdapterConfig | None,
    asked: Way,
    *,
    threads: int,
    answers: int | None = None,
    together: bool = False,
    **how: Any,
) -> Way:
    """Return the way to answer: as asked, with the fastest for each part that is left to "auto".

    opened: opens the model by a way, with so many threads of the decoder. config: of its exits;
    None: it has none. answers: expected number; None: many. together: whether several are written
    at a time, which compiled code does not do. how: options of the backbone.
    """
    engine, vision, gguf = asked
    tower = TORCH if vision == AUTO else vision
    if engine != AUTO or gguf is not None:
        return Way(LLAMA_CPP if engine == AUTO else engine, tower, gguf)
    few = answers is not None and answers < FEW
    try:
        cache = cache_folder(FOUND)
    except RuntimeError:  # there is no home, so it would be measured each time
        return Way(TORCH, tower)
    if config is None or not _may_pay(config, how):
        return Way(TORCH, tower)
    model, towers = _digest(config, how), [vision, *_rounding(config, vision)]
    file = cache / f"{digest_rows([model, _here(), threads, towers, together])[:32]}.json"
    found = _read(file)
    if found is None and few:
        return Way(TORCH, tower)
    if found is None:
        ways = [*_measured(opened, config, model, vision, together)]
        found = Found(str(how.get("backbone", config.backbone)), threads, ways)
        _keep(file, found)
    best, plain = fastest(found.ways, calibrations(config), answers), found.ways[0]
    if best is not plain:
        log.info(
            "engine: %s, %.0f CPU ms an answer, in PyTorch %.0f (--engine NAME for another)",
            best.words,
            1e3 * best.answer,
            1e3 * plain.answer,
        )
    files = _files(opened, model) if best.engine == LLAMA_CPP else None
    return Way(best.engine, best.vision, files)


def fastest(
    ways: Sequence[Timed], calibrations: Sequence[Mapping[str, Any]], answers: int | None = None
) -> Timed:
    """Return the way with the least seconds among those with the same answers; if a calibration
    holds in some of these, among these. Where only a way's tower rounds, a calibration has to hold
    for it."""
    able = [way for way in ways if not way.why]
    promised = [way for way in able if _is_promised(way, calibrations)]
    able = [way for way in able if way.vision not in ROUNDED or way.vision == ways[0].vision]
    most = MANY if answers is None else answers
    return min(promised or able, key=lambda way: way.load + most * way.answer)


def _is_promised(way: Timed, calibrations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a way is under the conditions of a calibration."""
    then = map(Conditions.of_calibration, calibrations)
    return any(each and not differences(each, Conditions(way.conditions)) for each in then)


# -- whether it is measured, and what was found ----------------------------------------------------


def _may_pay(config: AdapterConfig, how: Mapping[str, Any]) -> bool:
    """Whether anything but PyTorch may be the fastest by far, and is prepared soon."""
    said = config.fingerprint
    size = 12 * said["layers"] * said["width"] ** 2 + said["vocabulary"] * said["width"]
    return SMALLEST <= size <= LARGEST and not how.get("quantize") and _on_cpu(how.get("device"))


def _on_cpu(device: Any) -> bool:
    if device in (None, AUTO):
        return not torch.cuda.is_available()
    return str(device) == "cpu"


def _digest(config: AdapterConfig, how: Mapping[str, Any]) -> str:
    """Return the digest of what is loaded, and of the exits that run."""
    asked = sorted((key, str(value)) for key, value in how.items() if value is not None)
    exits = [exits_digest(config), config.checks, config.policy.depths, config.policy.shortlist]
    return digest_rows([*exits, dict(config.fingerprint), asked])


_PACKAGES = ("offramp", "torch", "transformers", "llama-cpp-python", "onnxruntime", "openvino")


def _here() -> list[Any]:
    """Return versions and machine."""
    versions = {package: version_of(package) or "" for package in _PACKAGES}
    return [versions, processor(), os.cpu_count()]


def remembered() -> list[str]:
    """Return a line for each model that was measured here: its fastest way, beside PyTorch."""
    lines = []
    for found in filter(None, map(_read, _records())):
        best, plain = fastest(found.ways, ()), found.ways[0]
        lines.append(
            f"{found.backbone}, threads {found.threads}: {best.words}, "
            f"{1e3 * best.answer:.0f} CPU ms an answer, in PyTorch {1e3 * plain.answer:.0f}"
        )
    return lines


def forget() -> None:
    """Remove what was measured here, so that each model is measured anew when it is next opened.

    Raises:
        StorageError: a file cannot be removed.
    """
    for file in _records():
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"Cannot remove {file}: {reason(error)}.", ROOM) from error


def _records() -> list[Path]:
    try:
        return sorted(cache_folder(FOUND).glob("*.json"))
    except RuntimeError:  # there is no home
        return []


def _read(file: Path) -> Found | None:
    """The earlier result; None: there is none that can be read."""
    try:
        content = read_json(file, largest=schema.LARGEST, unique=True)
        found: Found = schema.shaped(content, Found)
        able = [way for way in found.ways if not way.why]
        return found if able and all(way.answer > 0 and way.conditions for way in able) else None
    except (OfframpError, ValueError):
        return None


def _keep(file: Path, found: Found) -> None:
    try:
        write_json(file, asdict(found), follow=False)
    except OfframpError as error:
        log.info("%s It is measured again the next time.", error.problem)


# -- measuring -------------------------------------------------------------------------------------


def _measured(
    opened: Opens, config: AdapterConfig, model: str, vision: str, together: bool
) -> Iterator[Timed]:
    """Measure PyTorch first, then each other way; note what stands against a way."""
    tower = _tower(vision)
    engines = [TORCH, "packed", LLAMA_CPP, *([] if together else [COMPILED])]
    others = [Way(name, tower) for name in engines if name != TORCH or tower not in (TORCH, vision)]
    for rounding in _rounding(config, vision):
        others += [Way(name, rounding) for name in ("packed", LLAMA_CPP)]
    expected: Any = None
    with progress_bar("preparing the fastest way", total=1 + len(others)) as bar:
        plain = TORCH if vision == AUTO else vision
        made, expected = _timed(opened, Way(TORCH, plain), None)
        yield made
        bar.update()
        faster = False
        for engine, tower, _ in others:
            if engine != COMPILED or not faster:  # it compiles for long
                try:
                    files = _files(opened, model) if engine == LLAMA_CPP else None
                    same = None if tower in _rounding(config, vision) else expected
                    made, _ = _timed(opened, Way(engine, tower, files), same)
                except Exception as error:  # compilers and packages raise nearly anything
                    made = Timed(engine, tower, why=str(error).strip() or type(error).__name__)
                if made.why:
                    log.debug("Not by %s: %s", made.words, made.why)
                if engine == LLAMA_CPP and not made.why:
                    then = calibrations(config)
                    faster = not then or _is_promised(made, then)
                yield made
            bar.update()


def _rounding(config: AdapterConfig, vision: str) -> list[str]:
    """Return the vision engines that round with which something was calibrated, where none was
    asked for."""
    known = {each.get("vision") for each in map(Conditions.of_calibration, calibrations(config))}
    return [name for name in ROUNDED if name in known and vision == AUTO]


def _tower(vision: str) -> str:
    """Return the vision engine to use where none was asked for: ONNX Runtime, if installed."""
    if vision != AUTO:
        return vision
    with suppress(InputError):
        tower_engine("onnxruntime")
        return "onnxruntime"
    return TORCH


def _timed(opened: Opens, way: Way, expected: Any) -> tuple[Timed, list[list[int]]]:
    """Open a way, and time its answers; and these answers, to be expected of others."""
    gc.collect()  # the way before
    begin = time.process_time()
    loaded = opened(way)
    took = time.process_time() - begin
    try:
        return _tried(loaded, way.engine, took, expected)
    finally:
        if hasattr(loaded.model, "close"):
            loaded.model.close()


def _tried(loaded: Any, engine: str, took: float, expected: Any) -> tuple[Timed, list[list[int]]]:
    adapter = loaded.adapter
    options = {"max_new_tokens": loaded.longest, "do_sample": False}
    probes = _probes(adapter)

    def answered(probe: Any, mode: str | None = None) -> tuple[list[int], float]:
        begin = time.process_time()
        inputs, policy = loaded.encoder.prompts([probe]), adapter.policy.in_mode(mode)
        made = loaded.model.generate(inputs, policy=policy, **options)
        return made.new_tokens[0].tolist(), time.process_time() - begin

    told = [answered(probe)[0] for probe in probes]
    told += [answered(probe, "full")[0] for probe in probes[:2]]
    rounds = [[answered(probe)[1] for probe in probes] for _ in range(ROUNDS)]
    answer = sum(min(each) for each in zip(*rounds, strict=True)) / len(probes)
    runtime = None if loaded.model is adapter else loaded.model.name
    here = of_backbone(adapter.backbone, runtime)
    why = "" if expected in (None, told) else "some of its answers are others than PyTorch's"
    return Timed(engine, adapter.backbone.vision_engine, took, answer, here, why), told


def _probes(adapter: Any) -> list[Any]:
    """Parts of a picture, with a prompt of a kind that was calibrated, if any was."""
    frames = Conditions.of_calibration(adapter.calibration).get("prompts") or ()
    prompt = next((" ".join(frame) for frame in frames), PROMPT)
    with Image.open(example_picture(adapter.backbone.name)) as file:
        picture = file.convert("RGB")
    wide, high = picture.size
    boxes = [
        (0.0, 0.0, 1.0, 1.0),
        (0.0, 0.0, 0.7, 0.7),
        (0.3, 0.3, 1.0, 1.0),
        (0.2, 0.1, 0.8, 0.9),
        (0.0, 0.3, 0.7, 1.0),
        (0.3, 0.0, 1.0, 0.7),
    ]
    parts = [
        picture.crop((int(a * wide), int(b * high), int(c * wide), int(d * high)))
        for a, b, c, d in boxes
    ]
    return [Example(part, prompt, (), key=f"probe {n}") for n, part in enumerate(parts)]


def _files(opened: Opens, model: str) -> Path:
    """The folder of llama.cpp's files, which are written where they are not, or not whole."""
    folder = cache_folder("gguf") / digest_rows([model, FORMAT])[:32]
    engine = engine_named(LLAMA_CPP)
    assert engine.prepare is not None and engine.is_prepared is not None
    if not engine.is_prepared(folder):
        engine.prepare(opened(Way(TORCH)).adapter, folder, FORMAT)
    return folder
