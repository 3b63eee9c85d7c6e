"""Answers by a JSON schema: whoever says a token obeys it, in every mode and in company."""

from __future__ import annotations

import json
import random
import time
from decimal import Decimal
from typing import Any

import jsonschema
import pytest
import torch
from fakes import picture, word_level
from schemas import Schema, drawn, random_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from offramp import (
    Adapter,
    BatchEngine,
    EngineConfig,
    Example,
    ExitPolicy,
    JsonConstraint,
    generate,
)
from offramp.core.decoding.scheduler import Schedule
from offramp.core.errors import InputError
from offramp.core.models.exits import Exits, ExitSet
from offramp.features.input_processor import InputProcessor
from offramp.serving.serial import SerialCore

NEW = 120
MODES = {
    "full": ExitPolicy(),
    "first exit": ExitPolicy({1: 0.0}),
    "some exits": ExitPolicy({1: 0.6, 3: 0.2}),
    "lossless": ExitPolicy({1: 0.0, 3: 0.0}, lossless=True),
}
BOTH: Schema = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "b": {"enum": [1, "x"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def asked(*numbers: int) -> dict[str, Any]:
    backbone, _, processor = random_model()
    examples = [Example(picture(n), "What is shown?", (), str(n)) for n in numbers]
    return InputProcessor(backbone, processor).prompts(examples)


def written(schema: Schema, policy: ExitPolicy, *, rows: int = 1, **options: Any) -> Any:
    backbone, exits, processor = random_model()
    constraint = JsonConstraint(schema, processor)
    asks = {"max_new_tokens": NEW, "do_sample": False, **options}
    return generate(
        backbone,
        asked(*range(rows)),
        exits=exits,
        policy=policy,
        logits_processor=[constraint],
        **asks,
    )


def check(schema: Schema, ids: list[int]) -> bool:
    """Whether an answer ended by itself; then it must be valid."""
    tokenizer = random_model()[2].tokenizer
    ids = [token for token in ids if token != tokenizer.pad_token_id]
    if ids[-1] != tokenizer.eos_token_id:
        return False
    jsonschema.Draft202012Validator(schema).validate(
        json.loads(tokenizer.decode(ids, skip_special_tokens=True))
    )
    return True


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_answer_that_ended_by_itself_is_valid(mode: str) -> None:
    ended = 0
    for seed in range(16):
        schema = drawn(random.Random(f"{mode} {seed}"))
        made = written(schema, MODES[mode], do_sample=True, top_k=0, temperature=1.5, seed=seed)
        ended += check(schema, made.new_tokens[0].tolist())
    assert ended > 12


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 4])
def test_every_answer_of_an_engine_is_valid(slots: int) -> None:
    """Requests with schemas of their own, and one without, beside each other."""
    backbone, exits, processor = random_model()
    policy, modes = MODES["some exits"], ["full", "early_exit", "lossless"]
    adapter = Adapter(backbone, exits, policy)
    if slots == 1:
        engine = BatchEngine(SerialCore(adapter, limit=256))
    else:
        engine = BatchEngine(adapter, None, EngineConfig(slots, 256, schedule=Schedule.of(slots)))
    how = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0}
    with engine:
        handles = []
        for seed in range(12):
            schema = drawn(random.Random(f"engine {seed}"))
            rules = (
                {} if seed % 10 == 9 else {"logits_processor": [JsonConstraint(schema, processor)]}
            )
            inputs = asked(seed % 5)
            handle = engine.submit(
                inputs, mode=modes[seed % 3], seed=seed, wait=True, **rules, **how
            )
            handles.append((schema if rules else None, handle))
        ended = [
            schema is not None and check(schema, handle.result().output.new_tokens[0].tolist())
            for schema, handle in handles
        ]
    assert sum(ended) > 9


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sampled", [False, True])
def test_lossless_is_the_constrained_full_model(rows: int, sampled: bool) -> None:
    how = {"do_sample": True, "top_k": 0, "seed": 5} if sampled else {}
    full = written(BOTH, ExitPolicy(), rows=rows, **how)
    for policy in (MODES["lossless"], ExitPolicy({1: 1.0})):  # at which none ever exits
        ours = written(BOTH, policy, rows=rows, **how)
        assert torch.equal(ours.sequences, full.sequences)
    assert all(check(BOTH, row.tolist()) for row in full.new_tokens)


