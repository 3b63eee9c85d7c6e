"""Laws of the server, asked through OpenAI's own client: it answers what `generate` gives."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from offramp.adapter.shipped import PHOTO
from offramp.core.decoding.policy import FULL
from offramp.features.input_processor import InputProcessor
from offramp.features.prefix_cache import PrefixCache
from offramp.serving.server.hf_options import CountPenalties
from offramp.serving.server.service import Service
from serving import NAME, asking, data_uri, messages, running, scene_examples, service_of, shipped

LONGEST = 24


@pytest.fixture(scope="module")
def service() -> Service:
    return service_of()


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with running(service) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found:
        yield found


def alone(example: Any, mode: str = "early_exit", **options: Any) -> Any:
    """What the model generates for the request by itself, and its text."""
    adapter, processor = shipped()
    encoder = InputProcessor(adapter.backbone, processor)
    policy = {"early_exit": adapter.policy, "full": FULL}.get(mode)
    policy = policy or replace(adapter.policy, lossless=True)
    given = {"max_new_tokens": LONGEST, "do_sample": False, **options}
    output = adapter.generate(encoder.prompts([example]), policy=policy, **given)
    return output, encoder.texts(output.new_tokens)[0]


def ask(client: Any, example: Any, **more: Any) -> Any:
    given = {"max_completion_tokens": LONGEST, "temperature": 0, **more}
    return client.chat.completions.create(model=NAME, messages=messages(example), **given)


# -- the same answers ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_eight_at_once_get_what_generate_gives(streamed: bool, address: str) -> None:
    some = scene_examples()[:8]
    modes = [("early_exit", "full", "lossless")[i % 3] for i in range(8)]

    async def one(client: Any, example: Any, mode: str) -> tuple[str, Any]:
        extra = {"offramp": {"mode": mode}}
        found = (
            await ask(client, example, stream=streamed, extra_body=extra)
            if not streamed
            else (
                await ask(
                    client,
                    example,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body=extra,
                )
            )
        )
        if not streamed:
            return found.choices[0].message.content, found.usage
        text, usage = "", None
        async for chunk in found:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        return text, usage

    async def all_of_them() -> list[tuple[str, Any]]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            return await asyncio.gather(*map(one, [client] * 8, some, modes))

    for (text, usage), example, mode in zip(asyncio.run(all_of_them()), some, modes, strict=True):
        output, expected = alone(example, mode)
        assert text == expected
        assert usage.completion_tokens == output.new_tokens.shape[1]
        assert usage.offramp["mode"] == mode
        if mode != "lossless":  # where drafts end depends on who else waits for the deep layers
            assert math.isclose(usage.offramp["mean_depth"], output.mean_depth)


def test_without_a_mode_the_adapters_own_policy_answers(client: Any) -> None:
    example = scene_examples()[0]
    found = client.chat.completions.create(model=NAME, messages=messages(example))
    output, text = alone(example, max_new_tokens=48)
    assert found.choices[0].message.content == text
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.offramp["depths"] == {"2": output.new_tokens.shape[1]}


def test_a_completion_reads_its_prompt_as_it_is(client: Any) -> None:
    example = scene_examples()[7]
    extra = {"images": [data_uri(example.image)]}
    given = {"max_tokens": LONGEST, "temperature": 0, "extra_body": extra, "model": NAME}
    found = client.completions.create(prompt=example.prompt, **given)
    assert found.choices[0].text == alone(example)[1]
    told = client.completions.create(prompt="Caption:", logprobs=2, **given).choices[0]
    for token, offset in list(zip(told.logprobs.tokens, told.logprobs.text_offset, strict=True))[
        :9
    ]:
        assert token and told.text[offset:].startswith(token)
    two = client.completions.create(prompt=[example.prompt, "Caption:"], **given)
    assert [c.index for c in two.choices] == [0, 1]
    assert [c.text for c in two.choices] == [
        alone(replace(example, prompt=p))[1] for p in (example.prompt, "Caption:")
    ]
    streamed = client.completions.create(prompt=example.prompt, stream=True, **given)
    assert "".join(chunk.choices[0].text for chunk in streamed) == alone(example)[1]


def test_sampled_answers_are_those_of_generate_with_the_same_seed(client: Any) -> None:
    example = scene_examples()[2]
    options = {"temperature": 1.5, "top_p": 0.9, "extra_body": {"top_k": 20}}
    found = ask(client, example, **{**options, "seed": 11, "n": 3})
    texts = [choice.message.content for choice in found.choices]
    for number, text in enumerate(texts):
        same = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 20}
        assert text == alone(example, seed=11 + number, **same)[1]
    again = ask(client, example, **{**options, "seed": 11, "n": 3})
    assert [choice.message.content for choice in again.choices] == texts


# -- fields ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "early_exit", "lossless"])
def test_logprobs_change_nothing_and_are_the_models_own(mode: str, client: Any) -> None:
    example = scene_examples()[1]
    extra = {"offramp": {"mode": mode}}
    found = ask(client, example, logprobs=True, top_logprobs=3, extra_body=extra)
    output, text = alone(example, mode)
    [choice] = found.choices
    assert choice.message.content == text
    places = choice.logprobs.content
    assert len(places) == output.new_tokens.shape[1]
    if mode == "early_exit":
        return
    adapter, processor = shipped()
    scores = InputProcessor(adapter.backbone, processor).prompts([example])
    model = adapter.backbone.model
    with torch.inference_mode():
        theirs = model.generate(
            **scores,
            max_new_tokens=LONGEST,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for place, logits, token in zip(places, theirs.logits, output.new_tokens[0], strict=True):
        logs = logits[0].float().log_softmax(-1)
        assert math.isclose(place.logprob, float(logs[token]), abs_tol=1e-3)
        top = logs.topk(3).values.tolist()
        assert [t.logprob for t in place.top_logprobs] == pytest.approx(top, abs=1e-3)


def test_streamed_logprobs_and_depths_are_of_every_token(client: Any) -> None:
    example = scene_examples()[1]
    stream = ask(client, example, stream=True, logprobs=True, extra_body={"offramp": {}})
    tokens, depths = [], []
    for chunk in stream:
        for choice in chunk.choices:
            tokens += [p.token for p in choice.logprobs.content] if choice.logprobs else []
            depths += getattr(choice, "offramp", {"depths": []})["depths"]
    output, _ = alone(example)
    _, processor = shipped()
    assert "".join(tokens) == processor.tokenizer.decode(output.new_tokens[0])
    assert depths == output.depths[0].tolist()


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_ends_before_its_stop_string(streamed: bool, client: Any) -> None:
    example = scene_examples()[0]
    _, whole = alone(example)
    stop = whole[8:13]
    found = ask(client, example, stop=[stop, "never"], stream=streamed)
    if streamed:
        chunks = [choice for chunk in found for choice in chunk.choices]
        text = "".join(choice.delta.content or "" for choice in chunks)
        reason = chunks[-1].finish_reason
    else:
        text, reason = found.choices[0].message.content, found.choices[0].finish_reason
    assert text == whole[: whole.index(stop)].rstrip()
    assert reason == "stop"


def test_lengths_end_tokens_and_penalties_are_obeyed(client: Any) -> None:
    example = scene_examples()[6]  # a question, answered by one word
    short = ask(client, example)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (2, "stop")
    on = ask(client, example, extra_body={"ignore_eos": True}, max_completion_tokens=9)
    assert (on.usage.completion_tokens, on.choices[0].finish_reason) == (9, "length")
    caption = scene_examples()[0]
    cut = ask(client, caption, max_completion_tokens=3)
    assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (3, "length")
    ours = alone(caption, logits_processor=[CountPenalties(2.0, -2.0)])[1]
    penalised = ask(client, caption, frequency_penalty=-2, presence_penalty=2)
    assert penalised.choices[0].message.content == ours
    never = ask(client, caption, extra_body={"repetition_penalty": 5.0, "top_k": None})
    assert never.choices[0].message.content == alone(caption, repetition_penalty=5.0)[1]


def test_continuous_usage_counts_up_and_nobody_else_gets_usage(client: Any) -> None:
    example = scene_examples()[0]
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = ask(client, example, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts)
    assert counts[-1] == alone(example)[0].new_tokens.shape[1]
    assert all(chunk.usage is None for chunk in ask(client, example, stream=True))


def test_nulls_and_what_asks_for_nothing_count_as_left_out(client: Any) -> None:
    example = scene_examples()[0]
    nothing = {
        "stop": None,
        "seed": None,
        "tools": [],
        "tool_choice": "none",
        "logit_bias": {},
        "response_format": {"type": "text"},
        "user": "u",
        "metadata": {"a": "b"},
        "top_k": -1,
        "store": True,
        "offramp": None,
        "stream_options": None,
        "functions": None,
        "reasoning_effort": "high",
        "parallel_tool_calls": True,
        "verbosity": "medium",
        "function_call": "none",
        "service_tier": "flex",
        "prompt_cache_retention": "24h",
    }
    assert ask(client, example, extra_body=nothing).choices[0].message.content == alone(example)[1]


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def test_tools_that_are_not_to_be_called_are_taken(client: Any) -> None:
    example = scene_examples()[0]
    found = ask(client, example, extra_body={"tools": TOOLS, "tool_choice": "none"})
    assert found.choices[0].message.content == alone(example)[1]


@pytest.mark.parametrize(
    "asked_for",
    [
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "auto"},
        {"tool_choice": "required"},
        {"functions": [{"name": "look"}]},
    ],
)
def test_tools_that_may_be_called_are_refused_with_what_there_is(
    client: Any, asked_for: Any
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"calls no tools.*response_format") as caught:
        ask(client, scene_examples()[0], extra_body=asked_for)
    assert caught.value.param in asked_for


def test_an_answer_that_comes_back_is_a_message_like_others(client: Any) -> None:
    answer = ask(client, scene_examples()[0]).choices[0].message.model_dump()
    turns = [*messages(scene_examples()[0]), {**answer, "tool_calls": [], "annotations": []}]
    turns[0]["name"] = "ann"
    with pytest.raises(openai.BadRequestError, match=r"one message.*these came: user, assistant"):
        client.chat.completions.create(model=NAME, messages=turns)
    found = client.chat.completions.create(model=NAME, messages=turns[:1], temperature=0)
    assert found.choices[0].message.content == answer["content"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/chat/completions"])
def test_what_is_not_there_is_answered_with_what_is(address: str, path: str) -> None:
    found = httpx.post(f"{address}{path}", json={})
    assert found.status_code == 404
    assert f"There is no {path}. There are POST /v1/chat/completions" in found.text


def test_a_text_may_mark_where_its_images_stand(client: Any) -> None:
    example = scene_examples()[6]
    [turn] = messages(example)
    turn["content"][1]["text"] = f"<image>{example.prompt}"
    given = {"max_completion_tokens": LONGEST, "temperature": 0}
    found = client.chat.completions.create(model=NAME, messages=[turn], **given)
    assert found.choices[0].message.content == alone(example)[1]
    turn["content"][1]["text"] = f"<image>{example.prompt}<image>"  # of one image
    with pytest.raises(openai.BadRequestError, match="stands for images"):
        client.chat.completions.create(model=NAME, messages=[turn], **given)


# -- the rest of the API ---------------------------------------------------------------------------


def test_models_tell_what_they_read(client: Any, address: str) -> None:
    [model] = client.models.list().data
    assert model.id == NAME
    assert model.input_modalities == ["text", "image"]
    assert model.offramp["guarantee"]["target"] == 0.0075
    assert model.offramp["knows"] == "drawn shapes, and nothing else"
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="gpt"):
        client.models.retrieve("gpt")


def test_the_page_tries_a_photograph_where_the_model_has_one(
    address: str, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert httpx.get(f"{address}/example").headers["content-type"] == "image/png"
    (tmp_path / "photographer.jpg").write_bytes(b"a photograph")
    monkeypatch.setattr("offramp_photo.packages.data_folder", lambda: tmp_path)
    monkeypatch.setattr(service.served.backbone, "name", PHOTO)
    found = httpx.get(f"{address}/example")
    assert found.content == b"a photograph" and found.headers["content-type"] == "image/jpeg"


def test_tokens_there_and_back(address: str) -> None:
    text = "Question: is there a yellow square? Answer:"
    found = httpx.post(f"{address}/tokenize", json={"prompt": text, "add_special_tokens": False})
    found = found.json()
    assert found["count"] == len(found["tokens"]) > 0
    assert found["max_model_len"] == 256
    back = httpx.post(f"{address}/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": text}
    chat = {"messages": [{"role": "user", "content": text}], "add_special_tokens": False}
    assert httpx.post(f"{address}/tokenize", json=chat).json() == found


def test_health_version_and_numbers(client: Any, address: str) -> None:
    ask(client, scene_examples()[0])
    for path in ("/health", "/ready", "/version", "/openapi.json", "/"):
        assert httpx.get(address + path).status_code == 200
    text = httpx.get(f"{address}/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens_total",
        "generation_tokens_total",
        'request_success_total{finished_reason="stop"',
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket",
        "request_prefill_time_seconds_bucket",
        "request_decode_time_seconds_bucket",
        'tokens_by_depth_total{depth="2"',
        "exit_rate",
        "draft_acceptance_rate",
        "answers_read_again",
        "answers_not_its_own",
    ):
        assert f"offramp:{name}" in text, name


def test_a_prompt_with_several_answers_counts_once(client: Any, address: str) -> None:
    def counted() -> float:
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if "prompt_tokens_total{" in line)

    before = counted()
    said = ask(client, scene_examples()[0], n=3)
    assert settled(lambda: counted() - before == said.usage.prompt_tokens > 0)


def test_request_ids_are_the_clients_or_new(address: str) -> None:
    ours = httpx.get(f"{address}/health", headers={"X-Request-Id": "mine-1"})
    assert ours.headers["x-request-id"] == "mine-1"
    bad = httpx.get(f"{address}/health", headers={"X-Request-Id": "a b\tc" * 90})
    assert len(bad.headers["x-request-id"]) == 32


# -- who goes away, and who is too many ------------------------------------------------------------


def settled(check: Any, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.02)
    return False


def slowed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of the engine takes 10 ms more: no machine is too quick for what is asked."""
    core = service.engine.core
    make = core.decoder.make
    monkeypatch.setattr(core.decoder, "make", lambda call: time.sleep(0.01) or make(call))


