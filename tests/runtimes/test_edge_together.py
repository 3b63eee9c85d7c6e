"""Laws of several answers at once without PyTorch: each is what it is alone."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_cases import drafting, refused
from hub_files import image_adapter, sliced, text_adapter
from PIL import Image
from projector_files import write_projector

from offramp.errors import InputError
from offramp.runtimes.edge.model import Answer, EdgeModel
from offramp.runtimes.edge.rounds import Job
from offramp.runtimes.edge.sampling import Sampling
from offramp.runtimes.edge.server import EdgeServer
from offramp.runtimes.llama_cpp.segment import EngineOptions

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
        assert each._chain.sizes.shared
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


@pytest.mark.parametrize("mode", MODES)
def test_calls_are_shared(mode: str, model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(model, monkeypatch)

    def ask(model: EdgeModel) -> Answer:
        return model.answer("the dog ran", mode=mode, max_new_tokens=24)

    alone = ask(model)
    once = len(calls)
    calls.clear()
    held = threading.Event()
    model._rounds._thread.submit(held.wait)  # until all have come
    with ThreadPoolExecutor(SLOTS) as pool:
        answers = [pool.submit(ask, model) for _ in range(SLOTS)]
        while len(model._rounds._queue) < SLOTS:
            time.sleep(0.001)
        held.set()
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
    assert not model._rounds._sequences


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seated", [False, True])
def test_a_client_that_hangs_up_is_written_for_no_more(
    seated: bool, stream: bool, model: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not it would have been told anything on the way."""
    rounds, held, made = model._rounds, threading.Event(), list[Any]()
    job_of, call = model._job, rounds._call

    def noted(*asked: Any) -> Any:
        made.append(job_of(*asked))
        return made[-1]

    def waiting() -> None:
        assert held.wait(60)
        call()

    def until(true: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not true():
            assert time.monotonic() < end
            time.sleep(0.005)

    monkeypatch.setattr(model, "_job", noted)
    if seated:
        monkeypatch.setattr(rounds, "_call", waiting)
    else:
        rounds._thread.submit(held.wait)
    body = json.dumps({"prompt": "a", "max_tokens": 100, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    with EdgeServer(model, "127.0.0.1", 0, name="tiny", page=b"") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with socket.create_connection(("127.0.0.1", server.server_address[1])) as peer:
                peer.sendall(head.encode() + b"\r\n\r\n" + body)
                until(lambda: bool(rounds._sequences if seated else rounds._queue))
                time.sleep(0.4)
                assert not made[0].unwanted  # it waits, silently
            until(lambda: bool(made[0].unwanted))
        finally:
            held.set()
        until(lambda: not rounds._at_work)
        assert len(made[0].tokens) <= 3 * model.policy.max_draft
        server.shutdown()


def test_it_is_asked_whether_anybody_waits_while_tokens_come() -> None:
    """A whole answer is told to nobody, and its parts come all the same."""
    nothing: Any = None
    job, over = Job(nothing, nothing, nothing, nothing), threading.Event()
    threading.Timer(5, over.set).start()

    def write() -> None:
        while not over.wait(0.01):
            job.tell("a")
        job.end()

    threading.Thread(target=write).start()
    try:
        with pytest.raises(CancelledError):
            job.wait(None, lambda: True)
    finally:
        over.set()


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
    choose = "offramp.runtimes.edge.sampling.Sampler.choose"

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
        patch.setattr(model._rounds, "_call", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.answer(PROMPTS[0], max_new_tokens=8)
    assert told(model.answer(PROMPTS[0], max_new_tokens=8)) == expected


def test_closing_finishes_what_is_written_and_refuses_the_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EdgeModel(folder, engine=replace(ENGINE, sequences=1))
    expected = told(model.answer(PROMPTS[0], max_new_tokens=20))
    begun, go_on, call = threading.Event(), threading.Event(), model._rounds._call

    def held() -> None:
        begun.set()
        assert go_on.wait(60)
        call()

    monkeypatch.setattr(model._rounds, "_call", held)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(model.answer, PROMPTS[0], max_new_tokens=20)
        assert begun.wait(60)
        second = pool.submit(model.answer, PROMPTS[1], max_new_tokens=20)
        while not model._rounds._queue:
            time.sleep(0.001)
        closing = pool.submit(model.close)
        while not model._rounds._closed:
            time.sleep(0.001)
        go_on.set()
        assert told(first.result()) == expected
        refused(second.result, InputError, "closed")
        closing.result()
    refused(lambda: model.answer("hi"), InputError, "closed")


def test_the_server_answers_at_once_what_it_answers_alone(folder: Path) -> None:
    """In a process that loads no PyTorch; every client's text is what a lone one's is."""
    code = f"""
import json, sys, threading, urllib.request
from concurrent.futures import CancelledError, ThreadPoolExecutor
from offramp.runtimes.edge.model import EdgeModel
from offramp.runtimes.edge.server import EdgeServer
from offramp.runtimes.llama_cpp.segment import EngineOptions
model = EdgeModel({str(folder)!r}, engine=EngineOptions(context=128, sequences={SLOTS}))
with model, EdgeServer(model, "127.0.0.1", 0, name="tiny", page=b"") as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{{server.server_address[1]}}/v1/completions"
    def ask(i):
        body = {{"prompt": "ab" * (i + 1), "max_tokens": 9 + i, "temperature": i % 2, "seed": i,
                "offramp": {{"mode": ("full", "early_exit", "lossless")[i % 3]}}}}
        request = urllib.request.Request(url, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())["choices"]
    alone = [*map(ask, range(12))]
    with ThreadPoolExecutor(12) as pool:
        print([*pool.map(ask, range(12))] == alone)
    server.shutdown()
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True", "[]"], done.stderr