def test_full_depth_is_what_stock_generate_gives() -> None:
    backbone, _, processor = random_model()
    inputs = asked(0)
    row = JsonConstraint(BOTH, processor).of_row(
        inputs["input_ids"].shape[1], {processor.tokenizer.eos_token_id}
    )
    theirs = backbone.model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, logits_processor=[row]
    )
    assert torch.equal(written(BOTH, ExitPolicy()).sequences, theirs)


def test_drafts_that_an_exit_writes_on_from_its_own_state_obey() -> None:
    backbone, _, processor = random_model()
    drafting = Exits(backbone, (2,), kind="drafting")
    constraint = JsonConstraint(BOTH, processor)
    made = generate(
        backbone,
        asked(0),
        exits=drafting,
        policy=ExitPolicy(lossless=True),
        do_sample=False,
        max_new_tokens=NEW,
        logits_processor=[constraint],
    )
    assert made.rounds and torch.equal(made.sequences, written(BOTH, ExitPolicy()).sequences)


def test_a_token_that_alone_is_allowed_is_certain() -> None:
    made = written({"const": "stop"}, ExitPolicy({1: 1.0}))
    assert (made.depths == 1).all() and (made.scores == 1).all()


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_an_exit_that_can_say_nothing_that_is_allowed_leaves_it_to_the_layers_above(
    threshold: float,
) -> None:
    backbone, modules, processor = random_model()
    ids = processor.tokenizer.convert_tokens_to_ids(list("abcdefgh"))
    exits = ExitSet(modules, shortlist=torch.tensor(sorted(ids)))
    made = generate(
        backbone,
        asked(0),
        exits=exits,
        policy=ExitPolicy({1: threshold}, shortlist=True),
        logits_processor=[JsonConstraint({"const": {"ab": 7}}, processor)],
        max_new_tokens=NEW,
    )
    assert check({"const": {"ab": 7}}, made.new_tokens[0].tolist())
    spelt = [processor.tokenizer.decode([token]) for token in made.new_tokens[0]]
    assert {t for t, d in zip(spelt, made.depths[0], strict=True) if d < backbone.depth} == set(
        "ab"
    )


def test_a_token_that_no_exit_could_say_has_no_score_of_one_that_waited() -> None:
    backbone, modules, processor = random_model()
    ids = processor.tokenizer.convert_tokens_to_ids(list("abcdefgh"))
    exits = ExitSet(modules, shortlist=torch.tensor(sorted(ids)))
    made = generate(
        backbone,
        asked(0),
        exits=exits,
        policy=ExitPolicy({1: 1.0}, shortlist=True),
        logits_processor=[JsonConstraint({"enum": ["ab", "cd"]}, processor)],
        max_new_tokens=NEW,
    )
    quote, chosen, alone, end = made.scores[0, :4].tolist()
    assert chosen < 1 and alone == 1
    assert quote != quote and end != end


def test_an_answer_that_is_cut_is_a_beginning() -> None:
    made = written(BOTH, MODES["first exit"], max_new_tokens=5)
    text = random_model()[2].tokenizer.decode(made.new_tokens[0])
    assert made.new_tokens.shape[1] == 5 and text.startswith("{") and not text.endswith("}")


@pytest.mark.parametrize(
    "schema, says",
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "https://example.org/schema"}, "example.org"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "Unsatisfiable"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is unsatisfiable"),
        (False, "no JSON object"),
        ([], "no JSON object"),
        ({"const": {1}}, "JSON"),
        ({"$ref": "#"}, "nothing"),
        ({"type": "string", "pattern": "a("}, "a( error: unclosed group"),
    ],
)
def test_a_schema_that_is_not_supported_is_refused_by_name(schema: Any, says: str) -> None:
    with pytest.raises(InputError, match="JSON schema") as error:
        JsonConstraint(schema, random_model()[2])
    assert says in error.value.problem


@pytest.mark.parametrize(
    "schema",
    [
        {"multipleOf": 999_983},
        {"multipleOf": 9.99983},
        {"multipleOf": -999_983},
        {"allOf": [{"multipleOf": 101}, {"multipleOf": 103}]},
        {"properties": {f"{n}": {"multipleOf": n} for n in range(1, 700)}},
        {"items": {"multipleOf": 1e300}},
    ],
)
def test_divisors_that_take_seconds_to_follow_are_refused_at_once(schema: Schema) -> None:
    processor = random_model()[2]
    begun = time.thread_time()
    with pytest.raises(InputError, match="multipleOf"):
        JsonConstraint(schema, processor)
    assert time.thread_time() - begun < 0.5