@pytest.mark.parametrize("streamed", [False, True])
def test_who_goes_away_frees_the_slot(
    streamed: bool, service: Service, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(service, monkeypatch)
    body = {
        "messages": messages(scene_examples()[0]),
        "max_completion_tokens": 200,
        "ignore_eos": True,
        "stream": streamed,
        "offramp": {"mode": "full"},
    }
    if streamed:
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
            assert next(response.iter_raw())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/chat/completions", json=body, timeout=0.3)
    assert settled(lambda: service.under_way == 0 and service.engine.running == 0)
    assert service.engine.core.tokens < 10_000


@pytest.mark.slow
def test_a_full_queue_says_when_to_come_back() -> None:
    service = service_of(slots=1, queue=1)
    with running(service) as address:
        body = {
            "messages": messages(scene_examples()[0]),
            "max_completion_tokens": 60,
            "ignore_eos": True,
            "offramp": {"mode": "full"},
        }

        async def flood() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=300) as client:
                url = f"{address}/v1/chat/completions"
                return await asyncio.gather(*(client.post(url, json=body) for _ in range(5)))

        answers = asyncio.run(flood())
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200, 200, 429, 429, 429]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert refused[0].json()["error"]["code"] == "queue_full"
        assert 'offramp:request_errors_total{model_name="tiny-opt",status="429"} 3.0' in (
            httpx.get(f"{address}/metrics").text
        )


