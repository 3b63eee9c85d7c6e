"""Laws of the runtime without PyTorch: it writes what the runtime in PyTorch writes."""

from __future__ import annotations

import base64
import io
import json
import logging
import shlex
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_cases import drafting, refused
from hub_files import WORDS, image_adapter, sliced, text_adapter
from PIL import Image
from projector_files import write_projector

from offramp.engine.policy import FULL
from offramp.errors import AdapterError, DataError, InputError
from offramp.runtimes.edge.images import _pixels
from offramp.runtimes.edge.model import EdgeModel
from offramp.runtimes.edge.sampling import Sampler, Sampling
from offramp.runtimes.edge.server import EdgeServer, read_request
from offramp.runtimes.edge.vocabulary import TextStream, Vocabulary
from offramp.runtimes.llama_cpp import LlamaCppRuntime
from offramp.runtimes.llama_cpp.gguf_header import read_header
from offramp.runtimes.llama_cpp.segment import EngineOptions

pytestmark = pytest.mark.llama_cpp

ENGINE = EngineOptions(context=128, cache="f32", flash_attention=False)
MODES = ("full", "early_exit", "lossless")
PROMPT, NEW = "the dog ran", 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sliced(text_adapter(), tmp_path_factory.mktemp("edge"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[EdgeModel]:
    with EdgeModel(folder, engine=ENGINE) as each:
        yield each


def test_words_are_the_files(model: EdgeModel) -> None:
    ids = model.vocabulary.tokens(PROMPT)
    assert [WORDS[i] for i in ids] == ["<s>", *PROMPT.replace(" ", "Ġ")]
    assert b"".join(map(model.vocabulary.piece, ids)) == PROMPT.encode()
    assert model.vocabulary.chat([{"role": "user", "content": "hi"}]) == "u:hi;a:"
    assert model.vocabulary.ends(2) and not model.vocabulary.ends(20)


@pytest.mark.parametrize("penalty", [1.0, 1.7])
@pytest.mark.parametrize("mode", MODES)
def test_it_writes_what_pytorch_does(mode: str, penalty: float, model: Any, folder: Path) -> None:
    adapter = text_adapter()
    ids = torch.tensor([model.vocabulary.tokens(PROMPT)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": penalty}
    with LlamaCppRuntime(adapter, folder, engine=ENGINE) as runtime:
        theirs = runtime.generate(inputs, mode=mode, **options)
    stock = adapter.generate(inputs, mode=mode, **options)
    sampling = Sampling(repetition_penalty=penalty)
    answer = model.answer(PROMPT, mode=mode, max_new_tokens=NEW, sampling=sampling)
    tokens, depths, scores = zip(*((s.token, s.depth, s.score) for s in answer.steps), strict=True)
    assert list(tokens) == theirs.new_tokens[0].tolist() == stock.new_tokens[0].tolist()
    assert list(depths) == theirs.depths[0].tolist()
    np.testing.assert_allclose(scores, theirs.scores[0].numpy(), atol=1e-4)
    assert mode == "full" or len(set(depths)) > 1


@pytest.mark.parametrize("own", ["early_exit", "lossless", "drafts alone"])
def test_who_names_no_mode_gets_the_policys_own(
    own: str, model: EdgeModel, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(**how: Any) -> Any:
        return model.answer(PROMPT, max_new_tokens=NEW, **how)

    full, early = (answer(mode=mode).text for mode in ("full", "early_exit"))
    exits = model.policy
    if own == "lossless":
        monkeypatch.setattr(model, "policy", replace(exits, lossless=True))
    elif own == "drafts alone":
        drafts = replace(exits, thresholds={}, drafts=exits.thresholds)
        monkeypatch.setattr(model, "policy", drafts)
    found = answer()
    assert found.text == (early if own == "early_exit" else full) and early != full
    assert found.mean_depth < model.layers
    body = {"prompt": PROMPT, "max_tokens": NEW}
    for more in ({}, {"offramp": {}}, {"offramp": {"mode": None}}):
        _, said = asked(f"{served}/v1/completions", {**body, **more})
        assert json.loads(said)["choices"][0]["text"] == found.text
    first, *others = answer(thresholds={2: 0.0}).steps
    assert first.depth == model.layers and {step.depth for step in others} == {2}


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_a_first_token_has_its_own_threshold_here_too(own: float, tmp_path: Path) -> None:
    adapter = text_adapter()
    first = dict.fromkeys(adapter.policy.thresholds, own)
    adapter = adapter.with_policy(replace(adapter.policy, exit_in_prefill=True, first=first))
    some = torch.tensor([[5, 6, 7]])
    adapter.generate({"input_ids": some}, max_new_tokens=1)  # shows that the prompt is causal
    with EdgeModel(sliced(adapter, tmp_path), engine=ENGINE) as model:
        ids = torch.tensor([model.vocabulary.tokens(PROMPT)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        theirs = adapter.generate(inputs, max_new_tokens=NEW, do_sample=False)
        answer = model.answer(PROMPT, mode="early_exit", max_new_tokens=NEW)
        assert [s.token for s in answer.steps] == theirs.new_tokens[0].tolist()
        assert [s.depth for s in answer.steps] == theirs.depths[0].tolist()
        earliest = min(adapter.policy.thresholds)
        assert answer.steps[0].depth == (earliest if own == 0.0 else adapter.backbone.depth)
        lossless = model.answer(PROMPT, mode="lossless", max_new_tokens=NEW)
        assert lossless.text == model.answer(PROMPT, mode="full", max_new_tokens=NEW).text


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_lossless_is_the_full_models_sample(temperature: float, model: EdgeModel) -> None:
    for seed in range(4):
        sampling = Sampling(temperature, top_p=0.95, top_k=40, seed=seed)
        full, lossless = (
            model.answer(PROMPT, mode=mode, max_new_tokens=NEW, sampling=sampling)
            for mode in ("full", "lossless")
        )
        assert full.text == lossless.text
        assert [s.token for s in full.steps] == [s.token for s in lossless.steps]
    if temperature:
        other = Sampling(temperature, seed=9)
        assert (
            model.answer(PROMPT, mode="full", sampling=other, max_new_tokens=NEW).text != full.text
        )


def test_tokens_are_drawn_as_likely_as_they_are() -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0, 0.5], dtype=np.float32)
    shares = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    counts = np.zeros(5)
    draws = 4000
    for seed in range(draws):
        sampler = Sampler(Sampling(0.8, seed=seed), 5)
        counts[sampler.choose(logits, None, [0] * 3)] += 1
    assert ((counts - draws * shares) ** 2 / (draws * shares)).sum() < 18.5  # 0.1% of chi-square, 4
    few = Sampler(Sampling(1.0, top_k=2, seed=1), 5)
    assert {few.choose(logits, None, [0] * place) for place in range(50)} == {0, 1}
    least = Sampler(Sampling(1.0, top_p=0.1), 5)
    assert {least.choose(logits, None, [0] * place) for place in range(20)} == {0}


def test_a_stop_string_ends_the_answer_wherever_tokens_end(model: EdgeModel) -> None:
    whole = model.answer(PROMPT, mode="full", max_new_tokens=NEW).text
    for start in range(1, len(whole) - 4, 3):
        stop = whole[start : start + 3]
        parts: list[str] = []
        found = model.answer(
            PROMPT, mode="full", max_new_tokens=NEW, stop=[stop], on_text=parts.append
        )
        assert found.text == whole[: whole.find(stop)] == "".join(parts)
        assert found.finish == "stop"


PARTS = """\
{% for message in messages %}{{ message['role'] | capitalize }}: {% for line in message.content %}
{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}<image>
{% endif %}{% endfor %};{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""
"""As SmolVLM's and Idefics3's."""
SELECTED = """\
{% for message in messages %}{{ message['role'].upper() + ':' }}
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}
{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endfor %}ASSISTANT:"""
"""As LLaVA's."""


def with_template(model: EdgeModel, template: str) -> Vocabulary:
    return Vocabulary(model.vocabulary._lib, model._segments[-1].model, template)


def test_a_template_of_parts_prints_what_is_asked(
    model: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short, and with images where they were."""
    chat = [{"role": "user", "content": "a"}]
    for template, alone, seen in (
        (PARTS, "User: a;Assistant:", "User: <__media__>a;Assistant:"),
        (SELECTED, "USER:\na ASSISTANT:", "USER:\n<__media__>a ASSISTANT:"),
    ):
        monkeypatch.setattr(model, "vocabulary", with_template(model, template))
        assert model._text(chat, ()) == alone
        assert model._text(chat, ("x.png",)) == seen
    nothing = with_template(model, "{% for message in messages %}{{ message['role'] }}{% endfor %}")
    refused(lambda: nothing.chat(chat), InputError, "prints nothing")


def test_a_template_of_texts_may_say_them_in_its_own_words(model: EdgeModel) -> None:
    """What it is seen to do to one text decides, not whether all are found again."""
    template = "{% for m in messages %}{{ m['content'].split('/')[-1] | trim }};{% endfor %}"
    chat = [{"role": role, "content": f"think/ {role}"} for role in ("user", "assistant", "user")]
    assert with_template(model, template).chat(chat) == "user;assistant;user;"


def test_templates_have_the_tags_that_transformers_gives_them(model: EdgeModel) -> None:
    template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{%- endgeneration -%}"
        "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
    )
    chat = [{"role": "user", "content": text} for text in "abc"]
    assert with_template(model, template).chat(chat) == "ab"


def test_streams_give_whole_letters() -> None:
    class Bytes:
        def piece(self, token: int) -> bytes:
            return bytes([token])

    stream = TextStream(Bytes())  # type: ignore[arg-type]
    given = [stream.add(byte) for byte in "hé€".encode()]
    assert given == ["h", "", "é", "", "", "€"] and stream.close() == "" and stream.text == "hé€"


def test_images_go_the_way_they_go_in_pytorch(tmp_path: Path) -> None:
    """Vision tower and projector by libmtmd; of an image that needs no resizing."""
    adapter = image_adapter()
    where = sliced(adapter, tmp_path)
    mmproj = write_projector(adapter.backbone, tmp_path / "mmproj.gguf")
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "dog.png")
    values = torch.from_numpy(pixels.transpose(2, 0, 1)[None] / 127.5 - 1).float()
    words = "it is a"
    with EdgeModel(where, mmproj=mmproj, engine=ENGINE) as each:
        ids = each.vocabulary.tokens(words)
        inputs = {
            "input_ids": torch.tensor([[ids[0], *[3] * 4, *ids[1:]]]),
            "attention_mask": torch.ones(1, len(ids) + 4, dtype=torch.long),
            "pixel_values": values,
        }
        prompt, _ = each._prompt("<__media__>" + words, [tmp_path / "dog.png"])
        features = adapter.backbone.model.get_image_features(pixel_values=values)
        features = getattr(features, "pooler_output", features)[0].detach().numpy()
        assert np.abs(prompt.states[1:5] - features).max() < 5e-3 * np.abs(features).max()
        for mode in MODES:
            ours = each.answer(words, [tmp_path / "dog.png"], mode=mode, max_new_tokens=12)
            theirs = adapter.generate(inputs, mode=mode, max_new_tokens=12, do_sample=False)
            assert [step.token for step in ours.steps] == theirs.new_tokens[0].tolist()
        refused(lambda: each.answer(words, [tmp_path / "no.png"]), DataError, "no.png")
        both = "<__media__> and <__media__>"
        refused(lambda: each.answer(both, [tmp_path / "dog.png"]), InputError, "2 images, and 1")
    refused(lambda: EdgeModel(where, mmproj=tmp_path / "no"), AdapterError, "is no file")


# -- what is refused -------------------------------------------------------------------------------


def test_mistakes_are_two_lines(model: EdgeModel, exported: Any) -> None:
    ask = model.answer
    refused(lambda: ask(PROMPT, ["dog.png"]), InputError, "--mmproj")
    refused(lambda: ask(PROMPT, max_new_tokens=0), InputError, "0 tokens")
    refused(lambda: ask(PROMPT, max_new_tokens=500), InputError, "context of 128")
    refused(lambda: ask(PROMPT, mode="quick"), InputError, "quick")
    refused(lambda: ask(PROMPT, thresholds={3: 0.5}), InputError, "[3]")
    refused(lambda: ask([{"role": "user"}]), InputError, "content")
    refused(lambda: ask("half \ud83d"), InputError, "surrogate")
    refused(lambda: ask([{"role": "user", "content": "\ud800"}]), InputError, "surrogate")
    for wrong in (
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"seed": -1},
    ):
        refused(lambda wrong=wrong: Sampling(**wrong), InputError, next(iter(wrong)))
    refused(lambda: EdgeModel(exported("llava"), engine=ENGINE), AdapterError, "no tokenizer")


def test_a_header_is_read_as_gguf_reads_it_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    for file in sorted(folder.glob("*.gguf")):
        reader, header = gguf.GGUFReader(file), read_header(file)
        for key, field in reader.fields.items():
            if not key.startswith("GGUF.") and len(field.data) <= 64:
                assert header.said[key] == pytest.approx(field.contents()), key
        for tensor in reader.tensors:
            place = header.tensors[tensor.name]
            assert place.at == tensor.data_offset and list(place.shape) == tensor.shape.tolist()
    data = file.read_bytes()
    for length in (0, 3, 4, 11, 24, 100, 1000, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"its |it |cut off"):
            read_header(tmp_path / "cut.gguf")


def test_a_damaged_image_is_two_lines(tmp_path: Path) -> None:
    """Decoders of damaged files raise nearly every builtin; of this one, `SyntaxError`."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    data = bytearray((tmp_path / "whole.png").read_bytes())
    second = data.find(b"IDAT", data.find(b"IDAT") + 4)
    data[second : second + 4] = bytes(range(4))
    (tmp_path / "damaged.png").write_bytes(data)
    refused(lambda: _pixels(tmp_path / "damaged.png"), DataError, "damaged.png")


def test_an_answer_of_no_given_length_is_as_long_as_there_is_room(model: EdgeModel) -> None:
    for written in (1, 29):
        prompt = "a" * (ENGINE.context - written)
        answer = model.answer(prompt, max_new_tokens=None)
        assert (answer.prompt_tokens, len(answer.steps)) == (len(prompt) + 1, written)
    refused(lambda: model.answer("a" * 128, max_new_tokens=None), InputError, "context of 128")


# -- without PyTorch -------------------------------------------------------------------------------


def test_commands_do_not_load_torch(folder: Path) -> None:
    code = (
        "import sys; from offramp.cli import main; "
        f"code = main(['generate', {str(folder)!r}, '--prompt', 'hi', '--max-new-tokens', '4', "
        "'--json']); print(code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer, last = done.stdout.splitlines()
    assert last == "0 []", done.stderr
    assert len(json.loads(answer)["steps"]) == 4


def test_the_command_that_slicing_names_answers(
    folder: Path, tmp_path: Path, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hub, exits = folder.parent / "hub.gguf", folder.parent / "adapter"
    with caplog.at_level(logging.INFO):
        code, _, err = run("slice", hub, "--adapter", exits, "--out", tmp_path / "cut")
    assert code == 0, err
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("next: ")]
    program, *words = shlex.split(said.removeprefix("next: "))
    code, out, err = run(*words, "--max-new-tokens", "3")
    assert (program, code) == ("offramp", 0) and out.strip(), err


def test_the_command_answers_in_the_policys_own_mode(tmp_path: Path, run: Any) -> None:
    folder = sliced(drafting(text_adapter()), tmp_path)
    words = ("generate", folder, "--plain", "--prompt", PROMPT, "--max-new-tokens", NEW, "--json")
    own, full, early = (
        [step["id"] for step in json.loads(run(*words, *more)[1])["steps"]]
        for more in ((), ("--mode", "full"), ("--mode", "early_exit"))
    )
    assert own == full != early


@pytest.fixture
def served(model: EdgeModel) -> Iterator[str]:
    with EdgeServer(model, "127.0.0.1", 0, name="tiny", page=b"<p>page</p>") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def asked(url: str, body: Any = None, host: str | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    if host is not None:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


def test_openais_client_is_answered(served: str, model: EdgeModel) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0)
    assert [each.id for each in client.models.list()] == ["tiny"]
    messages: Any = [{"role": "user", "content": "hi"}]
    expected = model.answer(messages, max_new_tokens=8)
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    assert whole.choices[0].message.content == expected.text
    assert whole.usage is not None and whole.usage.completion_tokens == 8
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, stream=True,
        stream_options={"include_usage": True}, extra_body={"offramp": {"mode": "lossless"}},
    )  # fmt: skip
    parts = list(stream)
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == model.answer(messages, max_new_tokens=8, mode="full").text
    assert parts[-1].usage is not None and parts[-1].usage.total_tokens > 8
    plain = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=5)
    assert plain.choices[0].text == model.answer(PROMPT, max_new_tokens=5).text


def test_bad_requests_are_refused(served: str) -> None:
    chat = f"{served}/v1/chat/completions"
    message = [{"role": "user", "content": "hi"}]
    for body, word in (
        ([1], "object"),
        ({}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "content"),
        ({"messages": message, "temperature": "hot"}, "temperature"),
        ({"messages": message, "n": 2}, "n is 1"),
        ({"messages": message, "tools": []}, "tools"),
        ({"messages": message, "max_tokens": 10**9}, "context"),
        ({"messages": message, "offramp": {"mode": "x"}}, "Mode"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}]}]}, "data:"),
    ):  # fmt: skip
        code, said = asked(chat, body)
        assert code == 400 and word in said, said
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    code, said = asked(chat, {"messages": [{"role": "user", "content": [part]}]})
    assert code == 400 and "projector" in said
    assert asked(f"{served}/nothing")[0] == 404
    assert asked(f"{served}/health", host="evil.example")[0] == 403
    assert asked(f"{served}/")[1] == b"<p>page</p>"
    assert asked(f"{served}/health") == (200, b'{"status": "ok"}')
    assert asked(f"{served}/ready") == (200, b'{"status": "ready"}')


