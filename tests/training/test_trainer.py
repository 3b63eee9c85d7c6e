"""What a training run keeps to: it learns, it can be interrupted, it fails without damage."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import families
import pytest
import torch
from torch import Tensor
from training_runs import SHORT, rows, same, steps, trainer, untrained
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import full_model_answers
from offramp.core.decoding.policy import DRAFT, ExitPolicy
from offramp.core.errors import DataError, InputError, TrainingError
from offramp.core.models.backbone import Backbone
from offramp.features.input_processor import InputProcessor
from offramp.features.shortlist import shortlist_of, usual_size
from offramp.training import trainer as training
from offramp.training.checkpoint import STATE
from offramp.training.config import OBJECTIVES, REGIMES, TrainConfig
from offramp.training.feature_dataset import FOLDER
from offramp.training.labels import answers_of
from offramp.training.trainer import Trainer, train

Build = Callable[..., Any]


# -- what moves ------------------------------------------------------------------------------------


def test_without_the_adversarial_term_no_discriminator_moves(opt: Any, tmp_path: Path) -> None:
    run = trainer(opt, tmp_path, replace(SHORT, adversarial=0.0))
    start = {n: t.clone() for n, t in run.discriminators.state_dict().items()}
    run.run()
    assert same(start, run.discriminators.state_dict())
    assert all(p.grad is None for p in run.discriminators.parameters())
    assert not any("adversarial" in name for row in steps(tmp_path) for name in row)


def test_training_leaves_the_callers_random_numbers_alone(opt: Any, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    trainer(opt, tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_exit_starts_as_the_next_layer(opt: Any, tmp_path: Path) -> None:
    run = trainer(opt, tmp_path)
    assert same(dict(run.exits.state_dict()), untrained(run))


# -- it learns --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_falls_and_agreement_rises(opt: Any, tmp_path: Path) -> None:
    config = replace(SHORT, steps=80, evaluate_every=20, batch_size=8, learning_rate=3e-3)
    adapter = trainer(opt, tmp_path, config, n=48).run()
    losses = [row["distillation/4"] for row in steps(tmp_path)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    agreement = [row["agreement"] for row in rows(tmp_path) if "agreement" in row]
    for depth in ("2", "4"):
        assert adapter.metrics["agreement"][depth] > agreement[0][depth]


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_runs(regime: str, opt: Any, tmp_path: Path) -> None:
    config = replace(SHORT, regime=regime, min_confidence=0.04, labelled_fraction=0.5)
    trainer(opt, tmp_path, config).run()
    supervised = any(row["cross_entropy/2"] > 0 for row in steps(tmp_path))
    assert supervised is (regime != "unsupervised")


def test_a_regime_labels_what_it_says(opt: Any) -> None:
    encoder, some = InputProcessor(opt, fakes.Blip2FakeProcessor("blip2-opt")), fakes.examples(10)

    def labelled(regime: str, **more: Any) -> int:
        config = replace(SHORT, regime=regime, min_confidence=0.0, **more)
        found = answers_of(encoder, some, config, share=slice(None))
        assert len(found) == 10
        return sum(row.labelled for row in found)

    assert labelled("supervised") == 10
    assert labelled("unsupervised") == 0
    assert labelled("pseudo") == 10
    assert labelled("mixed", labelled_fraction=0.3) == 3
    assert labelled("mixed", labelled_fraction=0.7) == 7
    assert labelled("mixed", labelled_fraction=0.01) == 1


@pytest.mark.parametrize("regime", ["supervised", "mixed"])
def test_all_captions_are_labels_and_of_annotators_answers_the_most_given(
    regime: str, opt: Any
) -> None:
    encoder, (one, two) = (
        InputProcessor(opt, fakes.Blip2FakeProcessor("blip2-opt")),
        fakes.examples(2),
    )
    captions = ("a red ball", "the ball is red", "one ball")
    given = [
        replace(one, answers=captions),
        replace(two, answers=("blue", "green", "blue", "red", "green")),
    ]
    config = replace(SHORT, regime=regime, labelled_fraction=0.9)
    whole = answers_of(encoder, given, config, share=slice(None))
    said = [(row.example.key, row.ids) for row in whole]
    wanted = [(one, text) for text in captions] + [(two, "blue"), (two, "green")]
    assert said == [(e.key, tuple(encoder.answer_ids(e.prompt, text))) for e, text in wanted]
    assert all(row.labelled for row in whole)
    # processes share the answers, not the examples: none has many more than another
    parts = [answers_of(encoder, given, config, share=slice(n, None, 2)) for n in (0, 1)]
    assert [len(part) for part in parts] == [3, 2]
    assert sorted(row.ids for part in parts for row in part) == sorted(ids for _, ids in said)


def test_shares_of_several_processes_are_the_whole_and_label_the_same(opt: Any) -> None:
    encoder, some = InputProcessor(opt, fakes.Blip2FakeProcessor("blip2-opt")), fakes.examples(9)
    config = replace(SHORT, regime="mixed", labelled_fraction=0.4)

    def found(share: slice) -> dict[str, bool]:
        given = answers_of(encoder, some, config, share=share)
        return {row.example.key: row.labelled for row in given}

    first, second = found(slice(0, None, 2)), found(slice(1, None, 2))
    assert not set(first) & set(second)
    assert first | second == found(slice(None))


def test_each_term_is_logged_for_each_depth(opt: Any, tmp_path: Path) -> None:
    trainer(opt, tmp_path).run()
    terms = ("distillation", "cross_entropy", "adversarial", "discriminator")
    wanted = {"step", "loss", *(f"{term}/{depth}" for term in terms for depth in (2, 4))}
    assert all(set(row) == wanted for row in steps(tmp_path))
    assert [row["step"] for row in steps(tmp_path)] == list(range(6))
    agreement = [row for row in rows(tmp_path) if "agreement" in row]
    assert [row["step"] for row in agreement] == [0, 2, 4, 6]
    assert all(set(row["agreement"]) == {"2", "4"} for row in agreement)


# -- a shortlist ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blip2-opt", "gemma3"])  # gemma3 caps its logits
def test_a_shortlist_of_everything_costs_what_no_shortlist_does(
    name: str, backbone: Build, tmp_path: Path
) -> None:
    one = backbone(name)
    config = replace(SHORT, regime="mixed")
    run = trainer(one, tmp_path, config, name=name)
    batch = run.states.record()[0][0]
    before, counted = (
        run.objective.generator_loss(run.objective.loss_inputs(batch)),
        run.objective.agreeing(batch),
    )
    run.objective.narrow(torch.arange(one.vocabulary))
    after = run.objective.generator_loss(run.objective.loss_inputs(batch))
    torch.testing.assert_close(before, after)
    assert counted == run.objective.agreeing(batch)


def test_what_a_shortlist_lacks_is_no_label_and_no_agreement(opt: Any, tmp_path: Path) -> None:
    run = trainer(opt, tmp_path, replace(SHORT, regime="supervised"))
    batch = run.states.record()[0][0]
    targets = batch.targets[batch.mask]
    ids = targets.unique()[::2].contiguous()
    run.objective.narrow(ids)
    known = torch.isin(targets, ids)
    assert known.any() and not known.all()
    report = run.objective.generator_loss(run.objective.loss_inputs(batch))[1]
    teacher = opt.logits(batch.teacher[batch.mask])
    counts = run.objective.agreeing(batch)
    for place, (depth, states) in enumerate(run.objective.features(batch).items()):
        logits = opt.logits(states[batch.mask])[:, ids]
        said = ids[logits.argmax(-1)]
        log_p = logits.log_softmax(-1)
        places = torch.searchsorted(ids, targets[known])
        wanted = -log_p[known].gather(1, places[:, None]).sum() / len(targets)
        assert report[f"cross_entropy/{depth}"] == pytest.approx(wanted.item(), rel=1e-5)
        taught = teacher[:, ids].log_softmax(-1)
        divergence = (taught.exp() * (taught - log_p)).sum(-1).mean()
        assert report[f"distillation/{depth}"] == pytest.approx(divergence.item(), rel=1e-4)
        assert counts[place] == int((said == teacher.argmax(-1)).sum())


def test_a_trained_shortlist_is_that_of_the_answers_and_is_used(opt: Any, tmp_path: Path) -> None:
    config = replace(SHORT, shortlist=5)
    run = trainer(opt, tmp_path, config)
    ours = run.run()
    learnt, held_out = (
        s.answers for s in trainer(opt, tmp_path / "stores", config).states.record()
    )
    ids, found = shortlist_of(learnt, held_out, 5)
    for one in (ours, Adapter.load(tmp_path, opt)):
        drafts = dict.fromkeys(ours.exits.depths, DRAFT)  # lossless from the start
        assert one.policy == ExitPolicy(shortlist=True, drafts=drafts)
        assert torch.equal(one.exits.shortlist, ids)
        assert one.exits.measured == {"shortlist": found}
    again = trainer(opt, tmp_path, config)
    assert torch.equal(again.run(resume=True).exits.shortlist, ids)  # of a finished run


def test_a_shortlist_larger_than_the_vocabulary_is_refused(opt: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shortlist of 100000 out of"):
        trainer(opt, tmp_path, replace(SHORT, shortlist=100_000))


@pytest.mark.parametrize(
    ("vocabulary", "wide", "size"), [(8192, 64, 2048), (8191, 64, None), (8192, 2048, None)]
)
def test_exits_read_a_shortlist_unasked_where_the_head_weighs_more_than_two_layers(
    vocabulary: int, wide: int, size: int | None
) -> None:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=wide,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    assert usual_size(Backbone(LlamaForCausalLM(config))) == size


@pytest.mark.parametrize(
    ("size", "asked", "learnt"), [(90, None, True), (2, None, False), (2, 2, True), (90, 0, False)]
)
def test_a_shortlist_that_nobody_asked_for_misses_few_tokens(
    size: int,
    asked: int | None,
    learnt: bool,
    opt: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "usual_size", lambda backbone: size)
    ours = trainer(opt, tmp_path, replace(SHORT, shortlist=asked)).run()
    assert ours.policy.shortlist is (ours.exits.shortlist is not None) is learnt
    if learnt and asked is None:
        assert ours.exits.measured["shortlist"]["miss_rate"] <= 0.05


@pytest.mark.usefixtures("ctrl_c")
def test_a_run_that_goes_on_reads_the_tokens_that_it_began_with(
    opt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = trainer(opt, tmp_path, SHORT)
    interrupt_at(begun, 5, "fetch", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        begun.run()
    monkeypatch.setattr(training, "usual_size", lambda backbone: 90)
    assert trainer(opt, tmp_path, SHORT).run(resume=True).exits.shortlist is None


# -- objectives -------------------------------------------------------------------------------


def test_supervised_cross_entropy_alone_is_that_of_the_answers(opt: Any, tmp_path: Path) -> None:
    config = replace(SHORT, regime="supervised", distillation=0.0, adversarial=0.0)
    run = trainer(opt, tmp_path, config)
    batch = run.states.record()[0][0]
    loss, report = run.objective.generator_loss(run.objective.loss_inputs(batch))
    assert set(report) == {"cross_entropy/2", "cross_entropy/4"}
    words = [w for e in run.examples if e.key in batch.keys for w in e.answers[0].split()]
    assert int(batch.mask.sum()) == len(words) + len(batch.keys)  # and each answer's end
    read = [opt.logits(states)[batch.mask] for states in run.objective.features(batch).values()]
    targets = batch.targets[batch.mask]
    wanted = sum(-x.log_softmax(-1)[range(len(x)), targets].mean() for x in read)
    torch.testing.assert_close(loss, wanted)


def test_a_term_is_in_the_loss_with_its_weight(opt: Any, tmp_path: Path) -> None:
    weights: dict[str, Any] = {name: 0.25 + i for i, name in enumerate(OBJECTIVES)}
    run = trainer(opt, tmp_path, replace(SHORT, regime="supervised", **weights))
    batch = run.states.record()[0][0]
    loss, report = run.objective.generator_loss(run.objective.loss_inputs(batch))
    assert set(report) == {f"{name}/{depth}" for name in OBJECTIVES for depth in (2, 4)}
    total = sum(weights[name.split("/")[0]] * value for name, value in report.items())
    assert loss.item() == pytest.approx(total)


@pytest.mark.parametrize("fraction", [0.01, 0.4])
def test_cross_entropy_alone_trains_on_the_labelled_answers_alone(
    fraction: float, opt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SHORT, regime="mixed", labelled_fraction=fraction, adversarial=0.0)
    written: list[int] = []

    def noted(*args: Any, **options: Any) -> Any:
        found = full_model_answers(*args, **options)
        written.append(len(found))
        return found

    monkeypatch.setattr("offramp.training.labels.full_model_answers", noted)
    stores = {}
    for name, weight in (("alone", 0.0), ("both", 1.0)):
        run = trainer(opt, tmp_path / name, replace(config, distillation=weight))
        stores[name] = [[r for rows in s._groups for r in rows] for s in run.states.record()]
        run.run()
        assert all(0 < row["cross_entropy/2"] < 20 for row in steps(tmp_path / "alone"))
    labelled = [row for row in stores["both"][0] if row.labelled]
    assert stores["alone"][0] == labelled and len(labelled) < len(stores["both"][0])
    assert stores["alone"][1] == stores["both"][1]  # compared on the same answers
    assert written[0] == 0  # no answer is written that nothing would learn from


def test_a_label_weighs_the_same_however_few_there_are(opt: Any, tmp_path: Path) -> None:
    run = trainer(opt, tmp_path, replace(SHORT, regime="supervised"))
    batch = run.states.record()[0][0]
    whole = run.objective.generator_loss(run.objective.loss_inputs(batch))[1]
    parts = []
    for row in range(len(batch.labelled)):
        one = replace(batch, labelled=torch.arange(len(batch.labelled)) == row)
        parts.append(run.objective.generator_loss(run.objective.loss_inputs(one))[1])
    for depth in (2, 4):
        name = f"cross_entropy/{depth}"
        assert sum(part[name] for part in parts) == pytest.approx(whole[name], rel=1e-5)


def test_a_batch_without_labels_costs_and_moves_nothing_where_only_labels_teach(
    opt: Any, tmp_path: Path
) -> None:
    config = replace(SHORT, regime="mixed", distillation=0.0, adversarial=0.0)
    run = trainer(opt, tmp_path, config)
    batch = run.states.record()[0][0]
    batch = replace(batch, labelled=torch.zeros_like(batch.labelled))
    loss, _ = run.objective.generator_loss(run.objective.loss_inputs(batch))
    loss.backward()
    assert loss == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in run.exits.parameters())


# -- data -------------------------------------------------------------------------------------


def test_no_picture_is_both_trained_on_and_validated_on(opt: Any, tmp_path: Path) -> None:
    some = [replace(e, group=f"g{i // 3}") for i, e in enumerate(fakes.examples(24))]
    run = Trainer(opt, fakes.Blip2FakeProcessor("blip2-opt"), some, SHORT, tmp_path)
    pictures = [
        {row.example.group for group in store._groups for row in group}
        for store in run.states.record()
    ]
    assert not pictures[0] & pictures[1] and len(pictures[0] | pictures[1]) == 8


# -- again and again --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    opt: Any, tmp_path: Path
) -> None:
    def weights(seed: int, place: str) -> dict[str, Tensor]:
        run = trainer(opt, tmp_path / place, replace(SHORT, seed=seed))
        run.run()
        return dict(run.exits.state_dict())

    first = weights(0, "a")
    torch.manual_seed(99)  # not a part of the seed
    assert same(first, weights(0, "b"))
    assert not same(first, weights(1, "c"))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is heard, also where a shell started pytest in its background and has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_at(run: Trainer, step: int, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the batch is fetched, in the middle of the step, or in the validation."""
    names = {"fetch": "_order", "step": "_discriminate", "validation": "_agreement"}
    original = getattr(run, names[when])

    def interrupted(*args: Any) -> Any:
        if run.progress.step == step:
            signal.raise_signal(signal.SIGINT)  # in this thread, at once
        return original(*args)

    monkeypatch.setattr(run, names[when], interrupted)


