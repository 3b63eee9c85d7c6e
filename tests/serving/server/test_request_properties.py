"""Properties of the reader of requests: of any JSON it makes a request, or says what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from offramp.serving.server.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    asked_text,
)

KINDS = [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["user", "text", "image_url", "\ud800", "data:,", "json_schema"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url", "x"]), inner
        )
    ),
    max_leaves=8,
)
START: dict[Any, dict[str, Any]] = {
    ChatRequest: {"messages": [{"role": "user", "content": "a"}]},
    CompletionRequest: {"prompt": "a"},
    TokenizeRequest: {"prompt": "a"},
    DetokenizeRequest: {"tokens": [1]},
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_field_of_any_value_is_taken_or_refused_by_name(
    kind: type[BaseModel], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from([*kind.model_fields, "of tomorrow"]))
    body = {**START[kind], name: data.draw(VALUES)}
    try:
        request: Any = kind.model_validate(body)
    except ValidationError as error:
        assert all(part["msg"] for part in error.errors())
        return
    assert name != "of tomorrow" or body[name] is None
    if isinstance(request, ChatRequest | CompletionRequest):
        asked_text(request)
        assert request.n >= 1 and request.schema_of_answer is not False
    json.dumps(request.model_dump(), default=str)
