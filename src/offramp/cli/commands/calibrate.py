"""`offramp calibrate`: thresholds that keep a risk below a target, at a confidence."""

from __future__ import annotations

import argparse
import logging
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from offramp.cli.drafts import EXAMPLES, find_drafts
from offramp.cli.loading import (
    adapter_folder,
    answering,
    check_engine,
    check_name,
    read_data,
    unseen_items,
)
from offramp.cli.options import (
    ASKED,
    DATA,
    LOADED,
    add_command,
    asked_again,
    batch_option,
    field_option,
    length_option,
    measured_options,
    name_option,
    one_again,
    runtime_options,
)
from offramp.cli.output import few, say_next, show_result
from offramp.cli.outputs import overwrite_option
from offramp.cli.parser import Parser, share, some, whole
from offramp.core.errors import StorageError
from offramp.core.plugins import offered

log = logging.getLogger(__name__)


def add(commands: Any) -> None:
    add_command(
        commands,
        "calibrate",
        "Choose thresholds that keep the risk below a target, and store them in the adapter.",
        "offramp calibrate exits --data held_out.jsonl --target 0.01 --confidence 0.95\n"
        "  offramp calibrate exits --data held_out.jsonl --lossless\n"
        "  offramp calibrate exits --data vqa.jsonl --risk exact_match_drop "
        "--target 0.02",
        _calibrate,
        _options,
        usual="data limit lossless target confidence risk max-new-tokens engine gguf out",
    )


def _options(parser: Parser) -> None:
    from offramp.calibration.asked import Guarantee
    from offramp.calibration.attempts import UNITS
    from offramp.calibration.risk_functions import RISKS

    what = "images that training has not seen, like those to come"
    measured_options(
        parser, what, adapter=True, seen="trained", allow_seen=False, engines="all", auto=True
    )
    group = parser.add_argument_group("guarantee")
    field_option(
        group,
        Guarantee,
        "risk",
        "what an early answer may lose; only a drop needs labels",
        choices=RISKS,
    )
    field_option(group, Guarantee, "target", "largest risk that is allowed")
    field_option(group, Guarantee, "confidence", "probability that the bound holds")
    field_option(
        group,
        Guarantee,
        "unit",
        "what the risk is a mean over; with answers, images that are asked about often count more",
        choices=UNITS,
    )
    field_option(
        group,
        Guarantee,
        "each_kind",
        "keep the target for each kind of prompt, as captions and "
        "questions, and not for all together alone",
    )
    group.add_argument(
        "--target-of",
        action="append",
        type=_kind_target,
        default=[],
        metavar="KIND=X",
        help="target of its own for prompts that begin with KIND, such as Question=0.05; may be "
        "given several times, and each kind is then tested (default: --target for all)",
    )
    group.add_argument(
        "--frequencies",
        type=Path,
        metavar="FILE",
        help="with --risk cider_drop, captions of other images, by which words are weighed; those "
        "of images in --data are left out (default: those of 30%% of the images, which are not "
        "tested on)",
    )
    group.add_argument(
        "--of",
        type=whole(1),
        default=1,
        metavar="N",
        help="the best of this many adapters, training seeds or sets of images will be taken, each "
        "calibrated with this option (default: 1)",
    )
    _policy_options(parser.add_argument_group("early exit"))
    group = parser.add_argument_group("answers and output")
    length_option(group)
    batch_option(group, 64)
    group.add_argument(
        "--lossless",
        action="store_true",
        help="find instead the drafts with which lossless decoding is fastest on this machine, "
        f"timed on {EXAMPLES} examples unless --limit is given; answers do not change",
    )
    group.add_argument(
        "--write",
        action="store_true",
        help="where nothing can be guaranteed, store that, and switch the exits off (default: keep "
        "the adapter's thresholds)",
    )
    group.add_argument("--out", type=Path, help="folder for the adapter (default: its own)")
    overwrite_option(group)
    runtime_options(parser)


