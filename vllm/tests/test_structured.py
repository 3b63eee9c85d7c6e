"""Answers that a grammar constrains: exits are scored by what it allows."""

from __future__ import annotations

from typing import Any

import pytest
from engine import depths as depths_of

TEXTS = ("Say one.", "What is this?", "a red dog", "Then?")


@pytest.fixture
def choose(made: Any, serve: Any) -> Any:
    """Texts and depths of greedy answers that are one of some choices."""
    from vllm.sampling_params import StructuredOutputsParams

    from vllm import SamplingParams

    folder = made("qwen2.5-vl")
    llm = serve(folder / "model", folder / "export", skip_tokenizer_init=False)

    def ask(choices: list[str], at_once: int, **extra: Any) -> list[tuple[str, list[int]]]:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=20,
            extra_args=extra,
            structured_outputs=StructuredOutputsParams(choice=choices),
        )
        found = []
        for start in range(0, len(TEXTS), at_once):
            found += llm.generate([*TEXTS[start : start + at_once]], params, use_tqdm=False)
        return [(one.outputs[0].text, depths_of(one)) for one in found]

    return ask


def test_what_a_grammar_leaves_one_token_for_leaves_at_the_exit(choose: Any) -> None:
    for text, depths in choose(["a red dog"], 4):
        assert text == "a red dog" and set(depths) == {2}


def test_choices_are_kept_alone_and_together(choose: Any) -> None:
    choices = ["red dog", "red cat", "blue bird"]
    together = choose(choices, 4)
    assert {text for text, _ in together} <= set(choices)
    assert choose(choices, 1) == together
    strict = choose(choices, 4, offramp_threshold=1.0)
    full = choose(choices, 4, offramp_mode="full")
    assert [text for text, _ in strict] == [text for text, _ in full]
