"""`offramp verify`: what is sound holds, what is broken is found, and both are kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from command_line import RunCommand, assert_two_lines
from fakes import Blip2FakeProcessor, examples
from families import build

from offramp.adapter.adapter import Adapter
from offramp.adapter.certificate import Certificate, PathResult, Run, VerificationSettings, rows
from offramp.adapter.model_card import model_card, with_verified
from offramp.adapter.records import CARD, CERTIFICATE
from offramp.adapter.shipped import load_tiny
from offramp.calibration import verification
from offramp.calibration.verification import (
    Verification,
    _between,
    _compared,
    _Row,
    with_thresholds,
)
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import DataError, InputError
from offramp.core.executors.slots.executor import SlotExecutor
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.save_and_load import read_config
from offramp.engines.packed import prepack
from offramp.features.exact_batches import EXACT_BATCHES
from offramp.features.input_processor import InputProcessor

SIZES = VerificationSettings(rows=(2,), slots=3, longest=6)
ALONE = ("full", "early exit", "lossless")


def verified(
    name: str,
    backbone: Any,
    exits: Any,
    dtype: torch.dtype = torch.float32,
    first: float | None = None,
    **more: Any,
) -> list[PathResult]:
    """What comes out for a family's tiny model; about half of the tokens exit."""
    adapter = Adapter(backbone(name, dtype), exits(name, dtype))
    encoder = InputProcessor(adapter.backbone, Blip2FakeProcessor(name))
    some = examples(3)
    policy = with_thresholds(adapter.policy, adapter, encoder, some)
    if first is not None:
        policy = replace(policy, first=dict.fromkeys(adapter.exits.depths, first))
    settings = more.pop("settings", SIZES)
    one = Verification(adapter, encoder, some, policy=policy, settings=settings, **more)
    told: list[int] = []
    paths = one.run(told.append)
    assert sum(told) == one.answers or any(path.refused for path in paths)
    return paths


def broken(paths: list[PathResult]) -> set[str]:
    return {path.path for path in paths if path.broken}


@pytest.mark.slow
@pytest.mark.parametrize("first", [0.0, 1.0])
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava"])
def test_first_tokens_are_held_to_their_own_thresholds(
    name: str, first: float, backbone: Any, exits: Any
) -> None:
    paths = verified(name, backbone, exits, first=first)
    assert all(path.promised and path.exact for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize("trust", [0.0, 1e-3, 2.0])
def test_by_trust_answers_are_held_to_what_one_run_offers(
    trust: float, backbone: Any, exits: Any
) -> None:
    adapter = Adapter(backbone("blip2-opt"), exits("blip2-opt"))
    encoder = InputProcessor(adapter.backbone, Blip2FakeProcessor("blip2-opt"))
    policy = ExitPolicy(trust=trust, drafts=dict.fromkeys(adapter.exits.depths, 0.0))
    one = Verification(adapter, encoder, examples(3), policy=policy, settings=SIZES)
    paths = one.run()
    assert {path.path for path in paths} >= set(ALONE)
    assert all(path.promised and path.exact for path in paths)
    assert f"by trust, {trust:g}" in one.certified(paths, "torch", "", ["verify"]).words


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "qwen2-vl"])
def test_what_is_sound_is_exact(name: str, backbone: Any, exits: Any) -> None:
    paths = verified(name, backbone, exits)
    assert [path.path for path in paths[:3]] == [*ALONE]
    beside = {
        f"{mode}, {where}" for mode in ("full", "lossless") for where in ("2 rows", "among 3")
    }
    assert beside <= {path.path for path in paths}
    assert all(path.promised and path.exact and path.tokens >= 3 for path in paths)
    near = [p.logits_apart for p in paths if p.logits_apart is not None]
    assert len(near) == 3 and max(near) < 1e-4
    exiting = next(path for path in paths if path.path == "early exit")
    assert exiting.scores_apart is not None and exiting.scores_apart < 1e-4