def _policy_options(group: Any) -> None:
    """Add the options of which thresholds are searched."""
    from offramp.core.decoding.confidence import FEATURE_SCORES, HEADS
    from offramp.core.decoding.scores import SCORES

    scores = (*SCORES, *FEATURE_SCORES, *HEADS, *offered("scores"))
    name_option(
        group,
        "--score",
        scores,
        "confidence score of thresholds, which are then calibrated and not trust",
        shown="the adapter's",
    )
    group.add_argument(
        "--thresholds",
        type=share,
        nargs="+",
        metavar="X",
        help="thresholds, or levels of trust, to test, the safest first, chosen before any of "
        "these images was looked at (default: from 0.999 down to 0.1; of trust from 0.98 to 0)",
    )
    group.add_argument(
        "--first-threshold",
        type=lambda text: text if text == "auto" else share(text),
        metavar="X",
        help="threshold of its own for an answer's first token, whose prompt then waits at its "
        "exit; auto: searched, on 30%% of the images; thresholds are then calibrated, and not "
        "trust (default: the adapter's)",
    )


def _kind_target(text: str) -> tuple[str, float]:
    """Parse START=TARGET: how prompts of a kind begin, and their target."""
    kind, _, target = text.rpartition("=")
    return kind, some(target)


def _calibrate(arguments: argparse.Namespace) -> None:
    from offramp.calibration.asked import Guarantee

    if arguments.lossless:
        check_name(arguments.adapter, exits=True)
        find_drafts(arguments)
        return

    names = ("target", "confidence", "risk", "unit", "each_kind")
    asked = {**{n: getattr(arguments, n) for n in names}, "candidates": arguments.of}
    asked["kind_targets"] = dict(arguments.target_of)
    guarantee = Guarantee(**asked)  # a mistake should not wait for data and model
    log.info(
        "A guarantee of %g by %s needs %d images, or groups of them, where no answer loses "
        "anything, and about %d where half the target is the truth%s; where several exits are "
        "searched, 30%% of the images go to that.",
        guarantee.target,
        guarantee.unit,
        guarantee.images_needed(),
        guarantee.images_for(guarantee.target / 2),
        ", more where images have unequal numbers of answers" if arguments.unit == "answer" else "",
    )
    check_engine(arguments, asks=True)
    check_name(arguments.adapter, exits=True)
    from offramp.training.checkpoint import held  # which loads PyTorch

    out = adapter_folder(arguments)
    with held(out):  # two at once would each be the first attempt
        _find(arguments, asked, out)


def _find(arguments: argparse.Namespace, asked: dict[str, Any], out: Path) -> None:
    """Read the data, and find thresholds by the model that answers."""
    from offramp.calibration.risk_functions import RISKS
    from offramp.data.datasets import read_examples

    labelled = RISKS[arguments.risk].quality is not None
    items = read_data(arguments, require_answers=labelled)
    others = None
    if arguments.frequencies is not None:
        others = read_examples(arguments.frequencies, require_answers=True)
    with answering(arguments) as (opened, runtime):
        _find_by(opened, runtime, items, others, arguments, asked, out)


def _find_by(
    opened: Any,
    runtime: Any,
    items: Any,
    others: Any,
    arguments: argparse.Namespace,
    asked: dict[str, Any],
    out: Path,
) -> None:
    """Find thresholds as `asked`, store them in `out`, and show them. runtime: what answers in the
    adapter's place, or None. others: by which words are weighed, or None."""
    from dataclasses import replace

    from offramp.adapter.runtime import Asked
    from offramp.calibration.ledger import note_attempts, with_ledger
    from offramp.calibration.profiler import measure_costs
    from offramp.calibration.replay import can_replay
    from offramp.calibration.ways import by_trust, fastest
    from offramp.common.progress import progress

    adapter, encoder = opened.adapter, opened.encoder
    if arguments.seen == "leave-out":
        items = unseen_items(items, adapter, ("train",))
    examples = [item.example for item in items]
    _say_worth(examples, asked)
    options = {"max_new_tokens": arguments.max_new_tokens}
    policy = None
    plain = arguments.score or arguments.first_threshold  # which say nothing to trust
    if not plain and not (isinstance(runtime, Asked) and not runtime.drafts):
        policy = by_trust(adapter, **options)
    if policy is None:
        score = arguments.score or adapter.policy.score
        policy = replace(adapter.policy, thresholds={}, lossless=False, score=score, trust=None)
    costs = None
    if runtime is None and policy.trust is None and can_replay(policy):  # an answer at a time
        costs = measure_costs(
            adapter.backbone,
            encoder.prompts(examples[:1]),
            adapter.exits,
            score=policy.score,
            shortlist=policy.shortlist,
        )
    steps = chain(["answers"], repeat("calibrate"))
    _say_how_long(runtime or adapter, encoder, examples, policy, arguments)
    with with_ledger(adapter) as adapter:
        calibration = fastest(
            adapter,
            encoder,
            items,
            policy,
            costs=costs,
            runtime=runtime,
            thresholds=arguments.thresholds,
            first=arguments.first_threshold,
            frequencies=others,
            batch_size=arguments.batch_size,
            progress=lambda items: progress(items, next(steps)),
            **options,
            **asked,
        )
        found = calibration.to_json()
        note_attempts(adapter.backbone, calibration.attempts)
        try:
            _store(adapter, calibration, examples, arguments, out)
        except StorageError as error:
            error.result = found  # it took long to find
            raise
    show_result(found, _table(calibration), as_json=arguments.json)
    how, stored = asked_again(arguments, *LOADED), _is_stored(calibration, arguments)
    if isinstance(runtime, Asked):  # which drafts losslessly by itself
        name, mode = (out, " --mode early_exit") if stored else (arguments.adapter, "")
        say_next(f"offramp serve {name}{how}{mode}")
    elif stored:
        say_next(f"offramp generate {out}{one_again(arguments)}", f"offramp serve {out}{how}")
    else:
        how = asked_again(arguments, "data", *LOADED, *ASKED, *DATA)
        say_next(f"offramp calibrate {arguments.adapter}{how} --lossless")