def test_keys_guard_everything_but_health() -> None:
    with running(service_of(slots=1, keys=("right", "other"))) as address:
        for path in ("/health", "/ready"):
            assert httpx.get(address + path).status_code == 200
        guarded = ("/", "/metrics", "/v1/models", "/version", "/openapi.json", "/nowhere")
        for path in guarded:
            found = httpx.get(address + path)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        for sent in ("Bearer wrong", "Bearer", "right", "Basic !!", "Bearer righ\xfc"):
            headers = {"Authorization": sent.encode("latin-1")}
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 401
        for auth in (("user", "right"), ("", "other")):
            assert httpx.get(address, auth=auth).status_code == 200
        assert "basic" in httpx.get(address).headers["www-authenticate"].lower()
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="right", max_retries=0)
        assert client.models.list().data[0].id == NAME
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()


def test_a_request_that_takes_too_long_ends_with_an_error_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = service_of(slots=1, seconds=0.4)
    slowed(service, monkeypatch)
    with running(service) as address:
        body = {
            "messages": messages(scene_examples()[0]),
            "max_completion_tokens": 230,
            "ignore_eos": True,
            "offramp": {"mode": "full"},
        }
        whole = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        body["stream"] = True
        streamed = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30).text
        assert '"code":"timeout"' in streamed or '"code": "timeout"' in streamed


def test_a_third_question_about_an_image_reads_only_what_is_new() -> None:
    """Answers are those of a server that keeps nothing. The first prompt waits at its exit, and is
    not kept; the second one shows that the image comes again."""
    example = scene_examples()[0]
    asked = [messages(example), messages(replace(example, prompt="Caption:")), messages(example)]
    said = []
    for prefixes in (None, PrefixCache()):
        service = service_of(more={"prefix_cache": prefixes})
        with asking(service) as client:
            body = {"model": NAME, "max_tokens": 8, "temperature": 0}
            for question in asked:
                answer = client.post("/v1/chat/completions", json={**body, "messages": question})
                said.append(answer.json()["choices"][0]["message"]["content"])
            text = client.get("/metrics").text
        service.close()
    assert said[:3] == said[3:]
    assert prefixes is not None and prefixes.reused > 0
    rate = prefixes.reused / (prefixes.reused + prefixes.run)
    assert f'prefix_cache_hit_rate{{model_name="{NAME}"}} {rate}' in text
