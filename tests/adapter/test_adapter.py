"""What an adapter keeps and tells; what is damaged is a clear error. Law 7 has its own file."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import DEPTHS, POLICY, trained
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from offramp.adapter.adapter import Adapter
from offramp.adapter.model_card import model_card as card_of
from offramp.adapter.records import CARD
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import AdapterError, InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.save_and_load import CONFIG, DISCRIMINATORS, EXITS, FORMAT, SEEN
from offramp.core.storage import digest_file
from offramp.promises.conditions import Conditions

Build = Callable[..., Any]


def model_card(adapter: Adapter) -> str:
    return card_of(adapter.backbone, adapter)


def unsealed(folder: Path) -> dict[str, Any]:
    """adapter.json without its digest, as a test may change it."""
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    del config["digest"]
    return config


# -- what comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        POLICY,
        ExitPolicy({4: 0.5}, lossless=True, max_draft=3),
        ExitPolicy({4: 0.5}, drafts={2: 0.0}),
        ExitPolicy({4: 0.5}, score="margin", max_draft=3),
    ],
)
def test_the_policy_comes_back(policy: ExitPolicy, opt: Any, tmp_path: Path) -> None:
    trained(opt, policy=policy).save(tmp_path / "adapter")
    assert Adapter.load(tmp_path / "adapter", opt).policy == policy


def test_provenance_and_metrics_come_back(saved_adapter: Path, opt: Any) -> None:
    loaded, saved = Adapter.load(saved_adapter, opt), trained(opt)
    assert (loaded.provenance, loaded.metrics) == (saved.provenance, saved.metrics)


PROMISE = {
    "risk": "disagreement",
    "target": 0.01,
    "confidence": 0.95,
    "measured": 0.002,
    "bound": 0.0085,
    "n": 1234,
    "method": "upper_bound",
    "data_digest": "feed" * 16,
}


def test_a_promise_and_what_was_seen_come_back(opt: Any, tmp_path: Path) -> None:
    seen = {"train": ["aa", "bb"], "calibration": ["cc"]}
    saved = replace(trained(opt), seen=seen).with_policy(POLICY, PROMISE)
    saved.save(tmp_path / "adapter")
    loaded = Adapter.load(tmp_path / "adapter", opt)
    assert (loaded.policy, loaded.calibration, loaded.seen) == (POLICY, PROMISE, seen)


def test_a_promise_does_not_outlive_its_policy(opt: Any) -> None:
    promised = trained(opt).with_policy(POLICY, PROMISE)
    assert promised.with_policy(POLICY).calibration == PROMISE
    assert promised.with_policy(ExitPolicy({2: 0.1})).calibration is None
    drafting = replace(POLICY, drafts={2: 0.1})  # changes no output
    assert promised.with_policy(drafting).calibration == PROMISE


def test_an_adapter_from_before_there_were_promises_loads_without(
    saved_adapter: Path, opt: Any
) -> None:
    config = unsealed(saved_adapter)
    del config["calibration"]
    (saved_adapter / CONFIG).write_text(json.dumps(config))
    loaded = Adapter.load(saved_adapter, opt)
    assert loaded.calibration is None and loaded.seen == {}


@pytest.mark.parametrize("text", ["", "[]", "null", '{"train": 3}'])
def test_damaged_notes_of_what_was_seen_are_refused(
    text: str, saved_adapter: Path, opt: Any
) -> None:
    (saved_adapter / SEEN).write_text(text)
    config = {n: v for n, v in unsealed(saved_adapter).items() if n != "files"}
    (saved_adapter / CONFIG).write_text(
        json.dumps(config)
    )  # as in adapters from before the digests
    with pytest.raises(AdapterError, match=SEEN):
        Adapter.load(saved_adapter, opt)


def test_exits_saved_over_others_do_not_inherit_what_those_saw(opt: Any, tmp_path: Path) -> None:
    replace(trained(opt), seen={"train": ["aa"]}).save(tmp_path / "adapter")
    trained(opt).save(tmp_path / "adapter")
    assert Adapter.load(tmp_path / "adapter", opt).seen == {}


def test_a_policy_for_other_depths_is_refused(opt: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no exit stands"):
        trained(opt).with_policy(ExitPolicy({3: 0.5}))
    with pytest.raises(InputError, match="no exit stands"):
        trained(opt).with_policy(ExitPolicy(drafts={3: 0.5}))
    with pytest.raises(InputError, match="no exit stands"):
        trained(opt, policy=ExitPolicy({3: 0.5})).save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# -- damage -----------------------------------------------------------------------------------


def test_another_format_version_is_refused(saved_adapter: Path, opt: Any) -> None:
    config = unsealed(saved_adapter)
    (saved_adapter / CONFIG).write_text(json.dumps({**config, "format": FORMAT + 1}))
    with pytest.raises(AdapterError, match=f"format {FORMAT + 1}.*reads format {FORMAT}"):
        Adapter.load(saved_adapter, opt)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "\udcff"])
def test_a_config_that_is_no_config_is_refused(text: str, saved_adapter: Path, opt: Any) -> None:
    (saved_adapter / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(AdapterError):
        Adapter.load(saved_adapter, opt)


NOT_A_DICT = (None, "x", 3, [99])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, v) for key in ("backbone", "policy", "metrics", "provenance") for v in NOT_A_DICT),
        *(("depths", v) for v in (None, "x", 3, [], {}, [99], [2, 2], [2.5])),
        *(("backbone", v) for v in ([], {}, {"name": "x"}, {"name": "x", "fingerprint": 3})),
        *(("policy", v) for v in ([], {}, {"thresholds": {"x": 1}}, {"thresholds": {"3": 0.5}})),
    ],
)
def test_a_damaged_entry_of_the_config_is_refused(
    key: str, value: Any, saved_adapter: Path, opt: Any
) -> None:
    config = unsealed(saved_adapter)
    (saved_adapter / CONFIG).write_text(json.dumps({**config, key: value}))
    with pytest.raises(AdapterError):
        Adapter.load(saved_adapter, opt)


@pytest.mark.parametrize("key", ["backbone", "depths", "policy", "metrics", "provenance"])
def test_a_missing_entry_of_the_config_is_refused(key: str, saved_adapter: Path, opt: Any) -> None:
    config = unsealed(saved_adapter)
    del config[key]
    (saved_adapter / CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=key):
        Adapter.load(saved_adapter, opt)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_truncated_tensors_are_refused(part: float, saved_adapter: Path, opt: Any) -> None:
    whole = (saved_adapter / EXITS).read_bytes()
    (saved_adapter / EXITS).write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(AdapterError, match=EXITS):
        Adapter.load(saved_adapter, opt)


@pytest.mark.parametrize("name", [CONFIG, EXITS])
def test_a_missing_file_is_refused_by_name(name: str, saved_adapter: Path, opt: Any) -> None:
    (saved_adapter / name).unlink()
    with pytest.raises(AdapterError, match=name):
        Adapter.load(saved_adapter, opt)


def test_the_tensors_of_other_exits_are_refused(
    saved_adapter: Path, opt: Any, tmp_path: Path
) -> None:
    Adapter(opt, Exits(opt, (3,))).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / EXITS, saved_adapter / EXITS)
    with pytest.raises(AdapterError, match=EXITS):
        Adapter.load(saved_adapter, opt)


# -- saving -----------------------------------------------------------------------------------


def test_saving_again_replaces_the_adapter_and_keeps_the_training_state(
    saved_adapter: Path, opt: Any
) -> None:
    (saved_adapter / "training").mkdir()
    (saved_adapter / "training" / "log.jsonl").write_text("{}\n")
    (saved_adapter / DISCRIMINATORS).write_bytes(b"of the exits before")
    trained(opt).save(saved_adapter)
    assert Adapter.load(saved_adapter, opt).policy == ExitPolicy()
    assert not (saved_adapter / DISCRIMINATORS).exists()
    assert (saved_adapter / "training" / "log.jsonl").read_text() == "{}\n"


def test_the_card_tells_backbone_depths_and_provenance(opt: Any) -> None:
    adapter = trained(opt, policy=POLICY)
    adapter = replace(adapter, backbone=Backbone(opt.model, name="Salesforce/blip2-opt-2.7b"))
    card = model_card(adapter)
    start, front, rest = card.split("---\n", 2)
    assert not start
    assert {
        "library_name: offramp",
        "base_model: Salesforce/blip2-opt-2.7b",
        "base_model_relation: adapter",
        "pipeline_tag: image-text-to-text",
    } <= set(front.splitlines())
    assert "| 2 of 6 | 0.7500 | 0.02 |" in rest and "| 4 of 6 | 0.8750 | 0.5 |" in rest
    assert '"data_digest": "abc"' in rest and "`margin`" in rest


def test_the_card_tells_the_promise_or_that_there_is_none(opt: Any) -> None:
    assert "nothing is guaranteed" in model_card(trained(opt, policy=POLICY))
    old = model_card(trained(opt).with_policy(POLICY, PROMISE))
    assert "Not guaranteed here: the calibration does not say attempt, unit, conditions" in old
    said = {"attempt": 1, "unit": "image", "answers": 3702, "level": 0.96}
    conditions = Conditions.of(opt, POLICY, longest=40, sampling="greedy").to_json()
    whole = {**PROMISE, **said, "conditions": conditions}
    card = model_card(trained(opt).with_policy(POLICY, whole))
    for part in (
        "the mean over images of the share of answers that differ",
        "is at most 0.01",
        "95% confidence",
        "0.002",
        "n = 1234",
        "`feedfeed",
        "| dtype | float32 |",
    ):
        assert part in " ".join(card.split())
    nothing = {**PROMISE, "measured": None, "bound": None}
    refused = model_card(trained(opt).with_policy(POLICY, nothing))
    assert "could not guarantee a risk `disagreement` of at most 0.01" in " ".join(refused.split())


def test_the_card_names_no_local_folder_as_base_model(opt: Any, tmp_path: Path) -> None:
    local = Backbone(opt.model, name=str(tmp_path))
    assert "base_model" not in model_card(replace(trained(opt), backbone=local))


def test_the_card_is_one_that_the_hub_reads(saved_adapter: Path) -> None:
    data = ModelCard.load(saved_adapter / CARD).data
    assert (data.library_name, data.pipeline_tag) == ("offramp", "image-text-to-text")


def test_the_saved_card_is_the_model_card(saved_adapter: Path) -> None:
    card = (saved_adapter / CARD).read_text()
    assert card.startswith("---\nlibrary_name: offramp\n") and "{{" not in card and "{%" not in card


# -- earlier adapters -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        {"discriminators": {"conditional": True, "judged": "token"}},
        {"conditional_discriminators": False},
    ],
)
def test_the_discriminators_of_earlier_adapters_are_left_out(
    said: dict[str, Any], opt: Any, saved_adapter: Path
) -> None:
    config = unsealed(saved_adapter)
    (saved_adapter / DISCRIMINATORS).write_bytes(b"as they were")
    files = {**config["files"], DISCRIMINATORS: digest_file(saved_adapter / DISCRIMINATORS)}
    (saved_adapter / CONFIG).write_text(json.dumps({**config, **said, "files": files}))
    exits = Adapter.load(saved_adapter, opt).exits.modules.state_dict()
    assert {*exits} == {*load_file(saved_adapter / EXITS)}


def test_lens_exits_are_not_saved(opt: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Lens exits have no tensors"):
        Adapter(opt, Exits(opt, DEPTHS, kind="lens")).save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# -- hub --------------------------------------------------------------------------------------


class Hub:
    """Stands for HfApi and keeps what was uploaded."""

    def __init__(self, place: Path) -> None:
        self.place, self.created = place, dict[str, Any]()

    def __call__(self, token: str | None = None) -> Hub:
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.created[repo_id] = options

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self.branches = (repo_id, branch)

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> str:
        shutil.copytree(folder_path, self.place)
        self.uploaded = options
        return f"https://hub/{repo_id}/commit/1"

    def download(self, name: str, revision: str | None = None, **options: Any) -> str:
        if name not in self.created:
            raise OSError("offline")
        self.downloaded = {"revision": revision, **options}
        return str(self.place)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    code = str(tmp_path / "code")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", code)
    return hub


def test_an_adapter_goes_to_the_hub_and_comes_back(hub: Hub, saved_adapter: Path, opt: Any) -> None:
    saved = Adapter.load(saved_adapter, opt)
    assert saved.push_to_hub("me/exits", token="t") == "https://hub/me/exits/commit/1"
    assert hub.created == {"me/exits": {"private": True, "exist_ok": True}} and hub.token == "t"
    assert {p.name for p in hub.place.iterdir()} == {CONFIG, EXITS, CARD, "custom_generate"}
    loaded = Adapter.from_pretrained(opt, "me/exits")
    state = loaded.exits.modules.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in saved.exits.modules.state_dict().items())


@pytest.mark.parametrize("mode", [None, "lossless", "full"])
def test_what_is_pushed_generates_by_the_models_own_call(
    hub: Hub, backbone: Any, batch: Any, mode: str | None
) -> None:
    """transformers reads the uploaded `generate.py`, of a hub or a folder, once it is trusted."""
    llava, inputs = backbone("llava"), batch("llava", 1)
    model, adapter = llava.model, Adapter(llava, Exits(llava, (2,)), ExitPolicy({2: 0.0}))
    adapter.push_to_hub("me/exits")
    options = {"max_new_tokens": 5, "do_sample": False} | ({} if mode is None else {"mode": mode})
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**inputs, custom_generate=str(hub.place), trust_remote_code=False)
    ids = model.generate(
        **inputs, **options, custom_generate=str(hub.place), trust_remote_code=True
    )
    assert torch.equal(ids, adapter.generate(**inputs, **options).sequences)


def test_a_model_whose_generate_is_another_models_says_what_to_do(
    hub: Hub, saved_adapter: Path, opt: Any, batch: Any
) -> None:
    """BLIP-2 hands `custom_generate` to the language model in it, which the exits are not for."""
    Adapter.load(saved_adapter, opt).push_to_hub("me/exits")
    with pytest.raises(AdapterError, match=r"offramp\.attach"):
        opt.model.generate(
            **batch("blip2-opt", 1), custom_generate=str(hub.place), trust_remote_code=True
        )


def test_the_hubs_usual_arguments_reach_it(hub: Hub, saved_adapter: Path, opt: Any) -> None:
    saved = Adapter.load(saved_adapter, opt)
    saved.push_to_hub(
        "me/exits", commit_message="New exits", private=False, revision="v2", create_pr=True
    )
    assert hub.created["me/exits"]["private"] is False and hub.branches == ("me/exits", "v2")
    assert hub.uploaded == {
        "commit_message": "New exits",
        "commit_description": None,
        "revision": "v2",
        "create_pr": True,
    }
    Adapter.from_pretrained(opt, "me/exits", revision="v2", token="t", local_files_only=True)
    assert hub.downloaded == {"revision": "v2", "token": "t", "local_files_only": True}


@pytest.mark.parametrize("kind", [str, Path])
def test_arguments_in_the_other_order_are_refused_with_the_remedy(
    kind: type, saved_adapter: Path, opt: Any
) -> None:
    with pytest.raises(InputError, match=r"\nThe model comes first: .*\(model, folder_or_name\)"):
        Adapter.from_pretrained(kind(saved_adapter), opt)  # type: ignore[arg-type]


def test_a_folder_is_loaded_without_the_hub(hub: Hub, saved_adapter: Path, opt: Any) -> None:
    assert Adapter.from_pretrained(opt, saved_adapter).policy == POLICY


def test_a_name_alone_loads_exits_with_their_own_backbone(tmp_path: Path) -> None:
    shipped = Adapter.from_pretrained("tiny-opt")
    assert shipped.backbone.name == "offramp/tiny-opt" and shipped.policy.thresholds
    shipped.save(tmp_path / "exits")
    assert Adapter.from_pretrained(tmp_path / "exits").policy == shipped.policy
    with pytest.raises(InputError, match="No exits for the tiny model 't5' ship"):
        Adapter.from_pretrained("tiny-t5")


def test_a_misspelt_folder_is_not_looked_for_on_the_hub(
    hub: Hub, saved_adapter: Path, opt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved_adapter.parent)
    named = rf"There is no adapter folder .*\nDid you mean '{saved_adapter.name}'\?"
    with pytest.raises(AdapterError, match=named):
        Adapter.from_pretrained(opt, saved_adapter.name[:-1])
    with pytest.raises(AdapterError, match="There is no adapter folder"):
        Adapter.from_pretrained(opt, f"./{saved_adapter.name}x")


def test_a_name_that_the_hub_does_not_give_is_an_adapter_error(hub: Hub, opt: Any) -> None:
    with pytest.raises(AdapterError, match=r"nobody/nothing.*offline"):
        Adapter.from_pretrained(opt, "nobody/nothing")


def test_a_hugging_face_model_is_a_backbone(saved_adapter: Path, opt: Any, batch: Build) -> None:
    loaded = Adapter.from_pretrained(opt.model, saved_adapter)
    inputs = batch("blip2-opt", 1)
    expected = Adapter.load(saved_adapter, opt).generate(inputs, max_new_tokens=3)
    assert torch.equal(loaded.generate(inputs, max_new_tokens=3).sequences, expected.sequences)
    assert Exits(opt.model, (2,)).depths == (2,)


def test_what_is_no_backbone_is_not_called_a_damaged_adapter(saved_adapter: Path) -> None:
    with pytest.raises(InputError, match="str is no vision-language model"):
        Adapter.load(saved_adapter, "blip2-opt")  # type: ignore[arg-type]


def test_exits_that_only_draft_do_not_warn_of_full_depth(opt: Any) -> None:
    adapter = Adapter(opt, Exits(opt, (2,)))
    depth = adapter.exits.depths[0]
    for policy, spares in (
        (ExitPolicy(), False),
        (ExitPolicy({depth: 0.5}), True),
        (ExitPolicy(drafts={depth: 0.5}), True),
        (ExitPolicy(drafts={depth: 0.5}, lossless=True), True),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            replace(adapter, policy=policy).chosen_policy(None, None)
        assert bool(told) != spares
