"""Ways to answer with the photo model, by engine, mode and tower; each is opened when it is first
asked, and notes what an answer took by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from examples.photo_vlm.evaluate import LONGEST
from examples.photo_vlm.student import wear
from offramp_llama_cpp import EngineOptions, ExportFormats, LlamaCppRuntime, export_gguf
from offramp_llama_cpp.entry import PromptEntry
from offramp_llama_cpp.gguf_export import export_whole
from transformers import StoppingCriteriaList

from offramp.adapter.adapter import Adapter
from offramp.calibration.trust_path import trusting
from offramp.core.decoding.policy import FULL, ExitPolicy, Thresholds
from offramp.core.models.exits import Exits
from offramp.core.models.fingerprint import dump_fingerprint, fingerprint
from offramp.core.storage import digest_file, digest_rows, write_atomic
from offramp.engines import ENGINES
from offramp.evaluation.timing import FirstToken, GenerateFn, generate_fn, stock_generate_fn
from offramp.features.compiled.compiled import COMPILED as BY_CODE
from offramp.features.input_processor import InputProcessor
from offramp.features.shrink_on_load import with_shrink_on_load
from offramp.inputs.example import Example
from offramp_lab.experiments.factors import LOSSLESS, Name
from offramp_lab.places import RUNS
from offramp_lab.records.alone import Alone
from offramp_lab.records.subjects import load_photo, photo_exits

TORCH, TOWER, ROUNDED = "torch", "onnxruntime", "openvino-bf16"
LARGE = f"{TOWER}, 12 megapixels"
SHRUNK = f"{LARGE}, shrunk on load"
"""The tower of ways that open photographs of 12 megapixels: whole, and shrunk on load."""
PIXELS, JPEG = 12 * 10**6, 90
"""Pixels of an enlarged photograph, and the quality of its file."""
PLAIN, STOCK = "PyTorch", "generate"
"""Engines in float32; with a format behind them (`in_format`) in others."""
ALONE, ITS_KERNELS = "llama.cpp ", ", its own kernels"
"""Before a format: llama.cpp without exits. Behind one: ours with llama.cpp's kernels."""
Q8, HEAD = "q8_0", ", head "
RIVAL = f"{ALONE}iq4_nl{HEAD}q4_0"
"""llama.cpp alone in the formats in which it is fastest."""
PREPACKED, COMPILED = "packed", "compiled"
STOCK_COMPILED = f"{STOCK}, static cache, {COMPILED}"
HOW: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
"""Formats in PyTorch: precision of the states, and what weights are rounded to."""
FULL_DEPTH, SHORT, STATIC, EARLY = "full", "full, shortlist", "static", "early exit"
STUDENT, THRESHOLDS = "student", "thresholds 0.1, 0.5"
"""A name of thresholds: that of every token, then that of the first one. These are promised as much
as what ships."""
MODES = (FULL_DEPTH, STATIC, EARLY, THRESHOLDS, LOSSLESS)
ENGINE = EngineOptions(context=512)
COMES = replace(ENGINE, kernels=False)
"""As llama.cpp comes."""
Way = Callable[..., list[Any]]
"""Ids of an answer to an example of `most` tokens, and CPU seconds of each of `STAGES`."""


def in_format(layers: str, engine: str = PLAIN) -> str:
    """The name of an engine of PyTorch by the format of the layers: "int4, packed"."""
    words = [word for word in layers.split(", ") if word != "float32"]
    return ", ".join([engine, *words])


def last_exit(adapter: Adapter) -> Adapter:
    """Full depth by way of the shortlist: an exit before the last layer, which is that layer."""
    depth = adapter.backbone.depth - 1
    exits = Exits(adapter.backbone, [depth]).requires_grad_(False)
    only = replace(adapter.exits, modules=exits, measured={})
    return replace(adapter, exits=only, policy=always(adapter.policy, depth), calibration=None)


def always(policy: ExitPolicy, depth: int) -> ExitPolicy:
    """Every token at the exit there."""
    return at(policy, [depth], 0.0, 0.0)


def at(policy: ExitPolicy, depths: Sequence[int], thresholds: float, first: float) -> ExitPolicy:
    """Exits at these thresholds. Drafts are of no use, and left out."""
    return replace(
        policy,
        drafts={},
        thresholds=Thresholds.shared(depths, thresholds),
        first=Thresholds.shared(depths, first),
        trust=None,
    )


