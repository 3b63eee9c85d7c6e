"""Laws of the server without PyTorch: the one application, over sliced files."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gguf_cases import refused
from hostile import LINES, check_hostile, check_line
from hub_files import image_adapter, sliced, text_adapter
from PIL import Image
from projector_files import write_projector
from scans import scans

from offramp.core.errors import InputError
from offramp.promises.verdict import EXACT, NONE
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.run import listen
from offramp.serving.server.service import Service
from offramp_llama_cpp.edge.model import SLICED, EdgeModel
from offramp_llama_cpp.edge.sampling import Sampling
from offramp_llama_cpp.edge.served import EdgeServed
from offramp_llama_cpp.segment import EngineOptions
from serving import running

pytestmark = pytest.mark.llama_cpp

ENGINE = EngineOptions(context=128, cache="f32", flash_attention=False)
PROMPT, NEW = "the dog ran", 24
HI: Any = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def service_of(model: EdgeModel, **config: Any) -> Service:
    return Service(EdgeServed(model), ServerConfig(**{"name": "tiny", **config}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sliced(text_adapter(), tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[EdgeModel]:
    with EdgeModel(folder, engine=ENGINE) as each:
        yield each


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    """Of a model of its own: an engine that is started ends the one before."""
    with EdgeModel(folder, engine=ENGINE) as own:
        made = service_of(own)
        yield made
        made.close()


@pytest.fixture(scope="module")
def served(service: Service) -> Iterator[httpx.Client]:
    with running(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def said(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    return str(reply.json()["error"]["message"])


def picture_part(data: bytes, kind: str = "png") -> dict[str, Any]:
    url = f"data:image/{kind};base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def looking(data: bytes) -> dict[str, Any]:
    content = [picture_part(data), {"type": "text", "text": "it is"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4}


def saved(picture: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


# -- answers ---------------------------------------------------------------------------------------


def test_openais_client_is_answered(served: httpx.Client, model: EdgeModel) -> None:
    from openai import OpenAI

    address = str(served.base_url).rstrip("/")
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert [each.id for each in client.models.list()] == ["tiny"]
    asked: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 8}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"offramp": {"mode": "lossless"}},
    )
    parts = list(stream)
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    plain = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=5)
    assert whole.usage is not None and whole.usage.completion_tokens == 8
    assert parts[-1].usage is not None and parts[-1].usage.total_tokens > 8
    assert whole.choices[0].message.content == model.answer(HI, max_new_tokens=8).text
    assert text == model.answer(HI, max_new_tokens=8, mode="full").text
    assert plain.choices[0].text == model.answer(PROMPT, max_new_tokens=5).text


def test_a_request_gets_what_the_model_writes(served: httpx.Client, model: EdgeModel) -> None:
    """In each mode, sampled by a seed or not, several at once, and as token ids."""
    bodies: list[dict[str, Any]] = [
        {"offramp": {"mode": mode}, **how}
        for mode in ("full", "early_exit", "lossless")
        for how in ({}, {"temperature": 1.3, "top_p": 0.9, "seed": 5}, {"repetition_penalty": 1.7})
    ]
    replies = [
        served.post(TEXT, json={"prompt": PROMPT, "max_tokens": NEW, **body}) for body in bodies
    ]
    several = served.post(
        TEXT, json={"prompt": PROMPT, "max_tokens": 9, "n": 2, "temperature": 1, "seed": 3}
    )
    ids = served.post(TEXT, json={"prompt": model.vocabulary.tokens(PROMPT), "max_tokens": 9})
    for body, reply in zip(bodies, replies, strict=True):
        names = ("temperature", "top_p", "seed", "repetition_penalty")
        sampling = Sampling(**{name: body[name] for name in names if name in body})
        mode = body["offramp"]["mode"]
        expected = model.answer(PROMPT, mode=mode, max_new_tokens=NEW, sampling=sampling)
        found = reply.json()
        assert found["choices"][0]["text"] == expected.text
        assert found["choices"][0]["finish_reason"] == expected.finish
        about = found["usage"]["offramp"]
        assert about["mode"] == mode and about["mean_depth"] == expected.mean_depth
        verdict = about["verdict"]
        assert verdict["exact"] == (mode != "early_exit") and not verdict["promised"]
        told = (NONE, SLICED) if mode == "early_exit" else (EXACT, "")
        assert (verdict["says"], verdict["why"]) == told
    texts = [choice["text"] for choice in several.json()["choices"]]
    assert texts == [
        model.answer(PROMPT, max_new_tokens=9, sampling=Sampling(1.0, seed=seed)).text
        for seed in (3, 4)
    ]
    assert ids.json()["choices"][0]["text"] == model.answer(PROMPT, max_new_tokens=9).text


def test_options_of_the_api_are_obeyed(served: httpx.Client, service: Service) -> None:
    def text(**more: Any) -> Any:
        body = {"prompt": PROMPT, "max_tokens": NEW, "offramp": {"mode": "full"}, **more}
        reply = served.post(TEXT, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]

    plain = text()
    [stop] = [plain["text"][4:7]]
    stopped = text(stop=[stop])
    assert stopped["text"] == plain["text"][: plain["text"].find(stop)].rstrip()
    assert stopped["finish_reason"] == "stop"
    assert text(presence_penalty=2.0)["text"] != plain["text"]
    assert text(frequency_penalty=-2.0)["text"] != plain["text"]
    noted = text(logprobs=3)
    assert noted["text"] == plain["text"]
    rows = noted["logprobs"]
    assert len(rows["token_logprobs"]) == NEW and all(len(top) == 3 for top in rows["top_logprobs"])
    assert all(
        value == pytest.approx(max(top.values()))
        for value, top in zip(rows["token_logprobs"], rows["top_logprobs"], strict=True)
    )
    on = served.post(TEXT, json={"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True}).json()
    assert on["usage"]["completion_tokens"] == 60
    assert "response_format" in said(
        served.post(TEXT, json={"prompt": "a", "response_format": {"type": "json_object"}}), 400
    )


def test_tokens_cards_and_numbers(served: httpx.Client, model: EdgeModel) -> None:
    ids = model.vocabulary.tokens(PROMPT)
    found = served.post("/tokenize", json={"prompt": PROMPT}).json()
    assert (found["tokens"], found["max_model_len"]) == (ids, ENGINE.context)
    assert served.post("/detokenize", json={"tokens": ids[1:]}).json() == {"prompt": PROMPT}
    chat = served.post("/tokenize", json={"messages": HI}).json()
    assert chat["tokens"] == model.vocabulary.tokens(model.vocabulary.chat(HI))
    full = {"prompt": PROMPT, "max_tokens": 2, "offramp": {"mode": "full"}}
    assert served.post(TEXT, json=full).status_code == 200  # changes nothing of what is told
    [card] = served.get("/v1/models").json()["data"]
    assert card["root"] == model.name and card["input_modalities"] == ["text"]
    assert card["offramp"]["exits"] == [*model.files.depths]
    assert card["offramp"]["guarantee"] is None and card["offramp"]["chat_template"]
    numbers = served.get("/metrics").text
    assert 'offramp:generation_tokens_total{model_name="tiny"}' in numbers
    assert served.get("/health").json() == {"status": "ok"}
    assert served.get("/ready").json() == {"status": "ready"}
    assert "<html" in served.get("/").text and "ChatRequest" in served.get("/openapi.json").text


def test_a_request_of_no_given_length_gets_what_room_there_is(served: httpx.Client) -> None:
    full = {"offramp": {"mode": "full"}}
    for words, written in (("a" * 100, 28), ("a", 127)):
        found = served.post(TEXT, json={"prompt": words, **full}).json()
        assert found["usage"]["completion_tokens"] == written
    reply = served.post(TEXT, json={"prompt": "a" * 100, "max_tokens": 100})
    assert "lower max_completion_tokens" in said(reply, 400)
    reply = served.post(TEXT, json={"prompt": "a" * 200})
    assert "does not fit" in said(reply, 400)


def test_who_gives_no_seed_gets_one_of_its_own(served: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 2}
    texts = [served.post(TEXT, json=body).json()["choices"][0]["text"] for _ in range(4)]
    assert len(set(texts)) > 1


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ([1], "object"),
        ({}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "content"),
        ({"messages": HI, "temperature": "hot"}, "temperature"),
        ({"messages": HI, "n": 1000}, "n"),
        ({"messages": HI, "tools": [{}]}, "tools"),
        ({"messages": HI, "max_new_tokens": 9}, "max_new_tokens"),
        ({"messages": HI, "temperature": 10**400}, "temperature"),
        ({"messages": HI, "max_tokens": 10**9}, "context"),
        ({"messages": HI, "offramp": {"mode": "x"}}, "mode"),
        ({"messages": HI, "offramp": {"mode": "full", "depth": 1}}, "depth"),
        ({"messages": HI, "offramp": {"thresholds": {"3": 0.5}}}, "[3]"),
        ({"messages": [{"role": "user", "content": "a <__media__> b"}]}, "<__media__>"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "Unicode"),
        ({"messages": [{"role": "pilot", "content": "hi"}]}, "role"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}
                        ],
                    }
                ]
            },
            "sees no images",
        ),
    ],
)
def test_bad_requests_are_refused_by_name(body: Any, word: str, served: httpx.Client) -> None:
    reply = served.post(
        CHAT, content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert word in said(reply, 400)


def test_pages_of_other_sites_are_refused(served: httpx.Client) -> None:
    """Those that post a form, which a browser asks no leave for, and those that ask for leave."""
    body = json.dumps({"prompt": "a", "max_tokens": 2})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"Content-Type": kind, "Origin": "https://evil.example"}
        reply = served.post(TEXT, content=body, headers=headers)
        assert "application/json" in said(reply, 400)
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    asked = served.options(TEXT, headers=headers)
    assert "access-control-allow-origin" not in asked.headers


def test_a_key_is_asked_for(model: EdgeModel) -> None:
    with running(service_of(model, keys=("secret",), hosts=("localhost",))) as address:
        stranger = {"Host": "evil.example", "Authorization": "Bearer secret"}
        assert httpx.get(f"{address}/v1/models", headers=stranger).status_code == 421
        assert httpx.get(f"{address}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200


def test_addresses_that_nobody_can_listen_at_are_two_lines(folder: Path, run: Any) -> None:
    refused(lambda: listen("a" * 70, 0), InputError, "a" * 70)
    code, _, err = run("serve", folder, "--port", "99999")
    assert code != 0 and len(err.strip().splitlines()) == 2 and "65535" in err


@pytest.mark.parametrize("name", LINES)
def test_what_is_hostile_below_http_is_answered_too(name: str, model: EdgeModel) -> None:
    service = service_of(model, body_seconds=0.5, body=100_000)
    with running(service) as address:
        host, port = address.removeprefix("http://").split(":")
        check_line(name, (host, int(port)))


def test_a_connection_beyond_the_bound_takes_the_place_of_one_that_asks_nothing(
    model: EdgeModel,
) -> None:
    with running(service_of(model, connections=8)) as address:
        port = int(address.rpartition(":")[2])
        lines = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(24)]
        try:
            assert httpx.get(f"{address}/ready", timeout=60).is_success
            assert b"too_many_connections" in lines[0].recv(65536)
        finally:
            for line in lines:
                line.close()


# -- pictures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeModel]:
    adapter, folder = image_adapter(), tmp_path_factory.mktemp("seeing")
    mmproj = write_projector(adapter.backbone, folder / "mmproj.gguf")
    with EdgeModel(sliced(adapter, folder), mmproj=mmproj, engine=ENGINE) as each:
        yield each


@pytest.fixture(scope="module")
def sees(seeing: EdgeModel) -> Iterator[Service]:
    made = service_of(seeing, queue=100)
    yield made
    made.close()


@pytest.fixture(scope="module")
def pictures(sees: Service) -> Iterator[httpx.Client]:
    with running(sees) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def noise(shape: tuple[int, ...], top: int = 256) -> Any:
    return np.random.default_rng(3).integers(0, top, shape)


def over_white(pixels: Any) -> Image.Image:
    share = pixels[..., 3:] / 255
    return Image.fromarray((pixels[..., :3] * share + 255 * (1 - share)).round().astype(np.uint8))


DEEP = noise((28, 28), 2**16).astype(np.uint16)
CLEAR = noise((28, 28, 4)).astype(np.uint8)
CLEAR[..., 3] = CLEAR[..., 3] // 128 * 255
PLAIN = Image.fromarray(noise((28, 28, 3)).astype(np.uint8))
ALIKE = {
    "of 16 bits": (
        saved(Image.fromarray(DEEP)),
        saved(Image.fromarray(((DEEP.astype(int) + 128) // 257).astype(np.uint8)).convert("RGB")),
    ),
    "transparent": (saved(Image.fromarray(CLEAR)), saved(over_white(CLEAR))),
    "turned": (
        saved(
            PLAIN, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
        ),
        saved(PLAIN.transpose(Image.Transpose.ROTATE_270)),
    ),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_a_picture_is_seen_as_pytorch_sees_it(kind: str, sees: Service) -> None:
    """The states that enter the decoder are those of the plain picture that it means."""
    states = [
        sees.served.prompts.of_text(
            sees.served.prompts.placed("it is", 1), [sees.images.decode(data)]
        )["prompt"].states
        for data in ALIKE[kind]
    ]
    assert np.array_equal(*states)
    other = sees.served.prompts.of_text("<__media__>it is", [Image.new("RGB", (28, 28))])
    assert not np.array_equal(states[0], other["prompt"].states)


def test_pictures_of_requests_are_answered(pictures: httpx.Client, seeing: EdgeModel) -> None:
    reply = pictures.post(CHAT, json=looking(saved(PLAIN)))
    assert reply.status_code == 200, reply.text
    other = pictures.post(CHAT, json=looking(saved(Image.new("RGB", (28, 28)))))
    assert reply.json()["usage"]["prompt_tokens"] == other.json()["usage"]["prompt_tokens"]
    [card] = pictures.get("/v1/models").json()["data"]
    assert card["input_modalities"] == ["text", "image"]


def test_a_picture_that_costs_more_than_it_shows_is_refused(pictures: httpx.Client) -> None:
    """Thousands of scans, and a header of more pixels than are decoded."""
    begun = time.process_time()
    assert "scans" in said(pictures.post(CHAT, json=looking(scans(10_000))), 400)
    large = saved(Image.new("1", (20_000, 20_000)))
    assert "pixels" in said(pictures.post(CHAT, json=looking(large)), 413)
    assert time.process_time() - begun < 20.0


def test_a_strangers_file_starts_no_program(
    pictures: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow reads EPS by Ghostscript, and other formats by readers that nobody needs here."""

    def started(*_: Any, **__: Any) -> Any:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(os, "system", started)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for data in (eps, saved(PLAIN, "TIFF"), saved(PLAIN, "PPM"), b"%PDF-1.4"):
        assert "known formats" in said(pictures.post(CHAT, json=looking(data)), 400)


