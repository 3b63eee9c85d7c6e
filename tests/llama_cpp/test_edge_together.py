"""Laws of several answers at once without PyTorch: each is what it is alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_cases import drafting, refused
from hub_files import image_adapter, sliced, text_adapter
from PIL import Image
from projector_files import write_projector

from offramp.core.errors import InputError
from offramp.serving.core import Core
from offramp_llama_cpp.edge.model import Answer, EdgeModel
from offramp_llama_cpp.edge.sampling import Sampling
from offramp_llama_cpp.segment import EngineOptions

pytestmark = pytest.mark.llama_cpp

SLOTS = 4
ENGINE = EngineOptions(context=128, cache="f32", flash_attention=False, sequences=SLOTS)
MODES = ("full", "early_exit", "lossless")
PROMPTS = ("the dog ran", "a", "who is it, and where?", "0123456789" * 4, "Hi")
SAMPLINGS = (Sampling(), Sampling(repetition_penalty=1.7), Sampling(1.3, top_p=0.9, seed=3))
Ask = Callable[[EdgeModel], Answer]


@pytest.fixture(scope="module", params=["exits", "drafts"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exits; and exits that draft on, whose policy says nothing of the first of them."""
    adapter = text_adapter()
    if request.param == "drafts":
        adapter = drafting(adapter)
        adapter = replace(adapter, policy=replace(adapter.policy, lossless=False))
    return sliced(adapter, tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[EdgeModel]:
    with EdgeModel(folder, engine=ENGINE) as each:
        shared = each._opened.chain.sizes.shared
        if not shared and torch.backends.cpu.get_cpu_capability() != "AVX512":
            pytest.skip("without AVX-512 tokens are not the same in company as alone")
        assert shared
        yield each


def questions() -> list[Ask]:
    """Of every mode, prompt and way to draw, and of different lengths."""

    def ask(i: int, mode: str, prompt: str, sampling: Sampling) -> Ask:
        at = {2: 0.2} if mode == "early_exit" and i % 3 == 0 else None
        return lambda model: model.answer(
            prompt, mode=mode, sampling=sampling, max_new_tokens=3 + i % 17, thresholds=at
        )

    kinds = [(m, p, s) for m in MODES for p in PROMPTS for s in SAMPLINGS]
    return [ask(i, *kind) for i, kind in enumerate(kinds)]


def together(model: EdgeModel, asked: Sequence[Ask], at_once: int = 6) -> list[Answer]:
    with ThreadPoolExecutor(at_once) as pool:
        return [*pool.map(lambda ask: ask(model), asked)]


def told(answer: Answer) -> Any:
    return answer.text, answer.finish, [(s.token, s.depth) for s in answer.steps]


def calls_of(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call from here on."""
    calls: list[int] = []
    for segment in model._segments:
        decode = segment._decode

        def counted(batch: Any, row: Any, decode: Any = decode) -> None:
            calls.append(batch.n_tokens)
            decode(batch, row)

        monkeypatch.setattr(segment, "_decode", counted)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_answers_in_any_company_are_those_written_alone(
    seed: int, model: EdgeModel, folder: Path
) -> None:
    asked = questions()
    random.Random(seed).shuffle(asked)
    alone = [told(ask(model)) for ask in asked]
    assert [told(answer) for answer in together(model, asked)] == alone
    with EdgeModel(folder, engine=replace(ENGINE, sequences=1)) as single:
        assert [told(ask(single)) for ask in asked] == alone


def test_images_keep_company_with_text(tmp_path: Path) -> None:
    adapter = image_adapter()
    where = sliced(adapter, tmp_path)
    mmproj = write_projector(adapter.backbone, tmp_path / "mmproj.gguf")
    draw, files = np.random.default_rng(0), [tmp_path / f"{n}.png" for n in range(3)]
    for file in files:
        Image.fromarray(draw.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(file)

    def ask(images: list[Path], mode: str) -> Ask:
        return lambda model: model.answer("it is", images, mode=mode, max_new_tokens=12)

    asked = [ask(files[:n], mode) for mode in MODES for n in range(4)]
    with EdgeModel(where, mmproj=mmproj, engine=ENGINE) as model:
        alone = [told(each(model)) for each in asked]
        assert len({text for text, *_ in alone}) > 2
        assert [told(answer) for answer in together(model, asked)] == alone


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


@contextmanager
def held(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The engine's core, which makes no call before its `go_on` is set."""
    core: Any = model.start(64, lambda: None).core
    core.go_on, advance = threading.Event(), core._advance

    def waiting() -> Any:
        assert core.go_on.wait(60)
        return advance()

    with monkeypatch.context() as patch:
        patch.setattr(core, "_advance", waiting)
        yield core


@pytest.mark.parametrize("mode", MODES)
def test_calls_are_shared(mode: str, model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(model, monkeypatch)

    def ask(model: EdgeModel) -> Answer:
        return model.answer("the dog ran", mode=mode, max_new_tokens=24)

    alone = ask(model)
    once = len(calls)
    calls.clear()
    with held(model, monkeypatch) as core, ThreadPoolExecutor(SLOTS) as pool:
        first = pool.submit(ask, model)  # which is held before its first call
        until(lambda: core.running == 1)
        answers = [first, *(pool.submit(ask, model) for _ in range(SLOTS - 1))]
        until(lambda: len(model._engine._open) == SLOTS)  # type: ignore[union-attr]
        core.go_on.set()
        assert [told(each.result()) for each in answers] == [told(alone)] * SLOTS
    assert len(calls) < 2 * once


def test_who_gives_up_leaves_its_slot(model: EdgeModel) -> None:
    class Gone(Exception):
        pass

    def hang_up(text: str) -> None:
        raise Gone

    asked = questions()[:: len(PROMPTS)]
    alone = [told(ask(model)) for ask in asked]
    with ThreadPoolExecutor(2 * SLOTS) as pool:
        gone = [
            pool.submit(model.answer, PROMPTS[0], mode=m, max_new_tokens=90, on_text=hang_up)
            for m in (*MODES, *MODES)
        ]
        found = [pool.submit(ask, model) for ask in asked]
        assert [told(each.result()) for each in found] == alone
        assert all(isinstance(each.exception(), Gone) for each in gone)
    assert told(asked[0](model)) == alone[0]
    until(lambda: model._engine.core.idle)  # type: ignore[union-attr]


def test_a_slow_listener_holds_nobody_up(model: EdgeModel) -> None:
    heard, go_on = threading.Event(), threading.Event()

    def listen(text: str) -> None:
        heard.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(model.answer, PROMPTS[0], max_new_tokens=24, on_text=listen)
        assert heard.wait(60)
        quick = model.answer(PROMPTS[0], max_new_tokens=24)
        go_on.set()
        assert told(slow.result()) == told(quick)


def test_what_is_wrong_with_one_request_is_its_own(
    model: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = told(model.answer(PROMPTS[0], mode="full", max_new_tokens=24))
    choose = "offramp_llama_cpp.edge.sampling.Sampler.choose"

    def broken(*_: Any) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(choose, broken)  # which greedy answers do not ask
    with ThreadPoolExecutor(SLOTS) as pool:
        good = pool.submit(model.answer, PROMPTS[0], mode="full", max_new_tokens=24)
        bad = [
            pool.submit(
                model.answer, PROMPTS[1], mode=mode, max_new_tokens=9, sampling=Sampling(1.0)
            )
            for mode in MODES
        ]
        assert all(isinstance(each.exception(), ZeroDivisionError) for each in bad)
        assert told(good.result()) == expected


def test_a_call_that_fails_fails_who_shares_it_and_the_next_are_answered(
    model: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = told(model.answer(PROMPTS[0], max_new_tokens=8))
    with monkeypatch.context() as patch:
        patch.setattr(Core, "_advance", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.answer(PROMPTS[0], max_new_tokens=8)
    assert told(model.answer(PROMPTS[0], max_new_tokens=8)) == expected


def test_closing_finishes_what_was_asked_and_refuses_the_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EdgeModel(folder, engine=replace(ENGINE, sequences=1))
    expected = [told(model.answer(prompt, max_new_tokens=20)) for prompt in PROMPTS[:2]]
    with held(model, monkeypatch) as core, ThreadPoolExecutor(3) as pool:
        first = pool.submit(model.answer, PROMPTS[0], max_new_tokens=20)
        until(lambda: core.running == 1)
        second = pool.submit(model.answer, PROMPTS[1], max_new_tokens=20)
        until(lambda: len(model._engine._open) == 2)  # type: ignore[union-attr]
        closing = pool.submit(model.close)
        until(lambda: model._closed)
        refused(lambda: model.answer("hi"), InputError, "closed")
        core.go_on.set()
        assert [told(each.result()) for each in (first, second)] == expected
        closing.result()
    refused(lambda: model.answer("hi"), InputError, "closed")
