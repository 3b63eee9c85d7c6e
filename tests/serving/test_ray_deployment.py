"""Laws of the server on Ray: replicas answer alike, come with load, and one that dies loses nothing
for good."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from PIL import Image

from offramp.adapter import Adapter
from offramp.errors import InputError
from offramp.models.input_processor import InputProcessor
from offramp.serving.ray_deployment import Captioner, RayConfig, deployment
from serving import messages, scene_examples, shipped

WITHIN = 600.0
SMALL: dict[str, Any] = {
    "slots": 2, "limit": 128, "cpus": 0.2, "threads": 1, "loading": {"device": "cpu"},
    "watch": False,
}  # fmt: skip


def expected(example: Any, mode: str = "early_exit") -> str:
    adapter, processor = shipped()
    encoder = InputProcessor(adapter.backbone, processor)
    options = {"max_new_tokens": 48, "do_sample": False, "mode": mode}
    return encoder.texts(adapter.generate(encoder.prompts([example]), **options).new_tokens)[0]


# -- without Ray -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "change",
    [
        {"min_replicas": 0}, {"min_replicas": 2}, {"others": {"tiny-opt": "x"}},
        {"others": {"a": "x"}, "held": 0},
    ],
)  # fmt: skip
def test_no_replicas_and_names_that_say_nothing_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RayConfig("tiny-opt", **change)


# -- on a Ray of this machine ----------------------------------------------------------------------


class Cluster(NamedTuple):
    serve: Any
    url: str


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ray = pytest.importorskip("ray")
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"port": port})
    yield Cluster(serve, f"http://127.0.0.1:{port}")
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def run(cluster: Cluster) -> Iterator[Any]:
    """Deploy a configuration; its address."""

    def deployed(**fields: Any) -> str:
        config = RayConfig("tiny-opt", **{**SMALL, **fields})
        cluster.serve.run(deployment(config), route_prefix="/")
        return cluster.url

    yield deployed
    cluster.serve.delete("default")


def chat(url: str, number: int, **more: Any) -> httpx.Response:
    body = {"messages": messages(scene_examples()[number % 6]), **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=WITHIN)


class Clients:
    """Threads that each want one answer, and ask again until it is there. refused: how often each
    status came in between; 0: the line was cut."""

    def __init__(self, url: str, count: int) -> None:
        self.answers: dict[int, str] = {}
        self.refused: Counter[int] = Counter()
        self._url, self._count = url, count
        self._threads = [threading.Thread(target=self._one, args=(n,)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _one(self, number: int) -> None:
        end = time.monotonic() + WITHIN
        while number not in self.answers and time.monotonic() < end:
            try:
                answer = chat(self._url, number)
                answer.raise_for_status()
                self.answers[number] = answer.json()["choices"][0]["message"]["content"]
            except httpx.HTTPStatusError as error:
                self.refused[error.response.status_code] += 1
                time.sleep(0.5)
            except httpx.HTTPError:
                self.refused[0] += 1
                time.sleep(0.5)

    def all_answered(self) -> bool:
        for thread in self._threads:
            thread.join(WITHIN)
        right = {n: expected(scene_examples()[n % 6]) for n in range(self._count)}
        return self.answers == right


def replicas() -> list[int]:
    """The processes of replicas below this one; Ray names them in their command line."""

    def ours(process: str) -> bool:
        while process not in ("0", "1"):
            if int(process) == os.getpid():
                return True
            process = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
        return False

    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            named = place.read_bytes().startswith(b"ray::ServeReplica:")
            if named and ours(place.parent.name):
                found.append(int(place.parent.name))
        except OSError:
            continue  # it has just ended
    return found


def test_a_replica_that_is_killed_under_load_loses_nothing_that_a_retry_does_not_bring(
    run: Any,
) -> None:
    url = run(min_replicas=2, max_replicas=2)
    clients = Clients(url, 12)
    time.sleep(0.5)
    killed = replicas()[0]
    os.kill(killed, signal.SIGKILL)
    assert clients.all_answered()
    print("killed a replica:", dict(clients.refused))
    end = time.monotonic() + WITHIN
    while len(set(replicas()) - {killed}) < 2:  # another one takes its place
        assert time.monotonic() < end
        time.sleep(0.5)


def test_more_than_there_is_room_for_is_refused_and_answered_later(run: Any) -> None:
    clients = Clients(run(slots=1, queue=1), 12)
    assert clients.all_answered()
    assert set(clients.refused) <= {429, 503} and sum(clients.refused.values()) > 0
    print("refused:", dict(clients.refused))


def test_replicas_come_with_load(run: Any) -> None:
    soon = {"upscale_delay_s": 0.5, "metrics_interval_s": 0.5, "look_back_period_s": 1.0}
    url = run(slots=1, queue=30, max_replicas=2, scaling=soon)
    assert len(replicas()) == 1
    answered = 0
    while len(replicas()) < 2:
        assert Clients(url, 12).all_answered()
        answered += 12
        assert answered < 500
    print("two replicas after", answered, "requests")


def test_adapters_share_a_backbone_and_each_answers_for_its_name(run: Any, tmp_path: Path) -> None:
    adapter, _ = shipped()
    policies = {"drafts": replace(adapter.policy, lossless=True), "again": adapter.policy}
    for name, policy in policies.items():
        Adapter(adapter.backbone, adapter.exits, policy).save_pretrained(tmp_path / name)
    folders = {name: str(tmp_path / name) for name in policies}
    url = run(others=folders, held=1)
    listed = httpx.get(f"{url}/v1/models", timeout=WITHIN).json()["data"]
    assert [card["id"] for card in listed] == ["tiny-opt", *policies]
    for name in ("drafts", "tiny-opt", "again", "drafts", None):
        answer = chat(url, 0, model=name).raise_for_status().json()
        mode = "lossless" if name == "drafts" else "early_exit"
        assert answer["model"] == (name or "tiny-opt")
        assert answer["usage"]["offramp"]["mode"] == mode
        text = answer["choices"][0]["message"]["content"]
        assert text == expected(scene_examples()[0], mode)
    assert chat(url, 0, model="other").status_code == 404


def test_a_data_set_is_captioned_in_batches(cluster: Cluster) -> None:
    import ray

    some = scene_examples()[:6]
    rows = [{"key": n, "image": np.asarray(e.open_image())} for n, e in enumerate(some)]
    captioned = ray.data.from_items(rows).map_batches(
        Captioner,
        fn_constructor_kwargs={"adapter": "tiny-opt", "slots": 2, "limit": 128},
        batch_size=3, concurrency=1, num_cpus=0.2,
    )  # fmt: skip
    answers = {row["key"]: row["answer"] for row in captioned.take_all()}
    prompt = "Caption:"
    assert answers == {n: expected(replace(e, prompt=prompt)) for n, e in enumerate(some)}


def test_images_of_every_kind_open() -> None:
    from offramp.serving.ray_deployment import as_image

    picture = Image.new("L", (3, 2))
    assert as_image(picture) is picture
    assert as_image(np.asarray(picture)).size == (3, 2)
    assert as_image("a.png") == Path("a.png")
