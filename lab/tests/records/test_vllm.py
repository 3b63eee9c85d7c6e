"""vllm.json has what the page's table shows of it."""

from __future__ import annotations

import math

import pytest

from offramp_lab.tables.markdown import record
from offramp_lab.tables.vllm import LOADS


@pytest.mark.parametrize("load", LOADS)
def test_every_load_has_all_ways_and_they_answer_all_photographs(load: str) -> None:
    found = record("vllm")
    count = found["prompts"]["photographs"]
    ways = {name: found[f"vllm {name}"] + found[f"offramp {name}"] for name in ("1", load)}
    names = {name: [(one["engine"], one["way"]) for one in all_] for name, all_ in ways.items()}
    assert names[load] == names["1"] and ("vLLM", "full depth") in names["1"]
    digests = {one["exits"]["digest"] for one in ways[load] if one.get("exits")}
    assert digests <= {found["prompts"]["exits"]["exits"]["digest"]}
    for one in ways[load]:
        assert len(one["seconds"]) == math.ceil(count / int(load)) and min(one["seconds"]) > 0
        assert one["answers"] == count
        assert one["same_answers"] == count or "llama.cpp" in one["engine"]
