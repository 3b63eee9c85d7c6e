"""A server of vLLM's that `offramp calibrate NAME --engine vllm` starts, asks and ends.

What is calibrated so is guaranteed of vLLM's own answers: of its kernels, its vision tower and its
chat template.
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
from offramp.calibration.trust_path import trusting
from offramp.cli.output import tell
from offramp.core.decoding.policy import Thresholds
from offramp.core.errors import InputError
from offramp.features.input_processor import turn_of
from offramp_vllm.exports import serving
from offramp_vllm.exports.exporters import DRAFTS, template_options
from offramp_vllm.exports.vllm import PROMPTS
from offramp_vllm.policy import FULL, LOSSLESS, MODE, THRESHOLD, TRUST
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
            f"In vLLM trust is calibrated, or one threshold of {SCORE} for all exits.",
            "Leave --first-threshold out, and --score, or calibrate in another engine.",
        )
    python = serving.python_with_vllm()
    model = serving.checked_model(opened, python)
    with tempfile.TemporaryDirectory(prefix="offramp-vllm-") as folder:
        exits, key, port = Path(folder) / "exits", secrets.token_hex(), _free_port()
        _export(opened, exits, arguments.max_new_tokens)
        drafts = drafts_first(opened.adapter)
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
            **({"speculative-config": json.dumps(DRAFTS)} if drafts else {}),
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
            served = Served(opened, f"http://127.0.0.1:{port}", key, drafts)
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


def drafts_first(adapter: Any) -> bool:
    """Return True if the first exit drafts on, so that vLLM takes its drafts."""
    by_trust = trusting(adapter.policy, adapter, 1)
    return adapter.exits.draft_on and {*by_trust.drafts} == {adapter.exits.depths[0]}


def _export(opened: Any, folder: Path, longest: int) -> None:
    """Write the exits. Requests bring thresholds or trust, and the exits may have none yet.
    longest: tokens of an answer."""
    adapter = opened.adapter
    never = Thresholds.shared(adapter.exits.depths, 1.0)
    policy = replace(
        adapter.policy, thresholds=adapter.policy.thresholds or never, lossless=False, trust=None
    )
    if drafts_first(adapter):
        by_trust = trusting(policy, adapter, longest)
        policy = replace(policy, drafts=by_trust.drafts, max_draft=by_trust.max_draft)
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


def _how(policy: Any) -> dict[str, Any]:
    """A request's extra arguments, of a policy."""
    if policy.lossless:
        return {MODE: LOSSLESS}
    if policy.trust is not None:
        return {TRUST: float(policy.trust)}
    thresholds = {*policy.thresholds.values()}
    return {THRESHOLD: max(thresholds)} if thresholds else {MODE: FULL}


@dataclass(frozen=True)
class Served:
    """An opened adapter in vLLM. url: of the server. drafts: whether it has the exits' drafts."""

    opened: Any
    url: str
    key: str
    drafts: bool
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
        """Return vLLM's `Answer` to each example: of the full model by `FULL`, lossless, or early
        by trust or at the one threshold of a policy.

        Raises:
            InputError: vLLM refuses a request, or reads another prompt than offramp does.
        """
        asked = {
            "model": MODEL,
            "temperature": 0,
            "max_tokens": max_new_tokens,
            "return_token_ids": True,
            "vllm_xargs": _how(policy),
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
        scored = TRUST not in asked["vllm_xargs"]  # drafts that are taken have no probabilities
        if example.is_text:
            more = {"logprobs": 0} if scored else {}
            said = self._post("completions", {**asked, **more, "prompt": ids})
        else:
            said = self._chat(example, ids, {**asked, "logprobs": scored})
        [choice] = said["choices"]
        tokens, told = tuple(choice["token_ids"]), choice["logprobs"]
        beside = choice["offramp"]
        if not scored:
            logs = [math.nan] * len(tokens)
        elif example.is_text:
            logs = told["token_logprobs"]
        else:
            logs = [one["logprob"] for one in told["content"]]
        return Answer(
            tokens,
            encoder.texts(torch.tensor([tokens]))[0],
            tuple(beside["depths"]),
            tuple(map(math.exp, logs)),
            offers=tuple((o["trust"], tuple(o["tokens"])) for o in beside.get("offers", ())),
        )

    def _chat(self, example: Any, ids: Sequence[int], asked: dict[str, Any]) -> Any:
        """What vLLM says about an image. ids: of the prompt that offramp reads, as vLLM must."""
        turn = turn_of("user", example.prompt)
        turn["content"].insert(0, self._picture(example))
        said = self._post("chat/completions", {**asked, "messages": [turn]})
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
