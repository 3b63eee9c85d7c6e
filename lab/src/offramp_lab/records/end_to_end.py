"""Captions and answers about photographs, from file to text, by stage; in end_to_end.json.

`python -m offramp_lab.records.end_to_end` needs photographs and the packages onnxruntime and
llama-cpp-python (an hour of one core). Every photograph is captioned in all ways, in
an order of its own, and so are questions about photographs in some. CPU milliseconds of the
process: picture (the file and the processor), tower, entry (all else before the decoder), prompt
(up to the first token), decoding. Towers run in ONNX Runtime; what another tower, number format or
head is worth has ways of its own, so that each multiple comes in its factors
(`offramp_lab.experiments.factors`). Rivals: Hugging Face's `generate`, and llama.cpp alone in three
formats, fed as we feed it. Last, captions eight at a time in the batch engine. What was answered is
kept in runs/end_to_end, so that a run that was cut off goes on there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from examples.photo_vlm.evaluate import LONGEST, accuracy
from offramp_llama_cpp import ExportFormats, LlamaCppRuntime, export_gguf
from offramp_llama_cpp.entry import PromptEntry
from offramp_llama_cpp.gguf_export import export_whole
from transformers import StoppingCriteriaList

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import FULL, ExitPolicy, Thresholds
from offramp.core.models.exits import Exits
from offramp.engines import ENGINES
from offramp.evaluation.caption_metrics import caption_scores
from offramp.evaluation.timing import FirstToken, GenerateFn, generate_fn, stock_generate_fn
from offramp.inputs.example import Example
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.experiments.factors import STAGES, Measured, Name, entries_of
from offramp_lab.places import RUNS
from offramp_lab.records.record import Group, Kept, Record, asked
from offramp_lab.records.runtimes.methods import ENGINE, Alone
from offramp_lab.records.subjects import halves, load_photo, text_of

RECORD = Record("end_to_end")
PLAIN, PACKED, STOCK_GENERATE = "PyTorch", "PyTorch, packed", "generate"
Q8 = "q8_0"
OURS = (Q8, "f16")
TORCH, TOWER = "torch", "onnxruntime"
ALONE = (("iq4_nl", TORCH), ("iq4_nl", TOWER), (Q8, TOWER), ("q4_0", TOWER))
"""Formats of llama.cpp alone, and what the tower runs in."""
CAREFUL = {"thresholds": 0.4, "first": 0.7}
"""Thresholds at which more answers are full depth's."""
ASKED = ("full", "static", "early exit", "early exit, careful", "lossless")
"""Modes in which questions are answered, and captions written at once."""
SLOTS = 8
Way = Callable[..., list[Any]]
"""Ids of an answer to an example of `most` tokens, and CPU seconds of each of `STAGES`."""


def last_exit(adapter: Adapter) -> Adapter:
    """Full depth by way of the shortlist: an exit before the last layer, which is that layer."""
    depth = adapter.backbone.depth - 1
    exits = Exits(adapter.backbone, [depth]).requires_grad_(False)
    only = replace(adapter.exits, modules=exits, measured={})
    return replace(adapter, exits=only, policy=always(adapter.policy, depth), calibration=None)


def whole_head(adapter: Adapter) -> Adapter:
    """Exits that can say every word."""
    policy = replace(adapter.policy, shortlist=False)
    return replace(
        adapter, exits=replace(adapter.exits, shortlist=None), policy=policy, calibration=None
    )


def always(policy: ExitPolicy, depth: int) -> ExitPolicy:
    """Every token at the exit there."""
    return at(policy, depth, 0.0, 0.0)


def at(policy: ExitPolicy, depth: int, thresholds: float, first: float) -> ExitPolicy:
    """Exits at these thresholds. Drafts are of no use, and left out."""
    return replace(
        policy,
        drafts={},
        thresholds=Thresholds({depth: thresholds}),
        first=Thresholds({depth: first}),
    )


def modes(policy: ExitPolicy) -> dict[str, ExitPolicy]:
    """By name, of the exit that ships."""
    [depth] = policy.thresholds
    return {
        "full": FULL,
        "static": always(policy, depth),
        "early exit": policy,
        "early exit, careful": at(policy, depth, **CAREFUL),
        "early exit, prompt run whole": replace(policy, first={}),
        "lossless": replace(policy, lossless=True),
    }