def _say_worth(examples: Any, asked: dict[str, Any]) -> None:
    """Say which true risk a first attempt with these images can certify, before it is spent."""
    from offramp.calibration.asked import Guarantee
    from offramp.calibration.risk_functions import RISKS

    guarantee, n = Guarantee(**asked), len({e.source or e.group or e.key for e in examples})
    least, gains = guarantee.least_target(examples), RISKS[guarantee.risk].low < 0
    if least > guarantee.target:
        log.warning(
            "%d images, or groups of them, cannot guarantee %g%s, but at best %.3g: give more, or "
            "a larger --target.",
            n,
            guarantee.target,
            " unless early answers are better than the full model's"
            if gains
            else ", however good the exits are",
            least,
        )
        return
    target, enough = guarantee.target, guarantee.images_for
    shares = (share for share in range(90, -1, -5) if n >= (enough(target * share / 100) or n + 1))
    log.info(
        "With these %d images, which can guarantee %.3g at best, a first attempt passes four times "
        "in five where at most %d%% of the target is lost in truth; further attempts on them share "
        "a fifth of the error budget.",
        n,
        least,
        next(shares, 0),
    )


def _say_how_long(
    model: Any, encoder: Any, examples: Any, policy: Any, arguments: argparse.Namespace
) -> None:
    """From a few answers of the full model: all are answered once by it, and then read once again,
    where that shows what exits would say, or else answered at each of the thresholds."""
    import time

    from offramp.adapter.adapter import Adapter
    from offramp.adapter.answers import generate_answers
    from offramp.calibration.calibrate import COARSE, GRID
    from offramp.calibration.replay import can_replay
    from offramp.common.progress import duration
    from offramp.core.decoding.policy import FULL

    rows = min(arguments.batch_size, getattr(model, "rows", 8), len(examples))
    begin = time.perf_counter()
    generate_answers(
        model,
        encoder,
        examples[:rows],
        FULL,
        batch_size=rows,
        max_new_tokens=arguments.max_new_tokens,
    )
    once = (time.perf_counter() - begin) * len(examples) / rows
    elsewhere = not isinstance(model, Adapter)
    replayed = not elsewhere and can_replay(policy)
    grid = arguments.thresholds or (COARSE if elsewhere else GRID)
    passes = 2 if replayed or policy.trust is not None else 1 + len(grid)
    log.info("Calibrating on %d examples takes about %s.", len(examples), duration(once * passes))


def _store(
    adapter: Any, calibration: Any, examples: Any, arguments: argparse.Namespace, out: Path
) -> None:
    """The calibrated adapter; where nothing is guaranteed, the attempt alone, which used a share of
    the error budget. The adapter that was read keeps the attempt too, wherever the copy goes."""
    from offramp.calibration.calibrate import calibrated, with_attempts

    source = Path(arguments.adapter) if Path(arguments.adapter).is_dir() else None
    written = _is_stored(calibration, arguments)
    if written:
        calibrated(adapter, calibration, examples).save(out)
        log.info("Written to %s.", out)
        if source is None or source.resolve() == out.resolve():
            return
    folder = source or out
    if not written and not calibration.path:
        log.info("The adapter in %s stays as it was.", folder)
        return
    with_attempts(adapter, calibration).save(folder)
    if written:
        log.info("The attempt is recorded in %s too.", folder)
        return
    log.info("The adapter's thresholds stay as they were; the attempt is recorded in %s.", folder)


