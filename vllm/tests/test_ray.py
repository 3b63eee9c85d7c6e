"""What deploy/vllm has for Ray, run on one machine where Ray is installed: a folder of images by
Ray Data LLM, and chats by Ray Serve LLM."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import stored
from test_server import about, ask

ray = pytest.importorskip("ray")
HERE = Path(__file__).parent
DEPLOY = HERE.parents[1] / "deploy" / "vllm"
MINUTES = 15


@pytest.fixture(scope="module")
def model(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny OPT with a chat template."""
    folder = tmp_path_factory.mktemp("ray") / "model"
    shutil.copytree(made("tiny-opt") / "model", folder)
    shutil.copy(HERE / "plain.jinja", folder / "chat_template.jinja")
    return folder


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of a program that joins a cluster of four processors, however many there are."""
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "RAY_AUTH_MODE": "disabled"}
    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    ray.init("local", num_cpus=4, include_dashboard=False)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    yield {**os.environ, "PATH": path, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    ray.shutdown()


def test_a_folder_of_images_is_answered_as_offramp_does(
    environment: dict[str, str], model: Path, made: Any, tmp_path: Path
) -> None:
    folder = made("tiny-opt")
    places = [p for p, row in enumerate(stored(folder)) if row["prompt"] == "Caption:"]
    for place in places:
        shutil.copy(folder / "images" / f"{place}.png", tmp_path)
    words = [DEPLOY / "ray_data.py", model, folder / "export", tmp_path, tmp_path / "out"]
    subprocess.run([sys.executable, *map(str, words), "Caption:"], check=True, env=environment)
    lines = [line for file in (tmp_path / "out").iterdir() for line in file.open()]
    told = {Path(row["path"]).name: row["tokens"] for row in map(json.loads, lines)}
    assert told == {f"{place}.png": stored(folder)[place]["tokens"] for place in places}


def test_chats_by_ray_serve_are_offramps_and_tell_depths(
    environment: dict[str, str], model: Path, made: Any, tmp_path: Path
) -> None:
    folder = made("tiny-opt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (DEPLOY / "ray-serve.yaml").read_text()
    for old, new in (("MODEL", model), ("EXITS", folder / "export"), ("8000", port)):
        text = text.replace(str(old), str(new))
    (tmp_path / "mine.yaml").write_text(text)
    process = subprocess.Popen(["serve", "run", str(tmp_path / "mine.yaml")], env=environment)
    base = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{base}/v1/models", process)
        for place, row in enumerate(stored(folder)[:6]):
            got = ask(base, "/v1/chat/completions", {**about(folder, place, row), "model": "model"})
            assert got["choices"][0]["token_ids"] == row["tokens"]
            assert got["choices"][0]["offramp"]["depths"] == row["depths"]
    finally:
        process.terminate()
        process.wait(120)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(MINUTES * 60):
        assert process.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(url)
