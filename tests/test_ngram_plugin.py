"""The example package of docs/extending.md: a drafter and an engine from outside, by an entry
point; its answers are the full model's in every executor."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import RunCommand
from decoding import NEW, greedy
from fakes import Blip2FakeProcessor, examples
from families import one_row

from offramp import Adapter, ExitPolicy, generate
from offramp.adapter.certificate import VerificationSettings
from offramp.adapter.shipped import example_picture
from offramp.calibration.verification import Verification
from offramp.core import plugins
from offramp.core.decoding.drafting import DRAFTERS, Draft
from offramp.core.decoding.policy import policy_from_json, policy_to_json
from offramp.core.errors import InputError
from offramp.engines import ENGINES, engine_named
from offramp.features.input_processor import InputProcessor
from offramp.features.registration import register_drafter
from offramp.features.text_drafts import TextDrafts
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.graphs.runtime import GraphRuntime

PACKAGE = Path(__file__).resolve().parents[1] / "examples" / "ngram_plugin"
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
NAMES = ("llava", "blip2-t5", "gemma3")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package beside its metadata, as an installer writes it."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / f"{project['name'].replace('-', '_')}-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {module}" for name, module in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join([*lines, ""]))
    for folder in (tmp_path, PACKAGE):
        monkeypatch.syspath_prepend(folder)
    plugins._points.cache_clear()
    yield
    plugins._points.cache_clear()
    sys.modules.pop("offramp_ngram", None)
    for registry in (DRAFTERS, ENGINES):
        registry.pop("ngram", None)


def test_it_is_under_a_hundred_lines() -> None:
    assert (
        sum(len(file.read_text().splitlines()) for file in PACKAGE.iterdir() if file.is_file())
        < 100
    )


def test_once_installed_policies_and_commands_know_it(installed: None, run: RunCommand) -> None:
    assert ExitPolicy(drafts={"ngram": 0.0}).own_mode == "lossless"
    picture = example_picture("tiny-opt")
    asked = ["generate", "--adapter", "tiny-opt", "--image", picture, "--device", "cpu", "--json"]
    ids = []
    for more in (["--engine", "ngram", "--mode", "lossless"], ["--mode", "full"]):
        code, out, _ = run(*asked, *more)
        ids.append([step["id"] for step in json.loads(out)["steps"]])
    assert code == 0 and ids[0] == ids[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ["slots", "stack"])
@pytest.mark.parametrize("rows", [1, 4])
def test_its_answers_are_the_full_models(
    rows: int, engine: str, name: str, ngram: str, backbone: Any, batch: Any
) -> None:
    whole, inputs = backbone(name), batch(name, rows)
    policy = ExitPolicy(lossless=True, drafts={ngram: 0.0})
    before, whole.engine = whole.engine, engine
    try:
        made = generate(whole, inputs, policy=policy, max_new_tokens=NEW, do_sample=False)
    finally:
        whole.engine = before
    assert torch.equal(made.sequences, greedy(whole.model, inputs))
    # What this one writes in so few tokens repeats nothing.
    assert sum(accepted for _, accepted in made.rounds) > 0 or name == "gemma3"
    assert {*made.depths.flatten().tolist()} <= {0, whole.depth}


def test_an_engine_drafts_beside_rows_that_exit(
    ngram: str, backbone: Any, exits: Any, batch: Any
) -> None:
    whole, parts, rows = backbone("llava"), exits("llava"), batch("llava", 4)
    policy = ExitPolicy({2: 0.02}, drafts={ngram: 0.0})
    core = EngineCore(whole, parts, policy, EngineConfig(slots=3, limit=64))
    wanted = []
    for turn, mode in enumerate(["lossless", "early_exit", "full", "lossless"]):
        inputs = one_row("llava", rows, turn)
        alone = generate(whole, inputs, exits=parts, policy=policy.in_mode(mode), **GREEDY)
        wanted.append((core.add(Request(inputs, mode, options=GREEDY)), alone))
    core.run()
    for handle, alone in wanted:
        output = handle.result().output
        assert torch.equal(output.sequences, alone.sequences)
        assert torch.equal(output.depths, alone.depths)


def test_in_cuda_graphs_too(ngram: str, backbone: Any, exits: Any, batch: Any) -> None:
    adapter = Adapter(backbone("llava"), exits("llava"), ExitPolicy({2: 0.5}))
    inputs = one_row("llava", batch("llava", 1), 0)
    policy = replace(adapter.policy, lossless=True, drafts={ngram: 0.0})
    made = GraphRuntime(adapter, context=128).generate(inputs, policy=policy, **GREEDY)
    assert torch.equal(made.sequences, adapter.generate(inputs, mode="full", **GREEDY).sequences)
    assert sum(accepted for _, accepted in made.rounds) > 0


def test_a_sampled_answer_is_the_full_models_sample(ngram: str, backbone: Any, batch: Any) -> None:
    sampled = {"max_new_tokens": 12, "do_sample": True, "seed": 3, "temperature": 0.3}
    full, drafted = (
        generate(backbone("llava"), batch("llava", 1), policy=policy, **sampled)
        for policy in (ExitPolicy(), ExitPolicy(lossless=True, drafts={ngram: 0.0}))
    )
    assert torch.equal(full.sequences, drafted.sequences)


def test_the_engine_answers_losslessly(ngram: str, backbone: Any, exits: Any, batch: Any) -> None:
    adapter = Adapter(backbone("llava"), exits("llava"), ExitPolicy({2: 0.0}))
    ours = engine_named(ngram).open(adapter, threads=1)
    inputs = batch("llava", 1)
    made = ours.generate(inputs, **GREEDY)
    assert torch.equal(made.sequences, adapter.generate(inputs, mode="full", **GREEDY).sequences)


def test_its_answers_are_verified(ngram: str, backbone: Any, exits: Any) -> None:
    policy = ExitPolicy(lossless=True, drafts={ngram: 0.0})
    adapter = Adapter(backbone("blip2-opt"), exits("blip2-opt"), policy)
    encoder = InputProcessor(adapter.backbone, Blip2FakeProcessor("blip2-opt"))
    sizes = VerificationSettings(rows=(2,), slots=3, longest=12)
    paths = Verification(adapter, encoder, examples(3), settings=sizes).run()
    assert {"full", "lossless", "lossless, 2 rows", "lossless, among 3"} <= {p.path for p in paths}
    assert all(path.promised and path.exact for path in paths)


def test_a_policy_with_a_drafter_comes_back(ngram: str) -> None:
    policy = ExitPolicy({2: 0.5}, lossless=True, drafts={ngram: 0.0})
    assert policy_from_json(policy_to_json(policy)) == policy and policy.depths == (2,)


def test_an_unknown_drafter_is_refused(ngram: str) -> None:
    with pytest.raises(InputError, match=r"Drafter 'n_gram' is not known.*\n.*'ngram'"):
        ExitPolicy(drafts={"n_gram": 0.0})
    with pytest.raises(InputError, match="cannot be called 'my drafter'"):
        register_drafter("my drafter", lambda executor, depth: TextDrafts(executor, depth, max))


@pytest.mark.parametrize("wrong", [lambda ids, most: [7] * most, lambda ids, most: ()])
def test_wrong_drafts_change_no_token(
    wrong: Any, backbone: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        DRAFTERS, "wrong", lambda executor, depth: TextDrafts(executor, depth, wrong)
    )
    whole, inputs = backbone("llava"), batch("llava", 3)
    policy = ExitPolicy(lossless=True, drafts={"wrong": 0.0})
    made = generate(whole, inputs, policy=policy, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(made.sequences, greedy(whole.model, inputs))


def no_ngrams(ids: Any, most: int) -> Any:
    raise KeyError("no n-grams")


class OfItsOwn(TextDrafts):
    """Writes what is given, by a drafter's own method."""

    def __init__(self, executor: Any, depth: int, made: Any) -> None:
        super().__init__(executor, depth, lambda ids, most: ())
        self.made = made

    def draft(self, rows: Any, budgets: Any) -> Any:
        return None if self.made is None else [self.made for _ in rows]


