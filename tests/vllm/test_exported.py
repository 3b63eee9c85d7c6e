"""What `offramp export --to vllm` writes is what the plug-in reads, without vLLM."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import RunCommand

from offramp.core.decoding.policy import ExitPolicy, policy_to_json
from offramp.features.input_processor import COMPLETES
from offramp_vllm.adapter import Checked, Exported, exits_at, read_exported
from offramp_vllm.attach import MoreLayers, bits_of, with_exits
from offramp_vllm.policy import EARLY, FULL, LOSSLESS, Rule, asked
from offramp_vllm.refuse import Refused


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import offramp
    from offramp.adapter.shipped import load_tiny, shipped_exits
    from offramp.features.input_processor import InputProcessor
    from offramp_vllm.exports.vllm import PROMPTS, export_vllm

    backbone, processor = load_tiny("opt")
    adapter = offramp.attach(backbone, str(shipped_exits("tiny-opt")))
    out = tmp_path_factory.mktemp("vllm") / "exits"
    ids = [processor.tokenizer(text)["input_ids"] for text in PROMPTS[:3]]
    encoder = InputProcessor(backbone, processor)
    assert export_vllm(adapter, out, ids, encoder=encoder, max_new_tokens=6) == 5
    return out


def test_the_folder_says_what_the_adapter_is(exported: Path) -> None:
    read = read_exported(exported)
    assert (read.layers, read.depths, read.copied, read.all_layers) == (12, (2,), (2,), 13)
    assert read.rule.thresholds == (0.8,) and read.rule.first == (0.8,)
    assert len(read.checked) == 5 and all(len(c.tokens) == len(c.depths) for c in read.checked)
    assert [c.image for c in read.checked] == [None] * 3 + ["check.png"] * 2
    assert (exported / "check.png").is_file()
    assert {place for place, _, _ in read.tensors()} == {0}


def test_exits_may_be_named_as_the_hub_has_them(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for = []

    def fetched(name: str, **_: Any) -> str:
        asked_for.append(name)
        return str(exported)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    assert exits_at("owner/exits") == exported and asked_for == ["owner/exits"]
    for name in ("owner/here", "/no/such", "./owner/x", "exits", "../owner/x"):
        assert exits_at(name) == Path(name)
    assert asked_for == ["owner/exits"]


def test_a_name_that_the_hub_does_not_have_is_refused() -> None:
    with pytest.raises(
        Refused, match=r"no folder .owner/exits., and the hub gave none: .*\nCorrect"
    ):
        exits_at("owner/exits")  # offline


def test_first_tokens_of_kept_answers_exit_as_they_will_in_vllm(exported: Path) -> None:
    """Also where transformers' class of the decoder alone is one that was never tested."""
    for pictured in (False, True):
        depths = [c.depths for c in read_exported(exported).checked if bool(c.image) == pictured]
        assert any(first == 2 for first, *_ in depths)


def test_answers_that_are_kept_are_the_same_whatever_was_answered_before(exported: Path) -> None:
    """An engine's first answer, on which it is tried, runs its first token to full depth."""
    kept = read_exported(exported).checked[:3]
    import offramp
    from offramp.adapter.shipped import load_tiny, shipped_exits
    from offramp_vllm.exports.vllm import _answers

    backbone, _ = load_tiny("opt")
    adapter = offramp.attach(backbone, str(shipped_exits("tiny-opt")))
    other = _answers(adapter, [list(c.prompt) for c in reversed(kept)], 6)
    assert [Checked(**one) for one in reversed(other)] == list(kept)