@pytest.mark.slow
def test_every_hostile_request_gets_an_error_object(sees: Service) -> None:
    check_hostile(sees, may_answer=True)


# -- company, and the end --------------------------------------------------------------------------


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_written_for_no_more(
    stream: bool, model: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(model)
    core = service.engine.core
    monkeypatch.setattr(core, "clock", lambda: time.sleep(0.01) or time.perf_counter())  # slow
    body = json.dumps({"prompt": "a", "max_tokens": 100, "stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(service) as address:
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: core.running == 1)
        until(lambda: core.idle and service.under_way == 0)
        assert core.tokens == 0  # no answer came to its end


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_that_nobody_foresaw_is_said_and_logged(
    stream: bool, model: EdgeModel, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    service = service_of(model)
    body = {"prompt": "a", "max_tokens": 3, "stream": stream}
    with running(service) as address:
        with monkeypatch.context() as patch:
            patch.setattr(service.engine.core, "_advance", lambda: 1 / 0)
            reply = httpx.post(address + TEXT, json=body, timeout=60)
            assert "ZeroDivisionError" in reply.text and "server_error" in reply.text
            assert "division by" not in reply.text
        assert "ZeroDivisionError: division by zero" in caplog.text
        assert httpx.post(address + TEXT, json=body, timeout=60).status_code == 200


SERVE = """
import sys
from offramp.cli import main
code = main(sys.argv[1:])
print(code, sorted({"torch", "transformers", "huggingface_hub"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_the_command_serves_several_until_sigterm_and_loads_no_torch(folder: Path) -> None:
    """Answers at once are those that are given alone; one under way at the end comes whole."""
    words = ["serve", str(folder), "--port", "0", "--context", "900", "--slots", "4", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["url"]

        def ask(number: int) -> Any:
            body = {
                "prompt": "ab" * (number + 1),
                "max_tokens": 9 + number,
                "temperature": number % 2,
                "seed": number,
                "offramp": {"mode": ("full", "early_exit", "lossless")[number % 3]},
            }
            choices = httpx.post(address + TEXT, json=body, timeout=60).json()["choices"]
            return [(c["text"], c["finish_reason"], c["offramp"]["depths"]) for c in choices]

        alone = [*map(ask, range(12))]
        with ThreadPoolExecutor(12) as pool:
            assert [*pool.map(ask, range(12))] == alone
        long = {"prompt": "a", "max_tokens": 800, "ignore_eos": True, "stream": True}
        begun, lines = threading.Event(), list[str]()

        def listen_on() -> None:
            with httpx.stream("POST", address + TEXT, json=long, timeout=60) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    begun.set()

        thread = threading.Thread(target=listen_on)
        thread.start()
        assert begun.wait(60)
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and rest.splitlines()[-1] == "0 []"
        rows = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert rows[-1]["choices"][0]["finish_reason"] == "length" and "data: [DONE]" in lines
    finally:
        process.kill()
        process.wait()