def policy_of(adapter: Adapter, mode: str) -> ExitPolicy:
    """The policy of a mode, of an adapter as it ships: one of `MODES`, other thresholds, or a
    trust, such as "trust 0.1"."""
    policy, depths = adapter.policy, adapter.exits.depths
    if mode.startswith("trust "):
        by_trust = trusting(replace(policy, trust=None), adapter, LONGEST["captions"])
        return replace(by_trust, trust=float(mode.removeprefix("trust ")))
    if mode.startswith("thresholds "):
        return at(policy, depths, *map(float, mode.removeprefix("thresholds ").split(", ")))
    if mode == LOSSLESS:
        return replace(policy, lossless=True, trust=None)
    return {FULL_DEPTH: FULL, EARLY: policy, STATIC: always(policy, depths[0])}[mode]


class Stages:
    """When an answer came to each stage, by the CPU seconds of the process.

    The tower notes its own part; the decoder, that it begins.
    """

    def __init__(self) -> None:
        self.tower = 0.0
        self.entered: float | None = None

    def watch(self, backbone: Any) -> None:
        """Note when its tower and its decoder run."""

        def begin(*_: Any) -> None:
            self._begun = time.process_time()

        def end(*_: Any) -> None:
            self.tower += time.process_time() - self._begun

        tower = backbone.tower or backbone.vision
        tower.register_forward_pre_hook(begin)
        tower.register_forward_hook(end)
        backbone.stack.register_forward_pre_hook(self.enter)

    def enter(self, *_: Any) -> None:
        """The decoder begins, where it had not."""
        if self.entered is None:
            self.entered = time.process_time()

    def take(self, encoder: Any, example: Any, write: GenerateFn) -> list[Any]:
        return self.taken(partial(encoder.prompts, [example]), write)

    def taken(self, read: Callable[[], Any], write: GenerateFn) -> list[Any]:
        """Ids of an answer, and CPU seconds of each of `STAGES`. read: returns its prompt."""
        self.tower, self.entered, first = 0.0, None, FirstToken(time.process_time)
        begin = time.process_time()
        inputs = read()
        opened = time.process_time()
        ids = write(inputs, StoppingCriteriaList([first])).tolist()
        end = time.process_time()
        assert first.seconds is not None and self.entered is not None
        entry = self.entered - opened - self.tower
        prompt, decoding = first.seconds - self.entered, end - first.seconds
        return [ids, [opened - begin, self.tower, entry, prompt, decoding]]

    @contextmanager
    def of_entries(self) -> Iterator[None]:
        """llama.cpp's prompts note when they are ready."""
        read = PromptEntry.read

        def noted(entry: PromptEntry, *given: Any) -> Any:
            found = read(entry, *given)
            self.enter()
            return found

        PromptEntry.read = noted  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            PromptEntry.read = read  # type: ignore[method-assign]


def in_torch(adapter: Adapter, policy: ExitPolicy, most: int) -> GenerateFn:
    return generate_fn(adapter.generate, policy=policy, max_new_tokens=most, do_sample=False)


def torch_way(stages: Stages, encoder: Any, model: Any, policy: ExitPolicy) -> Way:
    """model: an adapter, or what answers in its place."""
    return _way(stages, encoder, partial(in_torch, model, policy))


def _way(stages: Stages, encoder: Any, writing: Callable[[int], GenerateFn]) -> Way:
    return lambda example, most: stages.take(encoder, example, writing(most))


def stock_compiled(adapter: Adapter, most: int) -> GenerateFn:
    """Hugging Face's own with its static cache, whose step inductor compiles at the first call."""
    from transformers.generation.configuration_utils import CompileConfig

    config = CompileConfig(fullgraph=False, mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]  # else a CPU is left out
    how: dict[str, Any] = {"cache_implementation": "static", "compile_config": config}
    return stock_generate_fn(adapter.backbone, max_new_tokens=most, do_sample=False, **how)