@pytest.mark.parametrize("trust", [None, 0.98])
def test_exits_that_only_draft_are_exported_and_exit_at_a_requests_threshold(
    tmp_path: Path, trust: float | None
) -> None:
    import offramp
    from offramp.adapter.adapter import Adapter
    from offramp.adapter.shipped import load_tiny, shipped_exits
    from offramp_vllm.exports.vllm import PROMPTS, export_vllm

    backbone, processor = load_tiny("opt")
    attached = offramp.attach(backbone, str(shipped_exits("tiny-opt")))
    how = {"lossless": True} if trust is None else {"trust": trust}
    drafting = ExitPolicy(drafts={2: 0.1}, shortlist=attached.policy.shortlist, **how)
    adapter = Adapter(attached.backbone, attached.exits, drafting)
    prompts = [processor.tokenizer(text)["input_ids"] for text in PROMPTS[:2]]
    assert export_vllm(adapter, tmp_path / "exits", prompts, max_new_tokens=6) == 2
    read = read_exported(tmp_path / "exits")
    assert {2, 12} == {depth for one in read.checked for depth in one.depths}
    assert asked(read.rule, read.rule.early, drafts=True).mode == EARLY
    modes = [asked(read.rule, None, drafts=drafts).mode for drafts in (True, False)]
    assert modes == [LOSSLESS, FULL]
    at = asked(read.rule, {"offramp_threshold": 0.9}, drafts=True).rule
    assert (at.thresholds, at.first) == ((0.9,), (0.9,))
    why = "no thresholds" if trust is None else "none of these"
    with pytest.raises(Refused, match=why) as refused:
        asked(read.rule, {"offramp_mode": "early_exit"}, drafts=True)
    assert len(str(refused.value).splitlines()) == 2


def test_exits_without_thresholds_and_drafts_are_not_exported(tmp_path: Path) -> None:
    import offramp
    from offramp.adapter.shipped import load_tiny
    from offramp.core.errors import InputError
    from offramp.core.models.exits import Exits
    from offramp_vllm.exports.vllm import export_vllm

    backbone = load_tiny("opt")[0]
    adapter = offramp.attach(backbone, Exits(backbone, (2,)).requires_grad_(False))
    with pytest.raises(InputError, match="no thresholds"):
        export_vllm(adapter, tmp_path / "exits", [])


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl", "llava"])
def test_vision_language_models_are_checked_on_texts(family: str) -> None:
    """Qwen-VL's decoder has no class of its own in transformers, and the whole model is asked."""
    from families import build

    from offramp.adapter.adapter import Adapter
    from offramp.core.models.backbone import Backbone
    from offramp.core.models.exits import Exits, ExitSet
    from offramp_vllm.exports.vllm import _answers

    backbone = Backbone.of(build(family))
    exits = ExitSet(Exits(backbone, (3,)).requires_grad_(False))
    kept = _answers(Adapter(backbone, exits, ExitPolicy({3: 0.2})), [[9, 10, 11], [12, 13]], 4)
    assert [len(one["tokens"]) for one in kept] == [4, 4]


@pytest.mark.parametrize(("family", "may"), [("qwen2.5-vl", True), ("qwen3-vl", False)])
def test_first_tokens_exit_in_vllm_where_they_do_in_offramp(
    family: str, may: bool, tmp_path: Path
) -> None:
    """Prompts of Qwen3-VL get features between layers, so that all of a prompt runs."""
    from families import build

    from offramp.adapter.adapter import Adapter
    from offramp.core.models.backbone import Backbone
    from offramp.core.models.exits import Exits, ExitSet
    from offramp_vllm.exports.vllm import export_vllm

    backbone = Backbone.of(build(family))
    exits = ExitSet(Exits(backbone, (3,)).requires_grad_(False))
    export_vllm(Adapter(backbone, exits, ExitPolicy({3: 0.2})), tmp_path / "exits", [])
    assert read_exported(tmp_path / "exits").rule.waits == may


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("adapter.json", {"format": 2}, "format 1"),
        ("vllm.json", {"format": 1}, "format 2"),
        ("vllm.json", {"exits": "0" * 64}, "other exits"),
        ("adapter.json", {"exit_kind": "dense"}, "kind 'dense'"),
    ],
)
def test_what_cannot_be_served_is_refused_in_two_lines(
    exported: Path, tmp_path: Path, name: str, change: dict[str, Any], word: str
) -> None:
    for file in exported.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    said = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps({**said, **change}))
    with pytest.raises(Refused, match=word) as refused:
        read_exported(tmp_path)
    assert len(str(refused.value).splitlines()) == 2


def spoilt(value: Any) -> Iterator[Any]:
    """A JSON value with each of its parts, one at a time, replaced or left out."""
    yield from (None, -1, 10**9, "x", [], {}, [None], {"x": None}, True)
    if isinstance(value, dict):
        for key in value:
            yield {name: part for name, part in value.items() if name != key}
            for other in spoilt(value[key]):
                yield {**value, key: other}
    elif isinstance(value, list) and value:
        yield value[:-1]
        for other in spoilt(value[0]):
            yield [other, *value[1:]]