def _is_stored(calibration: Any, arguments: argparse.Namespace) -> bool:
    """Whether what was found is written: not where nothing is faster at what was asked."""
    return bool(not calibration.reason or calibration.policy.lossless or arguments.write)


def _table(calibration: Any) -> str:
    """The end of the path, and the guarantee, as a person reads them on a terminal."""
    from offramp.calibration.ways import way_of
    from offramp.promises.guarantee import SCALES, risk_words, target_words
    from offramp.promises.likeness import LIKE

    points = []
    for point in reversed(calibration.path):  # the boldest first: what decides
        shown = ", ".join(f"{d}: {t:g}" for d, t in point.thresholds.items())
        took = "" if point.seconds is None else f"{point.seconds * 1e6:.0f}"
        points.append(f"{shown:<32}{point.risk:>10.4f}{point.bound:>10.4f}{took:>10}")
    name, setting = way_of(calibration.policy)
    lines = [f"{name:<32}{'risk':>10}{'at most':>10}{'us/token':>10}", *few(points, 5), ""]
    if calibration.attempt > 1 and calibration.path:
        lines.append(
            f"This is attempt {calibration.attempt} on these images, so it is tested at a "
            f"confidence of {calibration.level:.2%}: all attempts together keep "
            f"{calibration.confidence:.0%}."
        )
    if calibration.candidates > 1:
        lines.append(
            f"The best of {calibration.candidates} may be taken: each is tested at "
            f"{calibration.level:.2%}."
        )
    if len(calibration.kinds) > 1:
        named = [
            f"{kind.kind or 'other prompts'}: {kind.risk:.4f} on {kind.images} images"
            + (f", answered at {_at(calibration, kind)}" if kind.point else "")
            for kind in calibration.kinds
        ]
        lines.append(f"By kind of prompt: {'; '.join(named)}.")
    if calibration.copies:
        lines.append(f"{calibration.copies} images are copies of others and count once.")
    if calibration.policy.lossless:
        lines.append(calibration.reason)
    elif calibration.reason:
        lines.append(f"Nothing is guaranteed. {calibration.reason}")
    else:
        speed = calibration.speedup
        each = "for each kind of prompt " if calibration.each_kind else ""
        own_targets = {k.kind: k.target for k in calibration.kinds if k.target is not None}
        groups = f" in {calibration.groups} groups" if calibration.groups else ""
        own = {} if calibration.policy.trust is not None else calibration.policy.first
        first = f"; of first tokens {own}" if own else ""
        faster = f"; decoding is predicted to be {speed:.2f}x" if speed else ""
        lines.append(
            f"Guaranteed with {calibration.confidence:.0%} confidence: "
            f"{each}{risk_words(calibration.risk, calibration.unit)} is at most "
            f"{target_words(calibration.risk, calibration.target, own_targets)} {LIKE} "
            f"(measured {SCALES.get(calibration.risk, 1) * calibration.measured:.4f} on "
            f"{calibration.n} images{groups}, {calibration.answers} answers){faster}. "
            f"{name.capitalize()}: {setting}{first}."
        )
    return "\n".join([*lines, *_compared(calibration)])


def _at(calibration: Any, kind: Any) -> str:
    """The thresholds, or the trust, that prompts of a kind are answered by."""
    from offramp.calibration.ways import way_of

    return " ".join(way_of(calibration.policy.moved(kind.point)))


def _compared(calibration: Any) -> list[str]:
    """All ways that were compared, and in a sentence which is fastest."""
    from offramp.calibration.ways import compared

    if not calibration.ways:
        return []
    rows = ["", f"{'way':<12}{'setting':<32}{'speed':>8}{'risk':>10}"]
    for way in sorted(calibration.ways, key=lambda way: way.times):
        risk = "none" if way.risk is None else f"{way.risk:.4f}"
        untested = "" if way.risk is None or way.promised else f"  of {way.answers}, not tested"
        rows.append(f"{way.name:<12}{way.setting:<32}{way.times:>7.2f}x{risk:>10}{untested}")
    return [*rows, compared(calibration.ways)]