WRONG: dict[str, tuple[Any, str]] = {
    "raises": (no_ngrams, "failed: KeyError: 'no n-grams'"),
    "none": (lambda ids, most: None, "failed: TypeError: 'NoneType'"),
    "text": (lambda ids, most: "the dog", "failed: TypeError: 'str'"),
    "digits": (lambda ids, most: ["3"], "failed: TypeError: 'str'"),
    "negative": (lambda ids, most: [-1] * most, "wrote -1"),
    "beyond": (lambda ids, most: [10**6] * most, "wrote 1000000"),
    "own_none": (None, "failed: TypeError"),
    "own_text": (Draft([3], ["a"]), "wrote 'a'"),  # type: ignore[list-item]
    "own_other": (Draft([3, 4, 5], [6]), "feeds"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_drafter_that_fails_fails_its_request_alone(
    how: str, backbone: Any, exits: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, said = WRONG[how]
    kind = OfItsOwn if how.startswith("own") else TextDrafts
    monkeypatch.setitem(DRAFTERS, "fails", lambda executor, depth: kind(executor, depth, made))
    policy = ExitPolicy({2: 0.02}, drafts={"fails": 0.0})
    core = EngineCore(backbone("llava"), exits("llava"), policy, EngineConfig(slots=2, limit=64))
    rows = batch("llava", 2)
    drafted, early = (
        core.add(Request(one_row("llava", rows, turn), mode, options=GREEDY))
        for turn, mode in enumerate(("lossless", "early_exit"))
    )
    core.run()
    with pytest.raises(InputError, match=rf"^The drafter 'fails' {said}") as caught:
        drafted.result()
    assert len(str(caught.value).splitlines()) == 2
    assert early.result().output.sequences.shape[0] == 1
