"""A server with exits, over HTTP: answers, depths, metrics, and a request that is refused."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine import stored
from test_exactness import other_tokens, tampered

MINUTES = 20


@pytest.fixture(scope="module", params=["1", "2"], ids=["alone", "tensor parallel"])
def server(made: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    folder = made("tiny-opt")
    with serving(folder, folder / "export", "--tensor-parallel-size", request.param) as base:
        yield base


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(folder: Path, exits: Path, *more: str) -> Iterator[str]:
    """The address of a server of a folder's model."""
    port = free_port()
    added = json.dumps({"offramp": {"exits": str(exits)}})
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder / "model"),
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
        "--served-model-name",
        "tiny",
        "--additional-config",
        added,
        "--chat-template",
        str(Path(__file__).parent / "plain.jinja"),
        *more,
    ]
    env = {**os.environ, "VLLM_TARGET_DEVICE": "cpu"}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    process = subprocess.Popen(command, env=env)
    try:
        yield ready(process, port)
    finally:
        process.terminate()
        process.wait(60)


def ready(process: subprocess.Popen[bytes], port: int) -> str:
    """The address of a server, once it answers."""
    base = f"http://127.0.0.1:{port}"
    for _ in range(MINUTES * 60):
        assert process.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(f"{base}/health", timeout=5)
            break
        except OSError:
            time.sleep(1)
    return base


def ask(base: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{base}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def about(folder: Path, place: int, row: dict[str, Any], **more: Any) -> dict[str, Any]:
    picture = base64.b64encode((folder / "images" / f"{place}.png").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": row["prompt"]},
    ]
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 30,
        "return_token_ids": True,
        "add_special_tokens": True,
        **more,  # as the exits' prompts begin
    }


def test_a_server_answers_as_offramp_and_tells_depths(server: str, made: Any) -> None:
    folder = made("tiny-opt")
    for mode, extra in (("early_exit", {}), ("full", {"vllm_xargs": {"offramp_mode": "full"}})):
        for place, row in enumerate(stored(folder, mode)[:6]):
            got = ask(server, "/v1/chat/completions", about(folder, place, row, **extra))
            assert got["choices"][0]["token_ids"] == row["tokens"]
            assert got["choices"][0]["offramp"]["depths"] == row["depths"]
    text = metrics(server)
    assert 'offramp:tokens_total{depth="2"}' in text
    assert 'offramp:tokens_total{depth="12"}' in text
    assert gauge(text, "checked") == [("", 1.0)]
    [(reason, stands)] = gauge(text, "guarantee")
    assert reason == "calibrated with engine torch, and here it is vllm" and stands == 0.0


def metrics(base: str) -> str:
    with urllib.request.urlopen(f"{base}/metrics") as answer:
        return str(answer.read().decode())


def gauge(text: str, name: str) -> list[tuple[str, float]]:
    """Reason and value of each of a gauge's rows."""
    rows = re.findall(rf'^offramp:{name}{{.*reason="([^"]*)".*}} (.*)$', text, re.MULTILINE)
    return [(reason, float(value)) for reason, value in rows]


def test_what_is_calibrated_in_vllm_is_guaranteed_there(made: Any, tmp_path: Path) -> None:
    folder, out = made("tiny-opt"), tmp_path / "calibrated"
    offramp = [os.environ["OFFRAMP_PYTHON"], "-m", "offramp"]
    env = {**os.environ, "OFFRAMP_VLLM_PYTHON": sys.executable, "XDG_CACHE_HOME": str(tmp_path)}
    asked = f"calibrate tiny-opt --engine vllm --data {folder / 'images'} --prompt Caption:"
    how = f"--target 0.4 --thresholds 0.9 0.5 --max-new-tokens 16 --out {out}"
    subprocess.run([*offramp, *asked.split(), *how.split()], check=True, env=env)
    port = free_port()
    served = f"serve {out} --engine vllm --mode early_exit --port {port}"
    process = subprocess.Popen([*offramp, *served.split()], env=env)
    try:
        text = metrics(ready(process, port))
    finally:
        process.terminate()
        process.wait(60)
    assert gauge(text, "guarantee") == [("", 1.0)]