# -- ways -----------------------------------------------------------------------------------------


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

    def take(self, encoder: Any, example: Example, write: GenerateFn) -> list[Any]:
        self.tower, self.entered, first = 0.0, None, FirstToken(time.process_time)
        begin = time.process_time()
        inputs = encoder.prompts([example])
        opened = time.process_time()
        ids = write(inputs, StoppingCriteriaList([first])).tolist()
        end = time.process_time()
        assert first.seconds is not None and self.entered is not None
        entry = self.entered - opened - self.tower
        prompt, decoding = first.seconds - self.entered, end - first.seconds
        return [ids, [opened - begin, self.tower, entry, prompt, decoding]]


@contextmanager
def entries_noted(stages: Stages) -> Iterator[None]:
    """llama.cpp's prompts note when they are ready."""
    read = PromptEntry.read

    def noted(self: PromptEntry, *given: Any) -> Any:
        found = read(self, *given)
        stages.enter()
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


class Ways:
    """All ways by name, made as they are asked for. work: for exported files."""

    def __init__(self, exits: Path | None, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.stages = work, Stages()
        named = ((PLAIN, TORCH), (PLAIN, TOWER), (PACKED, TOWER))
        loaded = {(engine, tower): load_photo(exits, vision=tower) for engine, tower in named}
        self.adapters = {name: adapter for name, (adapter, _) in loaded.items()}
        self.adapter, self.encoder = loaded[PLAIN, TOWER]
        for adapter in self.adapters.values():
            self.stages.watch(adapter.backbone)
        ENGINES["packed"].open(self.adapters[PACKED, TOWER])

    def all(self) -> dict[Name, Way]:
        """For captions."""
        found: dict[Name, Way] = {}
        for formats, tower in ALONE:
            name = (f"llama.cpp {formats}", "full", tower)
            found[name] = self._alone(self.adapters[PLAIN, tower], formats)
        policies, short = modes(self.adapter.policy), last_exit(self.adapter)
        narrow = {"full, shortlist": short.policy}
        for engine in (PLAIN, PACKED):
            adapter = self.adapters[engine, TOWER]
            found |= self._by(adapter, engine, policies)
            found |= self._by(last_exit(adapter), engine, narrow)
        every = whole_head(self.adapter)
        found |= self._by(every, PLAIN, {"early exit, whole head": every.policy})
        behind = self.adapters[PLAIN, TORCH]
        stock = partial(stock_generate_fn, behind.backbone, do_sample=False)
        found[STOCK_GENERATE, "full", TORCH] = _way(
            self.stages, self.encoder, lambda most: stock(max_new_tokens=most)
        )
        for formats in OURS:
            found |= self._by(self._llama(self.adapter, formats, "exits"), formats, policies)
            found |= self._by(self._llama(short, formats, "shortlist"), formats, narrow)
        return found | self._by(self._llama(behind, Q8, "exits"), Q8, {"full": FULL}, TORCH)

    def _by(
        self, model: Any, engine: str, policies: Mapping[str, ExitPolicy], tower: str = TOWER
    ) -> dict[Name, Way]:
        """A model's ways by mode."""
        return {
            (engine, mode, tower): torch_way(self.stages, self.encoder, model, policy)
            for mode, policy in policies.items()
        }

    def _llama(self, adapter: Adapter, formats: str, kind: str) -> Any:
        folder = self.work / f"{formats}-{kind}"
        if not folder.is_dir():
            export_gguf(adapter, folder, formats)
        return LlamaCppRuntime(adapter, folder, engine=ENGINE)

    def _alone(self, adapter: Adapter, formats: str) -> Way:
        file = self.work / f"whole-{formats}.gguf"
        if not file.is_file():
            export_whole(adapter.backbone, file, ExportFormats(formats))
        alone = Alone(adapter, file, self.encoder.eos)
        return _way(self.stages, self.encoder, lambda most: partial(alone, max_new_tokens=most))


# -- figures --------------------------------------------------------------------------------------


def measured(
    found: Mapping[Name, Way], examples: Sequence[Example], kind: str, encoder: Any, work: Path
) -> dict[Name, Measured]:
    """What all ways took and scored on examples of a kind, captions or questions."""
    asked_of = {name: partial(way, most=LONGEST[kind]) for name, way in found.items()}
    kept = Kept(work / f"{kind}.jsonl")
    told = kept.answers(asked_of, examples, lambda example: example, f"{len(examples)} {kind}")
    return scored(told, kind, encoder, examples)


def scored(
    told: Mapping[Name, Sequence[Any]], kind: str, encoder: Any, examples: Sequence[Example]
) -> dict[Name, Measured]:
    """told: by way, ids and seconds of each answer."""
    return {
        name: Measured.of(rows, scores(kind, encoder, [ids for ids, _ in rows], examples))
        for name, rows in told.items()
    }


def scores(
    kind: str, encoder: Any, answers: Sequence[Any], examples: Sequence[Example]
) -> dict[str, Sequence[float]]:
    """Each answer's, by metric: CIDEr and ROUGE-L of captions, right or not of questions.
    answers: their ids."""
    texts = [text_of(encoder, ids) for ids in answers]
    if kind == "questions":
        pairs = zip(texts, examples, strict=True)
        return {"right": [accuracy([text], [example]) for text, example in pairs]}
    keyed = {example.key: text for example, text in zip(examples, texts, strict=True)}
    references = {example.key: example.answers for example in examples}
    found = caption_scores(keyed, references, metrics=("CIDEr", "ROUGE_L"), tokenizer="ptb")
    return dict(found.by_example)


def bases(name: Name) -> dict[str, Name]:
    """What a way is compared with: full depth of what decodes it, also with the same shortlist; and
    llama.cpp alone behind the same tower, in the fastest format of equal CIDEr."""
    own = name[0] if name[0] in (PLAIN, PACKED, *OURS) else PLAIN
    return {
        "full": (own, "full", TOWER),
        "full_shortlist": (own, "full, shortlist", TOWER),
        "fastest": ("llama.cpp iq4_nl", "full", TOWER),
    }


def together(ways: Ways, examples: Sequence[Example], work: Path) -> dict[Name, Measured]:
    """Captions in the batch engine, in PyTorch, in groups of `SLOTS`: by mode, in turn."""
    policies = modes(ways.adapter.policy)
    by_mode = {mode: partial(_engine, ways.adapter, ways.encoder, policies[mode]) for mode in ASKED}
    groups, kept = Group.all(examples, SLOTS), Kept(work / "together.jsonl")
    told = kept.answers(by_mode, groups, lambda group: group.examples, f"{SLOTS} at once")
    rows: dict[Name, list[Any]] = {
        (f"batch of {SLOTS}", mode, TOWER): [
            [ids, [0, 0, 0, 0, seconds / len(many)]] for many, seconds in made for ids in many
        ]
        for mode, made in told.items()
    }
    return scored(rows, "captions", ways.encoder, examples)


def _engine(
    adapter: Adapter, encoder: Any, policy: ExitPolicy, group: Sequence[Example]
) -> tuple[list[list[int]], float]:
    """Ids of each, and CPU seconds: photographs are opened in the same thread."""
    options = {"max_new_tokens": LONGEST["captions"], "do_sample": False}
    exits = None if policy is FULL else adapter.exits
    begin = time.process_time()
    core = EngineCore(adapter.backbone, exits, policy, EngineConfig(slots=SLOTS, limit=128))
    mode = "lossless" if policy.lossless else "early_exit" if exits else "full"
    requests = [Request(encoder.prompts([e]), mode, options=options) for e in group]
    handles = [core.add(request) for request in requests]
    core.run()
    ids = [handle.result().output.new_tokens[0].tolist() for handle in handles]
    return ids, time.process_time() - begin


def main() -> None:
    arguments = asked(__doc__, photo=True, photographs=300, questions=100)
    work = RUNS / RECORD.name
    ways = Ways(arguments.adapter, work)
    captions = halves(arguments.data)[1][: arguments.photographs]
    questions = halves(arguments.data, "questions_val")[1][: arguments.questions]
    found, encoder = ways.all(), ways.encoder
    some = {
        name: way
        for name, way in found.items()
        if name[2] == TOWER and name[0] in (PLAIN, *OURS) and name[1] in ASKED
    }
    with entries_noted(ways.stages):
        told = measured(found, captions, "captions", encoder, work)
        answered = measured(some, questions, "questions", encoder, work)
    slots, policy = together(ways, captions, work), ways.adapter.policy
    first = policy.first or {}
    RECORD.write(
        {
            "photographs": len(captions),
            "questions": len(questions),
            "stages": list(STAGES),
            "policies": {
                "early exit": [[*policy.thresholds.values()], [*first.values()]],
                "early exit, careful": [[CAREFUL["thresholds"]], [CAREFUL["first"]]],
            },
            "captioned": entries_of(told, bases),
            "questioned": entries_of(answered, bases),
            "slots": SLOTS,
            "together": entries_of(slots | told, _slot_bases, [*slots]),
        }
    )


def _slot_bases(name: Name) -> dict[str, Name]:
    return {"full": (f"batch of {SLOTS}", "full", TOWER), "single": (PLAIN, name[1], TOWER)}


if __name__ == "__main__":
    main()
