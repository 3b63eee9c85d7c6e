"""Laws of serving exits that nobody has calibrated: they draft, and nothing is refused silently."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

from offramp.core.decoding.policy import DRAFT, Thresholds
from offramp.serving.engine_config import EngineConfig
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.pytorch import service_of as service_of_model
from serving import NAME, messages, running, scene_examples, shipped


@pytest.mark.parametrize("alone", [False, True])
def test_exits_without_thresholds_draft(alone: bool) -> None:
    adapter, processor = shipped()
    drafts = Thresholds.shared(adapter.exits.depths, DRAFT)
    bare = adapter.with_policy(replace(adapter.policy, thresholds={}, drafts=drafts))
    settings, sizes = ServerConfig(name=NAME), EngineConfig(slots=2, limit=256)
    service = service_of_model(bare, processor, settings, sizes, serial=bare if alone else None)
    body = {"messages": messages(scene_examples()[0]), "max_tokens": 12, "temperature": 0}
    with running(service) as address:
        url = f"{address}/v1/chat/completions"

        def ask(**how: object) -> httpx.Response:
            return httpx.post(url, json={**body, **how}, timeout=240)

        [card] = httpx.get(f"{address}/v1/models").json()["data"]
        own, full = ask(), ask(offramp={"mode": "full"})
        early = ask(offramp={"mode": "early_exit"})
        given = ask(offramp={"mode": "early_exit", "thresholds": {"2": 0.0}})
    assert card["offramp"]["exits"] == list(adapter.exits.depths)
    assert own.json()["usage"]["offramp"]["mode"] == "lossless"
    [said], [wanted] = (reply.json()["choices"] for reply in (own, full))
    assert said["message"] == wanted["message"]
    assert early.status_code == 400 and "no thresholds" in early.json()["error"]["message"]
    assert given.json()["usage"]["offramp"]["mean_depth"] < 12