UNINTERRUPTED: dict[str, Any] = {}


def uninterrupted(opt: Any, out: Path, config: TrainConfig) -> tuple[Trainer, list[dict[str, Any]]]:
    """A whole run of `config` and its log, trained once."""
    if repr(config) not in UNINTERRUPTED:
        run = trainer(opt, out, config)
        run.run()
        UNINTERRUPTED[repr(config)] = (run, rows(out))
    found: tuple[Trainer, list[dict[str, Any]]] = UNINTERRUPTED[repr(config)]
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("when", "step", "changes"),
    [
        *(
            (*moment, {"cache": "memory"})
            for moment in [("fetch", 3), ("step", 3), ("validation", 0), ("validation", 4)]
        ),
        *((*moment, {"cache": "disk"}) for moment in [("fetch", 3), ("step", 0)]),
        ("fetch", 3, {"shortlist": 5}),
    ],
)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    when: str,
    step: int,
    changes: dict[str, Any],
    opt: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(SHORT, **changes)
    whole, log = uninterrupted(opt, tmp_path / "whole", config)
    broken = trainer(opt, tmp_path / "broken", config)
    interrupt_at(broken, step, when, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = trainer(opt, tmp_path / "broken", config)
    resumed.run(resume=True)
    for part in ("exits", "discriminators"):
        assert same(getattr(whole, part).state_dict(), getattr(resumed, part).state_dict())
    assert same(whole.best["exits"], resumed.best["exits"])
    assert whole.progress == resumed.progress
    assert log == rows(tmp_path / "broken")


def test_rows_after_the_checkpoint_are_dropped_on_resume(
    opt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(opt, tmp_path / "whole").run()
    killed = trainer(opt, tmp_path / "killed")
    real = killed._step

    def dies(batch: Any, step: int) -> Any:
        if step == 3:
            raise MemoryError  # no chance to checkpoint
        return real(batch, step)

    monkeypatch.setattr(killed, "_step", dies)
    with pytest.raises(MemoryError):
        killed.run()
    assert [row["step"] for row in steps(tmp_path / "killed")] == [0, 1, 2]
    trainer(opt, tmp_path / "killed").run(resume=True)
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")


def test_a_new_run_in_the_same_folder_starts_a_new_log(opt: Any, tmp_path: Path) -> None:
    trainer(opt, tmp_path).run()
    first = rows(tmp_path)
    trainer(opt, tmp_path).run()
    assert rows(tmp_path) == first


def test_resuming_a_finished_run_gives_its_adapter_and_runs_nothing(
    opt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = trainer(opt, tmp_path).run()
    again = trainer(opt, tmp_path)
    monkeypatch.setattr(again, "states", None)
    assert same(done.exits.modules.state_dict(), again.run(resume=True).exits.modules.state_dict())


QUICK = replace(SHORT, steps=2, adversarial=0.0)
ATTEMPT = {"asked": "1%", "settings": {}, "number": 1, "images": [], "path": [], "outcome": {}}


def attempted(out: Path, opt: Any, **more: Any) -> dict[str, bytes]:
    """The adapter in `out` as a calibration leaves it; its files."""
    made = replace(Adapter.load(out, opt), attempts=[ATTEMPT], **more)
    made.save(out)
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    """The adapter's own files, without the run's."""
    return {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}


def test_resuming_a_finished_run_returns_what_is_saved(opt: Any, tmp_path: Path) -> None:
    trainer(opt, tmp_path, QUICK).run()
    before = attempted(tmp_path, opt, policy=ExitPolicy({2: 0.5}), calibration={"kept": True})
    found = trainer(opt, tmp_path, QUICK).run(resume=True)
    assert found.attempts == [ATTEMPT] and found.calibration == {"kept": True}
    assert found.policy.thresholds == {2: 0.5} and contents(tmp_path) == before


@pytest.mark.parametrize("gone", ["adapter.json", "exits.safetensors"])
def test_resuming_a_finished_run_saves_what_is_gone(gone: str, opt: Any, tmp_path: Path) -> None:
    trainer(opt, tmp_path, QUICK).run()
    before = contents(tmp_path)
    (tmp_path / gone).unlink()
    trainer(opt, tmp_path, QUICK).run(resume=True)
    assert contents(tmp_path).keys() == before.keys()
    assert contents(tmp_path)["exits.safetensors"] == before["exits.safetensors"]
    attempted(tmp_path, opt)
    (tmp_path / gone).unlink()  # what was attempted does not go with it
    with pytest.raises(InputError, match="attempts"):
        trainer(opt, tmp_path, QUICK).run(resume=True)
    assert (tmp_path / "attempts.json").exists()


@pytest.mark.usefixtures("ctrl_c")
def test_a_run_that_goes_on_is_refused_where_its_exits_were_calibrated(
    opt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = trainer(opt, tmp_path, QUICK)
    interrupt_at(broken, 1, "fetch", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    before = attempted(tmp_path, opt)
    with pytest.raises(InputError, match=r"attempts.*\n.*copy"):
        trainer(opt, tmp_path, QUICK).run(resume=True)
    assert contents(tmp_path) == before
    for name in ("adapter.json", "attempts.json"):
        (tmp_path / name).unlink()
    assert not trainer(opt, tmp_path, QUICK).run(resume=True).attempts


def test_drafting_is_learnt_once_and_keeps_what_was_calibrated(
    opt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer of an exit stays when it learns to draft on, and so does what is known of it."""
    config = replace(QUICK, exit_kind="drafting")
    given = (opt, fakes.Blip2FakeProcessor("blip2-opt"), fakes.examples(12))
    train(*given, replace(config, exit_kind="layer"), tmp_path)
    attempted(tmp_path, opt, calibration={"kept": True})
    taught = train(*given, config, tmp_path, resume=True)
    assert taught.exits.draft_on and taught.attempts and taught.calibration == {"kept": True}
    before = contents(tmp_path)
    monkeypatch.setattr(Trainer, "teach_drafts", None)
    assert train(*given, config, tmp_path, resume=True).exits.draft_on
    assert contents(tmp_path) == before


def test_a_finished_run_leaves_no_states_on_the_disk(opt: Any, tmp_path: Path) -> None:
    trainer(opt, tmp_path, replace(SHORT, cache="disk")).run()
    assert not list((tmp_path / FOLDER).rglob("*.pt"))


@pytest.mark.parametrize("change", [{"learning_rate": 0.5}, {"seed": 3}, {"depths": (3,)}])
def test_a_checkpoint_of_other_options_is_refused(
    change: dict[str, Any], opt: Any, tmp_path: Path
) -> None:
    trainer(opt, tmp_path).run()
    with pytest.raises(TrainingError, match=next(iter(change))):
        trainer(opt, tmp_path, replace(SHORT, **change)).run(resume=True)


def test_a_checkpoint_of_other_examples_or_another_backbone_is_refused(
    opt: Any, tmp_path: Path
) -> None:
    trainer(opt, tmp_path).run()
    with pytest.raises(TrainingError, match="other examples"):
        trainer(opt, tmp_path, n=13).run(resume=True)
    other = Backbone(families.build("blip2-opt", seed=1))
    with pytest.raises(TrainingError, match="other backbone"):
        trainer(other, tmp_path).run(resume=True)


def test_a_damaged_checkpoint_is_an_error_that_says_so(opt: Any, tmp_path: Path) -> None:
    trainer(opt, tmp_path).run()
    state = (tmp_path / STATE).read_bytes()
    for damaged in (state[: len(state) // 2], b"", b"no checkpoint"):
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(TrainingError, match="damaged"):
            trainer(opt, tmp_path).run(resume=True)


# -- failures ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_step_and_examples_and_damages_nothing(
    opt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(opt, tmp_path)
    poisoned: list[tuple[str, ...]] = []
    real = run._step
    kept: dict[str, bytes] = {}
    files = ("exits.safetensors", "adapter.json", STATE)

    def step(batch: Any, number: int) -> Any:
        if number == 3:
            kept.update({name: (tmp_path / name).read_bytes() for name in files})
            poisoned.append(batch.keys)
            batch = replace(batch, teacher=batch.teacher * float("nan"))
        return real(batch, number)

    monkeypatch.setattr(run, "_step", step)
    with pytest.raises(TrainingError) as caught:
        run.run()
    assert "nan at step 3" in str(caught.value)
    assert all(key in str(caught.value) for key in poisoned[0][:4])
    assert kept == {name: (tmp_path / name).read_bytes() for name in files}
    assert all(torch.isfinite(p).all() for p in run.exits.parameters())
    trainer(opt, tmp_path / "whole").run()
    trainer(opt, tmp_path).run(resume=True)
    assert rows(tmp_path) == rows(tmp_path / "whole")


def test_a_gradient_that_is_not_finite_moves_nothing(
    opt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(opt, tmp_path)
    real = run.objective.generator_loss

    def steep(*args: Any) -> Any:
        loss, report = real(*args)
        return loss + (loss * 0).sqrt(), report

    monkeypatch.setattr(run.objective, "generator_loss", steep)
    with pytest.raises(TrainingError, match="gradient's norm is nan at step 0"):
        run.run()
    assert same(untrained(run), dict(run.exits.state_dict()))


def test_a_discriminator_loss_that_is_not_finite_is_an_error(
    opt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(opt, tmp_path)
    lost = (torch.tensor(float("inf")), {"discriminator/2": float("inf")})
    monkeypatch.setattr(run.objective, "discriminator_loss", lambda *_: lost)
    with pytest.raises(TrainingError, match="discriminators' loss is inf at step 0"):
        run.run()


def test_training_stops_after_validations_without_progress(
    opt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(opt, tmp_path, replace(SHORT, steps=50, patience=2))
    agreements = iter([0.1, 0.5, 0.4, 0.5, 0.9])
    monkeypatch.setattr(run, "_agreement", lambda _: dict.fromkeys(("2", "4"), next(agreements)))
    adapter = run.run()
    assert run.progress.step == 6
    assert adapter.metrics["agreement"] == {"2": 0.5, "4": 0.5}
    assert adapter.metrics["step"] == 2


def test_the_adapter_is_the_best_one_not_the_last(
    opt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(opt, tmp_path)
    agreements = iter([0.1, 0.5, 0.4, 0.3])
    seen: list[dict[str, Any]] = []

    def agreement(_: Any) -> dict[str, float]:
        seen.append(run._copies())
        return dict.fromkeys(("2", "4"), next(agreements))

    monkeypatch.setattr(run, "_agreement", agreement)
    adapter = run.run()
    loaded = Adapter.load(tmp_path, opt)
    for one in (adapter, loaded):
        assert same(seen[1]["exits"], one.exits.modules.state_dict())


def test_no_examples_is_a_data_error(opt: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no examples"):
        train(opt, fakes.Blip2FakeProcessor("blip2-opt"), [], SHORT, tmp_path)


def test_a_damaged_picture_is_named_before_anything_is_generated(
    opt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    some = fakes.examples(12)
    some[7] = replace(some[7], image=tmp_path / "bad.png")
    monkeypatch.setattr("offramp.training.feature_dataset.answers_of", None)
    with pytest.raises(DataError, match=r"bad\.png"):
        train(opt, fakes.Blip2FakeProcessor("blip2-opt"), some, SHORT, tmp_path)


def test_a_single_picture_is_a_data_error(opt: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few"):
        trainer(opt, tmp_path, n=1).run()


def test_a_missing_label_is_a_data_error_where_labels_are_needed(opt: Any, tmp_path: Path) -> None:
    some = [replace(e, answers=()) for e in fakes.examples(8)]
    processor = fakes.Blip2FakeProcessor("blip2-opt")
    with pytest.raises(DataError, match="has no answer"):
        train(opt, processor, some, replace(SHORT, regime="supervised"), tmp_path)
    train(opt, processor, some, replace(SHORT, steps=1), tmp_path)


def test_an_unreachable_confidence_is_a_data_error(opt: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"confidence 1\.0"):
        trainer(opt, tmp_path, replace(SHORT, regime="pseudo", min_confidence=1.0)).run()


def test_all_wrong_options_are_named_together() -> None:
    with pytest.raises(InputError) as caught:
        TrainConfig(regime="x", steps=0, patience=0, cache="y", learning_rate=float("nan"))
    assert all(n in str(caught.value) for n in ("regime", "steps", "patience", "cache", "learning"))


@pytest.mark.parametrize("regime", ["unsupervised", "mixed"])
def test_a_run_without_any_signal_is_refused(regime: str) -> None:
    off = dict.fromkeys(OBJECTIVES, 0.0)
    with pytest.raises(InputError, match="no loss has a weight"):
        TrainConfig(regime=regime, **off)
    labels_only = {**off, "cross_entropy": 1.0}
    TrainConfig(regime="mixed", **labels_only)
    with pytest.raises(InputError, match="unsupervised regime needs a loss without labels"):
        TrainConfig(regime="unsupervised", **labels_only)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "cross_entropy"])
def test_any_loss_without_labels_is_enough(name: str) -> None:
    TrainConfig(regime="unsupervised", **{**dict.fromkeys(OBJECTIVES, 0.0), name: 1.0})


@pytest.mark.parametrize(
    "wrong",
    [{"l2": -1.0}, {"cosine": float("nan")}, {"adversarial": -0.1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_objective_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        TrainConfig(**wrong)


# -- other backbones --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3"])
def test_a_half_precision_backbone_trains_float32_exits_that_it_can_use(
    name: str, backbone: Build, tmp_path: Path
) -> None:
    one = backbone(name, torch.bfloat16)
    run = trainer(one, tmp_path, name=name)
    run.run()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.exits.parameters())
    adapter = Adapter.load(tmp_path, one)
    assert {p.dtype for p in adapter.exits.modules.parameters()} == {torch.bfloat16}
    prompts = run.states.encoder.prompts(fakes.examples(2))
    adapter.generate(prompts, max_new_tokens=3)
    leave = adapter.with_policy(replace(adapter.policy, thresholds={2: 0.0}))
    assert (leave.generate(prompts, max_new_tokens=3).depths[:, 1:] == 2).all()


def test_a_backbone_with_lora_trains(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(families.build("llava"), config)
    one = Backbone(wrapped)
    before = {n: t.clone() for n, t in wrapped.state_dict().items()}
    adapter = trainer(one, tmp_path, name="llava").run()
    assert same(before, wrapped.state_dict())
    loaded = Adapter.load(tmp_path, one)
    assert same(dict(adapter.exits.modules.state_dict()), dict(loaded.exits.modules.state_dict()))