@pytest.mark.parametrize("step", [5, 0.01, 60, 9973, 2.5])
def test_usual_divisors_are_followed(step: float) -> None:
    made = written(
        {"type": "number", "multipleOf": step, "minimum": 1, "maximum": 99_999}, MODES["first exit"]
    )
    text = random_model()[2].tokenizer.decode(made.new_tokens[0], skip_special_tokens=True)
    assert Decimal(text) % Decimal(str(step)) == 0


def test_properties_may_have_the_name_of_a_rule() -> None:
    schema = {"type": "object", "properties": {"multipleOf": {"const": 999_983}}}
    assert JsonConstraint(schema, random_model()[2])


def test_what_may_come_goes_by_the_answer_asked_about_alone() -> None:
    """A draft that ended is taken back: behind the shorter text all may come again."""
    tokenizer = random_model()[2].tokenizer
    end = tokenizer.eos_token_id
    row = JsonConstraint({"type": "integer"}, tokenizer).of_row(1, {end})
    scores = torch.zeros(1, len(tokenizer))
    one = [tokenizer.convert_tokens_to_ids("1")]
    begun = torch.tensor([[end, *one]])
    first = row(begun, scores)
    only = row(torch.tensor([[end, *one, end]]), scores)
    assert only.isfinite().sum() == 1
    assert first.isfinite().sum() > 1 and torch.equal(row(begun, scores), first)


def test_rules_that_contradict_a_schema_are_an_error() -> None:
    with pytest.raises(InputError, match="No token"):
        written({"const": 1}, ExitPolicy({1: 0.0}), min_new_tokens=20)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(InputError, match=r"llguidance.*\n.*pip install .*\[json\]"):
        JsonConstraint({}, random_model()[2])


# -- tokenizers ------------------------------------------------------------------------------------


def fast(tokenizer: Tokenizer) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


LETTERS = [*'{}[]":,.-0123456789abcdefgh', "▁", "▁a", "ab"]


def llama() -> Any:
    """Byte fallback and a mark for spaces, one before every text."""
    pieces = ["<unk>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *LETTERS]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(
        models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "</s>"])
    return fast(made)


def unigram(letters: list[str]) -> Any:
    """As T5's."""
    made = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in letters)], 0)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.add_special_tokens(["<unk>", "</s>"])
    return fast(made)


def walked(schema: Schema, tokenizer: Any, seed: int) -> list[int]:
    """An answer drawn from what is allowed."""
    row = JsonConstraint(schema, tokenizer).of_row(1, {tokenizer.eos_token_id})
    draw, ids = torch.Generator().manual_seed(seed), torch.tensor([[1]])
    while ids.shape[1] < 100 and (ids.shape[1] == 1 or ids[0, -1] != tokenizer.eos_token_id):
        scores = row(ids, torch.zeros(1, len(tokenizer) + 3))  # as padded embeddings
        token = torch.multinomial(scores.softmax(-1), 1, generator=draw)
        ids = torch.cat([ids, token], 1)
    return ids[0, 1:].tolist()


@pytest.mark.parametrize("tokenizer", [llama(), unigram(LETTERS)], ids=["llama", "t5"])
def test_tokens_with_a_mark_for_spaces_write_json(tokenizer: Any) -> None:
    schema: Schema = {
        "type": "object",
        "required": ["a b"],
        "additionalProperties": False,
        "properties": {"a b": {"enum": ["a", " ab", "ba  a"]}, "c": {"const": -12}},
    }
    for seed in range(20):
        ids = walked(schema, tokenizer, seed)
        assert ids[-1] == tokenizer.eos_token_id
        jsonschema.validate(json.loads(tokenizer.decode(ids, skip_special_tokens=True)), schema)


@pytest.mark.parametrize(
    "tokenizer", [word_level(), unigram(list("abc:,"))], ids=["words", "no braces"]
)
def test_a_vocabulary_that_cannot_write_json_is_an_error(tokenizer: Any) -> None:
    says = r"can write|cannot be followed|how this tokenizer|end token"
    with pytest.raises(InputError, match=says):
        walked({"type": "object"}, tokenizer, 0)