def test_a_server_with_other_answers_than_the_stored_ones_runs_at_full_depth(
    made: Any, tmp_path: Path
) -> None:
    folder = made("tiny-opt")
    exits = tampered(folder / "export", other_tokens, tmp_path / "export")
    with serving(folder, exits) as base:
        row = stored(folder, "full")[0]
        got = ask(base, "/v1/chat/completions", about(folder, 0, row))
        assert got["choices"][0]["token_ids"] == row["tokens"]
        assert {*got["choices"][0]["offramp"]["depths"]} == {12}
        assert gauge(metrics(base), "checked") == [("answers differ from the stored ones", 0.0)]


def test_two_servers_behind_one_address_answer_as_one(made: Any) -> None:
    folder = made("tiny-opt")
    with serving(folder, folder / "export", "--data-parallel-size", "2") as base:
        for place, row in enumerate(stored(folder)[:8]):
            got = ask(base, "/v1/chat/completions", about(folder, place, row))
            assert got["choices"][0]["token_ids"] == row["tokens"]
            assert got["choices"][0]["offramp"]["depths"] == row["depths"]


def test_each_choice_tells_its_depths(server: str, made: Any) -> None:
    folder = made("tiny-opt")
    row = stored(folder)[0]
    more = {"n": 3, "temperature": 1.0, "seed": 1}
    got = ask(server, "/v1/chat/completions", about(folder, 0, row, **more))
    assert "kv_transfer_params" not in got or got["kv_transfer_params"] is None
    told = [(len(one["token_ids"]), len(one["offramp"]["depths"])) for one in got["choices"]]
    assert len(told) == 3 and all(tokens == depths for tokens, depths in told)
    asked = {"model": "tiny", "prompt": "Caption:", "max_tokens": 5, "temperature": 0}
    got = ask(server, "/v1/completions", asked)
    assert len(got["choices"][0]["offramp"]["depths"]) == got["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    "extra",
    [
        {"offramp_treshold": 0.9},
        {"offramp_threshold": True},
        {"offramp_mode": "full", "offramp_threshold": 0.9},
    ],
)
def test_settings_that_say_nothing_are_bad_requests(
    extra: dict[str, Any], server: str, made: Any
) -> None:
    folder = made("tiny-opt")
    asked = about(folder, 0, stored(folder)[0], vllm_xargs=extra)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, "/v1/chat/completions", asked)
    assert refused.value.code == 400


def test_what_a_server_has_not_is_a_bad_request(server: str, made: Any) -> None:
    folder = made("tiny-opt")
    row = stored(folder)[0]
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(
            server,
            "/v1/chat/completions",
            about(folder, 0, row, vllm_xargs={"offramp_mode": "lossless"}),
        )
    assert refused.value.code == 400 and "drafts" in refused.value.read().decode()


def test_offramp_serve_becomes_a_server_that_drafts(tmp_path: Path) -> None:
    port = free_port()
    env = {**os.environ, "OFFRAMP_VLLM_PYTHON": sys.executable, "XDG_CACHE_HOME": str(tmp_path)}
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_PLUGINS"):
        env.pop(name, None)
    command = [os.environ["OFFRAMP_PYTHON"], "-m", "offramp.cli", "serve", "tiny-opt"]
    command += ["--engine", "vllm", "--port", str(port)]
    process = subprocess.Popen(command, env={**env, "VLLM_TARGET_DEVICE": "cpu"})
    try:
        base = ready(process, port)
        asked = {"model": "tiny-opt", "prompt": "Caption:", "max_tokens": 12, "temperature": 0}
        full = ask(base, "/v1/completions", asked | {"vllm_xargs": {"offramp_mode": "full"}})
        assert (
            ask(base, "/v1/completions", asked)["choices"][0]["text"] == full["choices"][0]["text"]
        )
        with urllib.request.urlopen(f"{base}/metrics") as page:
            told = page.read().decode()
        assert re.search(r"^offramp:checked\{.*\} 1\.0$", told, re.M)
        assert re.search(r"^vllm:spec_decode_num_accepted_tokens_total.* [1-9]", told, re.M)
    finally:
        process.terminate()
        process.wait(60)
