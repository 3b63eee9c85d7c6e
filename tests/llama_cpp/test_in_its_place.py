"""Laws of a runtime in the adapter's place: what is measured and guaranteed is of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fakes
import pytest
from gguf_cases import adapter_of, inputs_of, refused, same

from offramp import cli
from offramp.adapter.adapter import Adapter
from offramp.calibration.calibrate import calibrate
from offramp.calibration.draft_thresholds import draft_policies, draft_speeds
from offramp.core.decoding.policy import FULL, ExitPolicy, GenerationOutput
from offramp.core.errors import InputError
from offramp.evaluation.evaluate import evaluate
from offramp.features.input_processor import InputProcessor
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.serial import SerialCore

NAME = "blip2-llama"
PHOTO = str(Path(__file__).parents[2] / "photo-model" / "offramp_photo" / "photographer.jpg")
LONGEST = {"max_new_tokens": 6}


@dataclass
class Recorder:
    """A runtime that hands on to an adapter, and notes the policies it was asked for."""

    adapter: Adapter
    name: str = "recorder q4_1"
    rows: int = 1
    asked: list[ExitPolicy | None] = field(default_factory=list)

    def generate(
        self, inputs: Mapping[str, Any], *, policy: ExitPolicy | None = None, **options: Any
    ) -> GenerationOutput:
        assert len(inputs["input_ids"]) <= self.rows
        self.asked.append(policy)
        return self.adapter.generate(inputs, policy=policy, **options)


def adapter() -> Adapter:
    found = adapter_of(NAME)
    return replace(found, seen={"train": []})


def encoder() -> InputProcessor:
    return InputProcessor(adapter_of(NAME).backbone, fakes.Blip2FakeProcessor(NAME))


def test_evaluation_asks_the_runtime_for_every_answer(tmp_path: Path) -> None:
    runtime, examples = Recorder(adapter()), fakes.examples(3)
    given = (adapter(), encoder(), examples, "captions")
    evaluate(*given, out=tmp_path / "run", runtime=runtime, metrics=("CIDEr",), **LONGEST)
    once = [policy for policy in runtime.asked if policy == FULL]
    assert len(once) == 3 + 1 and len(runtime.asked) == 2 * (3 + 1)  # one of each to warm up
    other = Recorder(adapter(), name="recorder f16")
    refused(
        lambda: evaluate(*given, out=tmp_path / "run", runtime=other, resume=True, **LONGEST),
        InputError,
        "runtime",
    )


def test_evaluation_refuses_what_a_runtime_cannot_do(tmp_path: Path) -> None:
    runtime = Recorder(adapter())
    given: dict[str, Any] = {"out": tmp_path, "runtime": runtime}
    items = [fakes.examples(1)[0]]
    refused(
        lambda: evaluate(adapter(), encoder(), items, "captions", batch_size=4, **given),
        InputError,
        "--batch-size 1",
    )


@pytest.mark.slow
def test_a_promise_is_of_the_runtimes_answers() -> None:
    runtime, examples = Recorder(adapter()), fakes.examples(12)
    asked: dict[str, Any] = {"target": 0.9, "confidence": 0.8, "thresholds": (0.9, 0.5, 0.2)}
    found = calibrate(
        adapter(),
        encoder(),
        examples,
        ExitPolicy(shortlist=True),
        runtime=runtime,
        **asked,
        **LONGEST,
    )
    assert found.runtime == runtime.name and found.to_json()["runtime"] == runtime.name
    # Nothing of it is a replay of the adapter's own exits.
    once_more = 1  # by the thresholds that were chosen, to know their scores
    assert len(runtime.asked) == 12 * (1 + len(found.path) + once_more)
    plain = calibrate(
        adapter(), encoder(), examples, ExitPolicy(shortlist=True), **asked, **LONGEST
    )
    assert plain.runtime is None


def test_drafts_are_timed_in_the_runtime() -> None:
    ours = adapter().with_policy(ExitPolicy({2: 0.5}))
    runtime = Recorder(ours)
    found = draft_speeds(
        ours,
        [inputs_of(NAME)],
        thresholds=(0.1, 0.3),
        rounds=1,
        runtime=runtime,
        do_sample=False,
        **LONGEST,
    )
    asked = [FULL, *draft_policies(ours, (0.1, 0.3))]
    assert all(policy in runtime.asked for policy in asked) and len(found) >= len(asked) - 1


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["generate", "x", "--image", PHOTO, "--engine", "lama"], "llama.cpp"),
        (["generate", "x", "--image", PHOTO, "--engine", "llama.cpp"], "--gguf"),
        (["generate", "tiny-opt", "--image", PHOTO, "--gguf", "y"], "offramp export"),
        (["serve", "x", "--engine", "compiled", "--slots", "8"], "--slots"),
        (["export", "--adapter", "x", "--gguf", "q3", "--out", "y"], "q8_0"),
    ],
    ids=lambda given: given if isinstance(given, str) else given[0],
)
def test_a_mistake_on_the_command_line_is_two_lines(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) in (1, 2)
    _, said = capsys.readouterr()
    assert len(said.strip().splitlines()) == 2 and word in said


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_the_real_runtime_stands_in_its_place(exported: Any, tmp_path: Path) -> None:
    from offramp_llama_cpp import EngineOptions, LlamaCppRuntime

    engine = EngineOptions(context=256, cache="f32", flash_attention=False)
    with LlamaCppRuntime(adapter(), exported(NAME), engine=engine) as runtime:
        examples, more = fakes.examples(3), {"metrics": ("CIDEr",), **LONGEST}
        given = (adapter(), encoder(), examples, "captions")
        ours = evaluate(*given, out=tmp_path / "ours", runtime=runtime, **more)
        theirs = evaluate(*given, out=tmp_path / "theirs", **more)
        assert ours["modes"]["early_exit"]["tokens"] == theirs["modes"]["early_exit"]["tokens"]
        found = calibrate(
            adapter(),
            encoder(),
            fakes.examples(8),
            ExitPolicy(shortlist=True),
            runtime=runtime,
            target=0.9,
            confidence=0.8,
            thresholds=(0.9, 0.5),
            **LONGEST,
        )
        assert found.runtime == "llama.cpp f32, exits f32, head f32"


@pytest.mark.llama_cpp
def test_an_engine_answers_by_the_real_runtime(exported: Any) -> None:
    from offramp_llama_cpp import EngineOptions, LlamaCppRuntime

    inputs, options = inputs_of(NAME), {"do_sample": False, **LONGEST}
    with (
        LlamaCppRuntime(adapter(), exported(NAME), engine=EngineOptions(context=256)) as runtime,
        BatchEngine(SerialCore(runtime, runtime.policy, limit=256)) as engine,
    ):
        for mode in ("full", "early_exit", "lossless"):
            told: list[Any] = []
            handle = engine.submit(inputs, mode=mode, on_token=told.append, **options)
            ours = handle.result(60).output
            theirs = runtime.generate(inputs, policy=runtime.policy.in_mode(mode), **options)
            assert same(ours, theirs)
            assert [choice.depth for choice in told] == theirs.depths[0].tolist()
        too_long = engine.submit(inputs, max_new_tokens=1000)
        assert isinstance(too_long.exception(60), InputError)
