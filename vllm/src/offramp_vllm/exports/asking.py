"""A server of vLLM's that `offramp calibrate NAME --engine vllm` starts, asks and ends.

What is calibrated so is guaranteed of vLLM's own answers: of its kernels, its vision tower and its
chat template. Thresholds are searched, as vLLM takes no drafts unverified.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import re
import secrets
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from offramp.adapter.answers import Answer
from offramp.cli.output import tell
from offramp.core.decoding.policy import Thresholds
from offramp.core.errors import InputError
from offramp.features.input_processor import turn_of
from offramp_vllm.exports import serving
from offramp_vllm.exports.exporters import template_options
from offramp_vllm.exports.vllm import PROMPTS
from offramp_vllm.tell import SERVED_BY

MODEL, AT_ONCE = "offramp", 8
SCORE = "max_probability"
"""The score that a server tells: the probability of the token that was said."""


@contextmanager
def asks(opened: Any, arguments: argparse.Namespace) -> Iterator[Served]:
    """Start a server of an opened adapter, and end it.

    Raises:
        InputError: vLLM is not installed, cannot run the exits, or did not start; thresholds of a
            kind that it does not tell.
    """
    score = arguments.score or opened.adapter.policy.score
    if score != SCORE or arguments.first_threshold is not None:
        raise InputError(
            f"In vLLM one threshold of {SCORE} is calibrated, for all exits.",
            "Leave --first-threshold out, and --score, or calibrate in another engine.",
        )
    python = serving.python_with_vllm()
    model = serving.checked_model(opened, python)
    with tempfile.TemporaryDirectory(prefix="offramp-vllm-") as folder:
        exits, key, port = Path(folder) / "exits", secrets.token_hex(), _free_port()
        _export(opened, exits)
        settings = {
            **serving.model_settings(opened, arguments.context),
            **template_options(opened, exits),
            "model": model,
            "host": "127.0.0.1",
            "port": port,
            "served-model-name": MODEL,
            "api-key": [key],
            "max-num-seqs": AT_ONCE,
            "additional-config": json.dumps({"offramp": {"exits": str(exits)}}),
        }
        command, environment = serving.server_of(python, settings, Path(folder) / "server.yaml")
        log = Path(folder) / "log"
        tell("vLLM starts, to be calibrated in.")
        with log.open("wb") as told:
            process = subprocess.Popen(
                command, env=environment, stdout=told, stderr=subprocess.STDOUT
            )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            served = Served(opened, f"http://127.0.0.1:{port}", key)
            served.check()
            yield served
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _export(opened: Any, folder: Path) -> None:
    """Write the exits. Requests bring thresholds, and the exits may have none yet."""
    adapter = opened.adapter
    never = Thresholds.shared(adapter.exits.depths, 1.0)
    policy = replace(
        adapter.policy, thresholds=adapter.policy.thresholds or never, lossless=False, trust=None
    )
    serving.write_exits(adapter.with_policy(policy), opened.encoder, folder)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Wait until a server answers. Raise `InputError` where its process ends before."""
    while process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise InputError(
        f"vLLM did not start: {' | '.join(lines[-3:])}",
        "Start it by hand and read what it says: offramp serve NAME --engine vllm.",
    )


@dataclass(frozen=True)
class Served:
    """An opened adapter in vLLM. url: of the server."""

    opened: Any
    url: str
    key: str
    name: str = SERVED_BY
    rows: int = AT_ONCE

    def check(self) -> None:
        """Raise `InputError` where the check at start switched the exits off: every answer would be
        the full model's, and any threshold would pass."""
        ids = self.opened.encoder.tokenizer(PROMPTS[0])["input_ids"]
        self._post("completions", {"model": MODEL, "prompt": ids, "max_tokens": 1})
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as reply:
            told = re.search(r"^offramp:checked\{(.*)\} (.*)$", reply.read().decode(), re.MULTILINE)
        if told is None or float(told[2]) != 1.0:
            raise InputError(
                "vLLM switched the exits off as it started"
                + (f" ({told[1]})." if told else ", or does not say whether it did."),
                "Start it by hand and read what it says: offramp serve NAME --engine vllm.",
            )

    def answers(
        self, examples: Sequence[Any], policy: Any, *, max_new_tokens: int, progress: Any = iter
    ) -> list[Any]:
        """Return vLLM's `Answer` to each example: of the full model by `FULL`, or early at the one
        threshold of a policy.

        Raises:
            InputError: vLLM refuses a request, or reads another prompt than offramp does.
        """
        thresholds = {*policy.thresholds.values()}
        how = {"offramp_threshold": max(thresholds)} if thresholds else {"offramp_mode": "full"}
        asked = {
            "model": MODEL,
            "temperature": 0,
            "max_tokens": max_new_tokens,
            "return_token_ids": True,
            "vllm_xargs": how,
        }
        found: list[Any] = []
        with ThreadPoolExecutor(self.rows) as pool:
            for start in progress(range(0, len(examples), self.rows)):
                some = examples[start : start + self.rows]
                found += pool.map(lambda example: self._answer(example, asked), some)
        return found

    def _answer(self, example: Any, asked: dict[str, Any]) -> Any:
        encoder = self.opened.encoder
        ids = encoder.prompts([example])["input_ids"][0].tolist()
        if example.is_text:
            said = self._post("completions", {**asked, "prompt": ids, "logprobs": 0})
            [choice] = said["choices"]
            logs = choice["logprobs"]["token_logprobs"]
        else:
            said = self._chat(example, ids, asked)
            [choice] = said["choices"]
            logs = [one["logprob"] for one in choice["logprobs"]["content"]]
        tokens = tuple(choice["token_ids"])
        return Answer(
            tokens,
            encoder.texts(torch.tensor([tokens]))[0],
            tuple(choice["offramp"]["depths"]),
            tuple(map(math.exp, logs)),
        )

    def _chat(self, example: Any, ids: Sequence[int], asked: dict[str, Any]) -> Any:
        """What vLLM says about an image. ids: of the prompt that offramp reads, as vLLM must."""
        turn = turn_of("user", example.prompt)
        turn["content"].insert(0, self._picture(example))
        said = self._post("chat/completions", {**asked, "messages": [turn], "logprobs": True})
        read = said["prompt_token_ids"]
        if self._without_images(read) == self._without_images(ids):
            return said
        raise InputError(
            f"vLLM's chat template makes another prompt of {example.prompt!r} than offramp reads: "
            f"it ends in {read[-8:]}, and not in {ids[-8:]}.",
            "Give prompts as the model's template has them, or calibrate in another engine.",
        )

    def _picture(self, example: Any) -> dict[str, Any]:
        buffer = io.BytesIO()
        example.open_image(self.opened.encoder.smallest_side).save(buffer, "PNG")
        code = base64.b64encode(buffer.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{code}"}}

    def _without_images(self, ids: Sequence[int]) -> list[int]:
        config = self.opened.adapter.backbone.model.config
        image = {getattr(config, name, None) for name in ("image_token_id", "image_token_index")}
        return [one for one in ids if one not in image]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(
            f"{self.url}/v1/{path}", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            raise InputError(
                f"vLLM refused a request: {told[:300]}", "Calibrate with other prompts or options."
            ) from error