class Opened:
    """exits: a folder in the place of those that ship. work: for what is kept of them. student:
    folder of what `examples.photo_vlm.student` trained. compiled: whether compiled code is asked
    too. model: its name. context: tokens of a prompt with its answer, in llama.cpp."""

    def __init__(
        self,
        exits: Path | None,
        work: Path,
        student: Path = RUNS,
        compiled: bool = False,
        model: str = "photo",
        context: int = ENGINE.context,
    ) -> None:
        self.exits, self.student, self.compiled = exits, student, compiled
        self.model, self.context = model, context
        self.stages = Stages()
        self._ways, self._models = dict[Name, Way](), dict[Any, Any]()
        self.adapter, self.encoder = self.loaded(PLAIN, TOWER)
        files = [f for f in sorted(photo_exits(exits, model).iterdir()) if f.is_file()]
        weights = dump_fingerprint(fingerprint(self.adapter.backbone))
        self.work = work / digest_rows([weights, *map(digest_file, files)])[:12]
        self.work.mkdir(parents=True, exist_ok=True)

    def answer(self, example: Example, name: Name, most: int) -> list[Any]:
        """What a way makes of an example."""
        if name not in self._ways:
            self._ways[name] = self._open(*name)
        if name[2] in (LARGE, SHRUNK):
            example = self._enlarged(example)
        return self._ways[name](example, most)

    def ways(self, names: Sequence[Name], kind: str = "captions") -> dict[Name, Way]:
        return {name: partial(self.answer, name=name, most=LONGEST[kind]) for name in names}

    def loaded(self, engine: str, tower: str, kind: str = "") -> tuple[Adapter, Any]:
        """An adapter and its encoder, by engine of PyTorch and tower. kind: sets it apart from
        others of these."""
        if (engine, tower, kind) not in self._models:
            _, *words = engine.split(", ")
            layers = next((word for word in words if word in HOW), "float32")
            runs, *_ = tower.split(", ")
            adapter, encoder = load_photo(self.exits, *HOW[layers], runs, self.model)
            if tower == SHRUNK:
                smaller = with_shrink_on_load(encoder.processor)
                encoder = InputProcessor(adapter.backbone, smaller)
            if PREPACKED in words:
                ENGINES["packed"].open(adapter)
            if COMPILED in words:
                compiled = adapter.backbone.with_decoding(instead=BY_CODE)
                adapter = replace(adapter, backbone=compiled)
            self.stages.watch(adapter.backbone)
            self._models[engine, tower, kind] = adapter, encoder
        found: tuple[Adapter, Any] = self._models[engine, tower, kind]
        return found

    def _open(self, engine: str, mode: str, tower: str) -> Way:
        if engine.startswith(ALONE):
            return self._alone(engine.removeprefix(ALONE), tower)
        if engine.startswith(STOCK):
            if engine == STOCK_COMPILED:
                adapter, encoder = self.loaded(PLAIN, tower)
                return _way(self.stages, encoder, partial(stock_compiled, adapter))
            adapter, encoder = self.loaded(engine.replace(STOCK, PLAIN, 1), tower)
            stock = partial(stock_generate_fn, adapter.backbone, do_sample=False)
            return _way(self.stages, encoder, lambda most: stock(max_new_tokens=most))
        torch_engine = engine if engine.startswith(PLAIN) else PLAIN
        adapter, encoder = self.loaded(torch_engine, tower, STUDENT if mode == STUDENT else "")
        if mode == STUDENT:
            wear(adapter, self.student / "student.pt")
            return torch_way(self.stages, encoder, adapter, policy_of(adapter, STATIC))
        adapter = last_exit(adapter) if mode == SHORT else adapter
        policy = adapter.policy if mode == SHORT else policy_of(adapter, mode)
        if torch_engine == engine:
            return torch_way(self.stages, encoder, adapter, policy)
        kind = "shortlist" if mode == SHORT else "exits"
        return torch_way(self.stages, encoder, self.llama(adapter, engine, kind, tower), policy)

    def llama(self, adapter: Adapter, engine: str, kind: str, tower: str) -> Any:
        """Return an adapter's runtime inside llama.cpp. kind: in the name of its files."""
        if (engine, kind, tower) not in self._models:
            formats = engine.removesuffix(ITS_KERNELS)
            folder = self.work / f"{formats}-{kind}"
            if not folder.is_dir():
                export_gguf(adapter, folder, formats)
            how = COMES if engine.endswith(ITS_KERNELS) else ENGINE
            how = replace(how, context=self.context)
            self._models[engine, kind, tower] = LlamaCppRuntime(adapter, folder, engine=how)
        return self._models[engine, kind, tower]

    def _alone(self, formats: str, tower: str) -> Way:
        adapter, encoder = self.loaded(PLAIN, tower)
        file = self.work / f"whole-{formats}.gguf"
        if not file.is_file():
            layers, _, head = formats.partition(HEAD)
            export_whole(adapter.backbone, file, ExportFormats(layers, head=head))
        alone = Alone(adapter, file, COMES, encoder.eos)
        return _way(self.stages, encoder, lambda most: partial(alone, max_new_tokens=most))

    def _enlarged(self, example: Example) -> Example:
        """Return the photograph in a file of `PIXELS`, which the first call makes."""
        file = self.work / "enlarged" / f"{digest_rows([example.key])[:16]}.jpg"
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            picture = example.open_image()
            times = (PIXELS / (picture.width * picture.height)) ** 0.5
            large = picture.resize((round(picture.width * times), round(picture.height * times)))
            written = BytesIO()
            large.save(written, "JPEG", quality=JPEG)
            write_atomic(file, written.getvalue())
        return replace(example, image=file)
