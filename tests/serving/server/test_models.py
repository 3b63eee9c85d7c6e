"""Laws of several adapters on one backbone: each request is answered by the one that it names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from offramp.serving.engine_config import EngineConfig
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.models import Models
from offramp.serving.server.pytorch import service_of as service_of_model
from offramp.serving.server.service import Service
from serving import NAME, asking, messages, scene_examples, service_of, shipped

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    """The shipped adapter, and the same exits in lossless mode, loaded when they are asked for."""
    held: dict[str, Service] = {}

    async def load(name: str) -> Service:
        if name not in held:
            adapter, processor = shipped()
            lossless = replace(adapter, policy=replace(adapter.policy, lossless=True))
            config = ServerConfig(name=name)
            held[name] = service_of_model(lossless, processor, config, EngineConfig(2, 128))
        return held[name]

    found = Models(service_of(slots=2, limit=128), ("drafts",), load, held)
    yield found
    found.close()


def test_each_request_is_answered_by_the_adapter_that_it_names(models: Models) -> None:
    def body(name: str | None) -> dict[str, Any]:
        return {"messages": messages(scene_examples()[0]), "model": name, "max_tokens": 12}

    with asking(models) as client:
        listed = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert listed == [NAME, "drafts"]
        assert list(models.loaded) == [models.first]
        modes = {None: "early_exit", NAME: "early_exit", "drafts": "lossless"}
        for name, mode in modes.items():
            answer = client.post(CHAT, json=body(name)).json()
            assert answer["usage"]["offramp"]["mode"] == mode
            assert answer["model"] == (name or NAME)
        refused = client.post(CHAT, json=body("other"))
        assert refused.status_code == 404
        assert "'tiny-opt', 'drafts' are" in refused.json()["error"]["message"]
        text = client.get("/metrics").text
        for name, count in ((NAME, 24), ("drafts", 12)):
            assert f'offramp:generation_tokens_total{{model_name="{name}"}} {count}.0' in text
        assert text.count("# TYPE offramp:generation_tokens_total") == 1
