"""A vLLM that is laid out otherwise serves as it was, and refuses exits alone."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

import offramp_vllm
from offramp_vllm.refuse import Refused


@pytest.mark.parametrize("moved", ["a version", "a name"])
def test_another_vllm_serves_as_it_was_and_refuses_exits_alone(
    moved: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    if moved == "a version":
        monkeypatch.setattr("vllm.version.__version_tuple__", (0, 99, 1))
    else:
        monkeypatch.delattr("vllm.v1.engine.output_processor.RequestState")
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda arguments: "as it was")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("WARNING"):
        offramp_vllm.register()
    [told] = {r.getMessage() for r in caplog.records if r.name == "vllm.offramp"}
    assert len(told.splitlines()) == 2
    asking = SimpleNamespace(additional_config={"offramp": {"exits": "e"}})
    with pytest.raises(Refused) as refused:
        EngineArgs.create_engine_config(asking)
    assert len(str(refused.value).splitlines()) == 2
    others = SimpleNamespace(additional_config={})
    assert EngineArgs.create_engine_config(others) == "as it was"