def test_the_full_policy_is_the_full_model(model: EdgeModel) -> None:
    ids = torch.tensor([model.vocabulary.tokens(PROMPT)])
    stock = text_adapter().generate({"input_ids": ids}, policy=FULL, max_new_tokens=6)
    answer = model.answer(PROMPT, mode="full", max_new_tokens=6)
    assert [step.token for step in answer.steps] == stock.new_tokens[0].tolist()


# -- the server ------------------------------------------------------------------------------------


def sent(url: str, *parts: bytes) -> bytes:
    """What comes back until the server ends the connection, or says nothing for a second."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 1) as peer:
        for part in parts:
            peer.sendall(part)
        said = b""
        try:
            while more := peer.recv(65536):
                said += more
        except TimeoutError:
            said += b"(and waits)"
    return said


def request(path: str, body: bytes, *, verb: str = "POST", length: bytes | None = None) -> bytes:
    count = str(len(body)).encode() if length is None else length
    head = f"{verb} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    return head.encode() + count + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    "body",
    [
        rb'{"prompt": "a\ud800", "max_tokens": 3}',
        b'{"prompt": "a", "temperature": 1%s}' % (b"0" * 400),
        b'{"prompt": "a", "top_p": 1%s}' % (b"0" * 400),
        b'{"prompt": "a", "max_tokens": 1%s}' % (b"0" * 400),
        b'{"prompt": "a", "offramp": {"mode": [1]}}',
    ],
)
def test_odd_requests_are_refused(body: bytes, served: str) -> None:
    said = sent(served, request("/v1/completions", body))
    assert said.startswith(b"HTTP/1.1 400 ") and b"invalid_request_error" in said


@pytest.mark.parametrize("length", [b"\xb2", b"-1", b"9" * 5000, b"1e1", b""])
def test_odd_lengths_are_refused(length: bytes, served: str) -> None:
    said = sent(served, request("/v1/completions", b"", length=length))
    assert said.startswith(b"HTTP/1.1 400 ") and b"no length" in said


def test_a_body_that_was_not_read_is_no_request(served: str) -> None:
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for asked_for in (
        request("/v1/nothing", hidden),
        request("/nothing", hidden, verb="GET"),
        request("/health", hidden, verb="GET"),
    ):
        said = sent(served, asked_for)
        assert said.count(b"HTTP/1.1 ") == 1 and b"and waits" not in said
    kept = sent(served, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
    assert kept.count(b"HTTP/1.1 200") == 2


def test_a_request_whose_body_does_not_come_takes_no_place(model: EdgeModel) -> None:
    with EdgeServer(model, "127.0.0.1", 0, name="tiny", page=b"") as server:
        server.places = threading.BoundedSemaphore(1)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(request("/v1/completions", b"{", length=b"100"))
            url = f"http://127.0.0.1:{port}/v1/completions"
            for _ in range(3):
                assert asked(url, {"prompt": "a", "max_tokens": 2})[0] == 200
        server.shutdown()


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_that_nobody_foresaw_is_said_and_logged(
    stream: bool, model: EdgeModel, served: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    url, body = f"{served}/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": stream}

    def broken(*_: Any, on_text: Any = None, **__: Any) -> Any:
        raise ZeroDivisionError("secret")

    def begins(*_: Any, on_text: Any = None, **__: Any) -> Any:
        on_text("begun")
        raise ZeroDivisionError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(model, "answer", broken)
        code, said = asked(url, body)
        assert code == 500 and "secret" not in said
        if stream:
            patch.setattr(model, "answer", begins)
            code, data = asked(url, body)
            assert code == 200 and b"begun" in data and b"server_error" in data
            assert b"secret" not in data
    assert "ZeroDivisionError: secret" in caplog.text
    assert asked(url, body)[0] == 200


def test_who_gives_no_seed_gets_one_of_its_own() -> None:
    def seed(**more: Any) -> int:
        asked = read_request({"prompt": "a", **more}, chat=False)
        return int(asked.how["sampling"].seed)

    assert seed(seed=7) == seed(seed=7) == 7 and seed(seed=0) == 0
    assert len({seed(), seed(), seed(seed=None), seed(seed=None)}) == 4


def test_a_request_of_no_given_length_gets_what_room_there_is(served: str) -> None:
    url = f"{served}/v1/completions"
    for words, written in (("a" * 100, 28), ("a", 127)):
        code, said = asked(url, {"prompt": words, "offramp": {"mode": "full"}})
        assert code == 200
        assert json.loads(said)["usage"]["completion_tokens"] == written
    code, said = asked(url, {"prompt": "a" * 100, "max_tokens": 100})
    assert code == 400 and "lower max_tokens" in said
    code, said = asked(url, {"prompt": "a" * 100, "max_new_tokens": 100})
    assert code == 400 and "max_new_tokens" in said


def test_addresses_of_version_6_are_listened_at(model: EdgeModel) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no ::1")
    with EdgeServer(model, "::1", 0, name="tiny", page=b"") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert asked(f"http://[::1]:{server.server_address[1]}/health")[0] == 200
        assert server.knows("[::1]") and not server.knows("evil.example:80")
        server.shutdown()


def test_addresses_that_nobody_can_listen_at_are_two_lines(
    model: EdgeModel, folder: Path, run: Any
) -> None:
    for host, port in (("127.0.0.1", 99999), ("a" * 70, 0)):
        refused(
            lambda h=host, p=port: EdgeServer(model, h, p, name="tiny", page=b""), InputError, host
        )
    code, _, err = run("serve", folder, "--port", "99999")
    assert code != 0 and len(err.strip().splitlines()) == 2 and "65535" in err