@pytest.mark.slow
def test_a_damaged_folder_is_two_lines(exported: Path, tmp_path: Path) -> None:
    whole, cases, refused = exported, 0, 0
    for file in whole.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("vllm.json", "adapter.json"):
        text = (whole / name).read_text()
        good = json.loads(text)
        for bad in [*map(json.dumps, spoilt(copy.deepcopy(good))), text[: len(text) // 2], "", "{"]:
            (tmp_path / name).write_text(bad)
            cases += 1
            try:
                read_exported(tmp_path)
            except Refused as error:
                refused += 1
                assert len(str(error).splitlines()) == 2
        (tmp_path / name).write_text(text)
    name = "exits.safetensors"
    (tmp_path / name).write_bytes((whole / name).read_bytes()[:-1])
    with pytest.raises(Refused):
        read_exported(tmp_path)
    assert cases > 1000 and refused > 500


@pytest.mark.parametrize(
    "change", [{"score": "agreement"}, {"gates": {"2": 0.5}}, {"kv": "other"}, {"visual_keep": 0.5}]
)
def test_a_policy_that_is_not_followed_is_refused(
    exported: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    for file in exported.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    said = json.loads((tmp_path / "adapter.json").read_text())
    said["policy"] |= change
    (tmp_path / "adapter.json").write_text(json.dumps(said))
    with pytest.raises(Refused):
        read_exported(tmp_path)


@pytest.mark.parametrize(
    "policy",
    [
        ExitPolicy({2: 0.8}),
        ExitPolicy({2: 0.8}, first={}),
        ExitPolicy({2: 0.8, 4: 0.5}, first={4: 0.9}),
    ],
)
def test_thresholds_are_the_policys(policy: ExitPolicy) -> None:
    rule = Rule.of(policy_to_json(policy), (2, 4))
    opening = policy.opening if policy.exit_in_prefill else {}
    for place, depth in enumerate((2, 4)):
        for ours, theirs in ((rule.thresholds, policy.thresholds), (rule.first, opening)):
            want = theirs.get(depth)
            assert ours[place] == want if want is not None else ours[place] != ours[place]
    assert rule.waits == bool(opening)


def test_another_threshold_is_what_the_policy_makes_of_it() -> None:
    policy = ExitPolicy({2: 0.8}, first={2: 0.9})
    for threshold in (0.5, 0.95):
        ours = Rule.of(policy_to_json(policy), (2,)).at(threshold)
        theirs = Rule.of(policy_to_json(policy.at({2: threshold})), (2,))
        assert ours == theirs


def test_requests_are_served_as_they_ask() -> None:
    rule = Rule((0.8,), (0.8,))
    assert asked(rule, None, drafts=False).mode == EARLY
    assert asked(rule, None, drafts=True).mode == LOSSLESS
    assert asked(rule, {"offramp_mode": "full"}, drafts=False).mode == FULL
    assert not asked(rule, {"offramp_mode": "full"}, drafts=False).rule.is_on
    assert asked(rule, {"offramp_threshold": 0.5}, drafts=True).rule.thresholds == (0.5,)
    wrong = [
        {"offramp_mode": "fast"},
        {"offramp_threshold": 2.0},
        {"offramp_threshold": "much"},
        {"offramp_mode": "lossless"},
    ]
    for extra in wrong:
        with pytest.raises(Refused):
            asked(rule, extra, drafts=False)


def checkpoint(layers: int, prefix: str, like: Exported) -> list[tuple[str, torch.Tensor]]:
    inner = {name: tensor for _, name, tensor in like.tensors()}
    return [(f"{prefix}{i}.{n}", t) for i in range(layers) for n, t in inner.items()]


def sampled(read: Exported, weights: list[tuple[str, torch.Tensor]]) -> Exported:
    """The same of a backbone of these weights."""
    of = {".".join(n.split(".")[3:]): bits_of(t, 8) for n, t in weights if n.startswith("model.")}
    return replace(read, sample=of)


def test_exits_come_after_the_checkpoint_as_more_layers(exported: Path) -> None:
    read = read_exported(exported)
    tower = [(n, t[..., :1]) for n, t in checkpoint(12, "vision.layers.", read)]
    weights = tower + checkpoint(12, "model.decoder.layers.", read)
    read = sampled(read, weights)
    made = dict(with_exits(iter(weights), read))
    added = {name for name in made if name.startswith("model.decoder.layers.12.")}
    assert len(made) == len(weights) + len(added) and len(added) == len(list(read.tensors()))


@pytest.mark.parametrize("noise", [0.03, 1.0])
def test_a_checkpoint_of_other_weights_is_refused(exported: Path, noise: float) -> None:
    read = read_exported(exported)
    weights = checkpoint(12, "model.decoder.layers.", read)
    other = [(n, t + noise * t.std() * torch.randn_like(t)) for n, t in weights]
    with pytest.raises(Refused, match="another backbone") as refused:
        list(with_exits(iter(other), sampled(read, weights)))
    assert len(str(refused.value).splitlines()) == 2


def test_the_sample_is_the_checkpoints_own_by_name(exported: Path) -> None:
    from safetensors.torch import load_file

    from offramp.adapter.shipped import tiny_folder

    read = read_exported(exported)
    held = load_file(tiny_folder("opt") / "model.safetensors")
    names = {n.split(".layers.")[1]: n for n in held if ".decoder.layers." in n}
    of_layers = [name for name in read.sample if not name.startswith("norm.")]
    assert len(of_layers) > 20
    for name in of_layers:
        assert bits_of(held[names[name]], 8) == read.sample[name]


@pytest.mark.parametrize("layers", [11, 13])
def test_a_checkpoint_of_another_depth_is_refused(exported: Path, layers: int) -> None:
    read = read_exported(exported)
    with pytest.raises(Refused, match="0 decoders of 12 layers"):
        list(with_exits(iter(checkpoint(layers, "model.layers.", read)), read))


def test_a_configuration_gets_layers_of_the_kinds_that_exits_copy() -> None:
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(num_hidden_layers=3, layer_types=kinds)
    made = MoreLayers(3, (2, 1))(config)
    assert made.num_hidden_layers == 5 and made.layer_types == [*kinds, kinds[2], kinds[1]]
    assert MoreLayers(4, (2,))(Gemma3TextConfig(num_hidden_layers=3)).num_hidden_layers == 3


@pytest.mark.slow
def test_the_command_writes_the_folder(run: RunCommand, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, err = run(
        "export",
        "--to",
        "vllm",
        "--adapter",
        "tiny-opt",
        "--out",
        out,
        "--max-new-tokens",
        4,
        "--json",
    )
    assert code == 0, err
    assert json.loads(said) == {"exits": str(out), "checked": 8}
    assert read_exported(out).depths == (2,)


def test_the_next_command_serves_what_was_exported(
    run: RunCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a template that the checkpoint lacks, and drafts where nothing leaves without them."""
    import offramp_vllm.exports.exporters as module

    policies = [None, ExitPolicy(drafts={2: 0.1}, lossless=True)]

    def opened(arguments: Any) -> Any:
        found, policy = loaded(arguments), policies.pop()
        found.processor.chat_template = COMPLETES  # as the photo model's is when it is opened
        adapter = found.adapter if policy is None else found.adapter.with_policy(policy)
        return replace(found, adapter=adapter)

    loaded = module.loaded
    monkeypatch.setattr(module, "loaded", opened)
    for drafts in (True, False):
        out = tmp_path / f"out {drafts}"
        asks = ("export", "--to", "vllm", "--adapter", "tiny-opt", "--max-new-tokens", 2, "--out")
        code, _, err = run(*asks, out)
        assert code == 0, err
        words = shlex.split(caplog.messages[-1].removeprefix("next: "))
        told = dict(zip(words[3::2], words[4::2], strict=True))
        assert json.loads(told["--additional-config"]) == {"offramp": {"exits": str(out)}}
        assert told["--dtype"] == "float32"
        assert Path(told["--chat-template"]).read_text() == COMPLETES
        assert told["--chat-template-content-format"] == "openai"
        assert ("--speculative-config" in told) == drafts


def test_what_does_not_go_with_it_is_said(run: RunCommand, tmp_path: Path) -> None:
    code, _, err = run("export", "--to", "vllm", "--out", tmp_path / "out")
    assert code != 0 and "Name it first" in err
    code, _, err = run(
        "export",
        "--to",
        "vllm",
        "--adapter",
        "tiny-opt",
        "--gguf",
        "q8_0",
        "--out",
        tmp_path / "out",
    )
    assert code != 0 and "--gguf does not go with --to vllm" in err