@pytest.mark.slow
def test_a_model_that_runs_through_its_own_stack_is_held_to_the_same(
    backbone: Any, exits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = backbone("blip2-opt")
    monkeypatch.setattr(whole, "engine", "stack")
    assert broken(verified("blip2-opt", backbone, exits)) == set()


# -- broken executors ------------------------------------------------------------------------------


def wrong_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head reads another state than the exit's."""
    plain = SlotExecutor.feed

    def feed(self: SlotExecutor, *given: Any, **more: Any) -> Any:
        output = plain(self, *given, **more)
        return output if output.state is None else replace(output, state=-output.state)

    monkeypatch.setattr(SlotExecutor, "feed", feed)


def swapped_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of one call come in another order."""
    plain = SlotExecutor.full

    def full(self: SlotExecutor, handles: Any, *given: Any, **more: Any) -> Any:
        return plain(self, handles, *given, **more).flip(0)

    monkeypatch.setattr(SlotExecutor, "full", full)


def wrong_beyond_40(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of a text that is longer than any of the prompts."""
    plain = SlotExecutor.feed

    def feed(self: SlotExecutor, handles: Any, ids: Any, columns: Any, **more: Any) -> Any:
        output = plain(self, handles, ids, columns, **more)
        short = output.state is None or max(columns) < 40
        return output if short else replace(output, state=-output.state)

    monkeypatch.setattr(SlotExecutor, "feed", feed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage, found, sound",
    [
        (wrong_beyond_40, {"early exit"}, {"full", "early exit, 2 rows"}),
        (wrong_states, {"early exit"}, {"full"}),
        (swapped_rows, {"full, 2 rows"}, {"full", "lossless"}),
    ],
)
def test_a_broken_executor_is_found(
    damage: Callable[[pytest.MonkeyPatch], None],
    found: set[str],
    sound: set[str],
    backbone: Any,
    exits: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(monkeypatch)
    wrong = broken(verified("blip2-opt", backbone, exits))
    assert found <= wrong and not sound & wrong


@pytest.mark.slow
def test_an_error_of_a_model_is_a_broken_promise_and_a_refusal_is_none(
    backbone: Any, exits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(error: Exception) -> Callable[..., Any]:
        def batched(*_: Any) -> Any:
            raise error

        return batched

    for error, told in ((IndexError("out of range"), True), (InputError("No.", "Ask."), False)):
        monkeypatch.setattr(Verification, "_batched", raises(error))
        paths = verified("blip2-opt", backbone, exits)
        refused = [path for path in paths if path.refused]
        assert len(refused) == 3 and not any(path.exact for path in refused)
        assert {path.broken for path in refused} == {told}
        assert all(path.promised for path in refused)
        run = run_of(paths)
        held = len(paths) - 3
        assert f"{held} of {len(paths)} promises hold" in run.words
        assert ("3 refused" in run.words) is not told


def test_of_two_answers_each_longer_than_the_other_every_token_more_differs() -> None:
    short, long = _Row([1, 2], [3, 3]), _Row([1, 2, 7, 7], [3, 3, 6, 6])
    found = _compared("a", "b", True, [long, short, short], [short, long, short])
    assert (found.answers, found.answers_differ) == (3, 2)
    assert (found.tokens, found.tokens_differ) == (4 + 4 + 2, 2 + 2)
    assert found.broken and not found.exact


# -- other numbers ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_half_precision_promises_nothing_and_counts(backbone: Any, exits: Any) -> None:
    paths = verified("blip2-opt", backbone, exits, torch.bfloat16)
    assert broken(paths) == set() and not any(path.promised for path in paths)
    said = run_of(paths).words
    differ = sum(path.tokens_differ for path in paths)
    tokens = sum(path.tokens for path in paths)
    assert f"{differ} of {tokens} tokens differ where rounding may" in said


@pytest.mark.slow
@fakes.NEEDS_BF16
def test_in_company_half_precision_promises_where_batches_are_exact() -> None:
    whole = Backbone(build("blip2-opt", torch.bfloat16)).with_decoding(exact_batches=EXACT_BATCHES)
    some = Exits(whole, (2, 4)).requires_grad_(False)
    prepack(whole, ExitSet.of(some), every=True)
    paths = verified("blip2-opt", lambda *_: whole, lambda *_: some, torch.bfloat16)
    kept = {path.path for path in paths if path.promised and not path.declined}
    assert kept == {f"{mode}, among 3" for mode in ("full", "early exit", "lossless")}
    assert broken(paths) == set()
    rows = [str(path.refused) for path in paths if path.path.endswith("2 rows")]
    assert rows and all("one at a time" in why for why in rows)


class Elsewhere:
    """A runtime in numbers of its own: the tokens of another seed; lossless as damaged. Rows of a
    batch as swapped."""

    name = "elsewhere q4"

    def __init__(self, adapter: Adapter, damaged: bool, rows: int = 1, swaps: bool = False) -> None:
        self.adapter, self.damaged, self.rows, self.swaps = adapter, damaged, rows, swaps

    def generate(self, inputs: Any, *, policy: Any = None, **options: Any) -> Any:
        made = self.adapter.generate(inputs, policy=policy, **options)
        wrong = made.sequences.clone()
        wrong[:, -made.depths.shape[1]] += 1 + (self.damaged and policy.lossless)
        if self.swaps:
            return replace(made, sequences=wrong.flip(0), depths=made.depths.flip(0))
        return replace(made, sequences=wrong)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_runtime_in_other_numbers_is_held_to_its_own_full_depth(
    damaged: bool, backbone: Any, exits: Any
) -> None:
    adapter = Adapter(backbone("blip2-opt"), exits("blip2-opt"))
    paths = verified("blip2-opt", backbone, exits, runtime=Elsewhere(adapter, damaged))
    assert [path.path for path in paths] == [*ALONE]
    assert [path.promised for path in paths] == [False, False, True]
    assert paths[0].tokens_differ == paths[0].answers_differ == paths[0].answers
    assert broken(paths) == ({"lossless"} if damaged else set())


@pytest.mark.parametrize("swaps", [False, True])
def test_rows_of_a_runtime_are_held_to_what_it_writes_alone(
    swaps: bool, backbone: Any, exits: Any
) -> None:
    """As many as it takes at once."""
    adapter = Adapter(backbone("blip2-opt"), exits("blip2-opt"))
    runtime = Elsewhere(adapter, damaged=False, rows=3, swaps=swaps)
    paths = verified(
        "blip2-opt", backbone, exits, runtime=runtime, settings=replace(SIZES, rows=(2, 3, 4))
    )
    modes = ("full", "early exit", "lossless")
    names = {f"{mode}, {rows} rows" for mode in modes for rows in (2, 3)}
    assert {path.path for path in paths} == {*ALONE, *names}
    assert names & broken(paths) == (names if swaps else set())


def test_bad_sizes_are_refused() -> None:
    for wrong in ({"rows": (1,)}, {"slots": 0}, {"longest": 0}):
        with pytest.raises(InputError):
            VerificationSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no prompts"):
        Verification(None, None, [])  # type: ignore[arg-type]


# -- the certificate -------------------------------------------------------------------------------


def run_of(paths: list[PathResult], **more: Any) -> Run:
    named = {
        "engine": "torch (slots)",
        "quantized": "",
        "dtype": "float32",
        "device": "cpu",
        "exits": "e" * 64,
        "backbone": "b",
        "policy": "p",
        "thresholds": "0.5 at depth 2",
        "prompts": 3,
        "longest": 8,
        "paths": paths,
        "provenance": {"date": "2026-11-27T00:00"},
    }
    return Run(**{**named, **more})


GOOD = PathResult("full", "x", True, 3, 0, 24, 0, 1e-7, None)
BAD = PathResult("lossless", "x", True, 3, 1, 24, 2)


def test_a_certificate_reads_as_it_was_written_and_a_later_run_replaces_its_like(
    tmp_path: Path,
) -> None:
    first = run_of([GOOD, BAD])
    both = Certificate().with_run(first).with_run(run_of([GOOD], engine="packed (slots)"))
    both.write(tmp_path / "c.json")
    assert Certificate.read(tmp_path / "c.json") == both
    again = both.with_run(run_of([GOOD], prompts=9))
    assert [run.prompts for run in again.runs] == [3, 9]
    assert "1 of 2 promises hold" in first.words and "torch (slots), float32 on cpu" in first.words
    assert both.of_exits("other") is None and both.of_exits("e" * 64) == both


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"tokens_differ": 2', '"tokens_differ": 0'),
        lambda text: text[: len(text) // 2],
        lambda _: "[]",
        lambda _: '{"runs": [{"paths": 3}], "digest": "x"}',
    ],
)
def test_a_changed_certificate_is_refused(change: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    Certificate([run_of([GOOD, BAD])]).write(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match="verify") as error:
        Certificate.read(path)
    assert len(str(error.value).splitlines()) == 2


def test_an_adapter_carries_it_and_drops_that_of_other_exits(
    saved_adapter: Path, opt: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = (read_config(saved_adapter).files or {})["exits.safetensors"]
    kept = Certificate([run_of([GOOD], exits=digest)])
    kept.write(saved_adapter / CERTIFICATE)
    adapter = Adapter.load(saved_adapter, opt)
    assert adapter.certificate == kept and "1 of 1 promises hold" in repr(adapter)
    assert "1 of 1 promises hold" in model_card(opt, adapter)  # type: ignore[arg-type]
    adapter.save(tmp_path / "again")
    assert Adapter.load(tmp_path / "again", opt).certificate == kept
    Certificate([run_of([GOOD])]).write(saved_adapter / CERTIFICATE)
    assert Adapter.load(saved_adapter, opt).certificate is None
    (saved_adapter / CERTIFICATE).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert Adapter.load(saved_adapter, opt).certificate is None
    assert CERTIFICATE in caplog.text
    Adapter.load(saved_adapter, opt).save(saved_adapter)  # what is void goes with a save
    assert not (saved_adapter / CERTIFICATE).exists()


def test_a_card_keeps_what_was_edited() -> None:
    certificate = Certificate([run_of([GOOD])])
    card = "# Mine\n\n## Verified\n\nearlier\n\n## Use\n\nmy own words\n"
    made = with_verified(card, certificate)
    assert made.count("## Verified") == 1 and "earlier" not in made and "1 of 1 promises" in made
    assert made.startswith("# Mine\n") and made.endswith("## Use\n\nmy own words\n")
    assert with_verified(made, certificate) == made
    assert with_verified("# Mine\n", certificate).startswith("# Mine\n\n## Verified\n")


# -- the command -----------------------------------------------------------------------------------

SMALL = ("--quick", "--limit", 2, "--max-new-tokens", 5)


@pytest.mark.slow
def test_the_command_prints_a_table_and_keeps_a_certificate(
    run: RunCommand, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = b"caf\xe9\n"  # not UTF-8
    (adapter / CARD).write_bytes((adapter / CARD).read_bytes() + own)
    code, out, err = run("verify", adapter, *SMALL[1:], "--slots", 2)
    assert code == 0, err
    assert "held to" in out and "lossless, 2 rows" in out and "NO" not in out
    assert "; --quick writes few." in caplog.text
    [kept] = Certificate.read(adapter / CERTIFICATE).runs
    assert (
        kept.engine == "torch (slots)"
        and kept.prompts == 2
        and not any(path.broken for path in kept.paths)
    )
    assert kept.provenance["versions"]["torch"] == torch.__version__
    card = (adapter / CARD).read_bytes()
    assert kept.words.encode() in card and own.strip() in card
    assert kept.words in run("inspect", adapter)[1]
    assert kept.words in run("inspect", adapter, "--json")[1]


@pytest.mark.slow
def test_a_quick_run_does_not_advise_itself(
    run: RunCommand, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run("verify", adapter, *SMALL)[0] == 0
    assert "answers takes up to" in caplog.text and "writes few" not in caplog.text


@pytest.mark.slow
def test_given_prompts_and_json(
    run: RunCommand, adapter: Path, unlabelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    asked = ("verify", adapter, *SMALL, "--data", unlabelled, "--out", out, "--json")
    code, text, _ = run(*asked)
    found = json.loads(text)
    assert code == 0 and found["prompts"] == 2 and found["dtype"] == "float32"
    assert {"path", "tokens", "tokens_differ", "promised"} <= set(found["paths"][0])
    assert Certificate.read(out).runs[0].to_json() == found
    assert run(*asked)[0] == 0  # its own file is replaced
    out.write_text("mine")
    assert_two_lines(run(*asked), "certificate")


@pytest.mark.slow
def test_the_command_fails_where_a_promise_is_broken(
    run: RunCommand, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Adapter.load(adapter, load_tiny("opt")[0])
    whole.with_policy(ExitPolicy(dict.fromkeys(whole.exits.depths, 0.0))).save(adapter)
    wrong_states(monkeypatch)
    code, out, err = run("verify", adapter, *SMALL)
    lines = err[err.index("error: ") :].strip().splitlines()
    assert code == 1 and "NO" in out
    assert len(lines) == 2 and "early exit" in lines[0]
    assert any(p.broken for p in Certificate.read(adapter / CERTIFICATE).runs[0].paths)


def test_mistakes_are_two_lines(run: RunCommand, adapter: Path, tmp_path: Path) -> None:
    assert_two_lines(run("verify", tmp_path / "none", *SMALL), "none")
    assert_two_lines(run("verify", adapter, "--engine", "llama.cpp"), "--gguf")
    assert run("verify", adapter, "--slots", "0")[0] == 2


def test_an_adapter_without_thresholds_is_verified_with_the_middle_of_its_scores(
    backbone: Any, exits: Any
) -> None:
    adapter = Adapter(backbone("blip2-opt"), exits("blip2-opt"))
    encoder = InputProcessor(adapter.backbone, Blip2FakeProcessor("blip2-opt"))
    chosen = with_thresholds(ExitPolicy(), adapter, encoder, examples(2))
    made = adapter.generate(encoder.prompts(examples(1)), policy=chosen, max_new_tokens=12)
    assert set(chosen.thresholds) == set(adapter.exits.depths)
    assert len(set(made.depths.flatten().tolist())) > 1
    own = ExitPolicy({adapter.exits.depths[0]: 0.3})
    assert with_thresholds(own, adapter, encoder, examples(1)) is own


def test_a_chosen_threshold_is_no_score_that_rounding_moves_over_it() -> None:
    for seed in range(20):
        scores = torch.rand(3 + seed, generator=torch.Generator().manual_seed(seed))
        chosen = _between(scores)
        reached = (scores >= chosen).sum().item()
        assert 0 < reached < len(scores) and (scores - chosen).abs().min() > 1e-4
    assert _between(torch.tensor([])) == 1.0


def test_own_examples_are_as_many_as_asked_and_all_another(opt: Any, exits: Any) -> None:
    some = verification.own_examples(Adapter(opt, exits("blip2-opt")), 6)
    assert len({example.key for example in some}) == 6
    assert len({example.prompt for example in some}) > 1


def test_certificates_that_ship_are_whole_and_name_no_machine() -> None:
    root = Path(__file__).parents[2]
    files = [*root.glob(f"src/**/{CERTIFICATE}"), *root.glob(f"photo-model/**/{CERTIFICATE}")]
    assert files
    for file in files:
        for run in Certificate.read(file).runs:
            assert "/" not in run.provenance["command"]


def test_a_score_that_one_side_lacks_is_said_in_words() -> None:
    ours, theirs = _Row([1], [2], scores=[0.5]), _Row([1], [2], scores=[float("nan")])
    [told] = rows([_compared("full", "its own", False, [ours], [theirs])])
    assert "scores missing on one side" in told
    [told] = rows([_compared("full", "its own", False, [ours], [ours])])
    assert "scores 0.0e+00" in told
