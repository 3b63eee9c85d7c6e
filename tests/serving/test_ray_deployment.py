"""Laws of the server on Ray: replicas answer alike, and one that dies loses nothing for good."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from offramp.errors import InputError
from offramp.models.input_processor import InputProcessor
from offramp.serving.ray_deployment import Captioner, RayConfig, deployment
from serving import messages, scene_examples, shipped

WITHIN = 600.0


def expected(example: Any) -> str:
    adapter, processor = shipped()
    encoder = InputProcessor(adapter.backbone, processor)
    output = adapter.generate(encoder.prompts([example]), max_new_tokens=48, do_sample=False)
    return encoder.texts(output.new_tokens)[0]


def test_a_captioner_answers_batches_and_says_what_it_could_not_read() -> None:
    captioner = Captioner("tiny-opt", slots=4, limit=128, max_new_tokens=48)
    try:
        some = scene_examples()[:3]
        images = [np.asarray(e.open_image()) for e in some]
        batch = {"image": [*images, b"no image", "/nowhere.png"], "key": [0, 1, 2, 3, 4]}
        found = captioner(batch)
        assert found["answer"][:3] == [expected(e) for e in some]
        assert [bool(error) for error in found["error"]] == [False, False, False, True, True]
        assert found["key"] == batch["key"]
    finally:
        captioner.close()


@pytest.mark.parametrize("sizes", [(0, 1), (2, 1)])
def test_no_replicas_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="replicas"):
        RayConfig("tiny-opt", min_replicas=sizes[0], max_replicas=sizes[1])


def test_a_replica_that_is_killed_under_load_loses_nothing_that_a_retry_does_not_bring() -> None:
    ray = pytest.importorskip("ray")
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        config = RayConfig(
            "tiny-opt", slots=2, limit=128, min_replicas=2, max_replicas=2, cpus=0.5, threads=1,
            loading={"device": "cpu"}, watch=False,
        )  # fmt: skip
        serve.run(deployment(config), route_prefix="/")
        url = "http://127.0.0.1:8000/v1/chat/completions"
        examples = scene_examples()[:6]
        answers: dict[int, str] = {}
        retries = [0]

        def client(number: int) -> None:
            body = {"messages": messages(examples[number % 6])}
            end = time.monotonic() + WITHIN
            while number not in answers and time.monotonic() < end:
                try:
                    answer = httpx.post(url, json=body, timeout=WITHIN)
                    answer.raise_for_status()
                    answers[number] = answer.json()["choices"][0]["message"]["content"]
                except httpx.HTTPError:
                    retries[0] += 1
                    time.sleep(0.5)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        os.kill(_replica_process(), signal.SIGKILL)
        for thread in threads:
            thread.join(WITHIN)
        assert [answers[n] for n in range(12)] == [expected(examples[n % 6]) for n in range(12)]
    finally:
        serve.shutdown()
        ray.shutdown()


def _replica_process() -> int:
    """The process of one replica of ours; Ray names them in their command line."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if place.read_bytes().startswith(b"ray::ServeReplica:"):
                return int(place.parent.name)
        except OSError:
            continue  # it has just ended
    raise AssertionError("no replica runs")
