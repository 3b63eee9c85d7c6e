"""`offramp eval`: quality, depth and latency on a data set."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offramp.cli.loading import check_engine, load_model, loaded, policy_of, read_data, unseen_items
from offramp.cli.options import (
    add_command,
    batch_option,
    field_option,
    length_option,
    measured_options,
    name_option,
    runtime_options,
    threshold_option,
)
from offramp.cli.output import say_next, show_result
from offramp.cli.parser import Parser
from offramp.core.errors import InputError
from offramp.engines import engine_named


def add(commands: Any) -> None:
    add_command(
        commands,
        "eval",
        "Measure quality, depth and latency on a data set, with the full model and early exits.",
        "offramp eval exits --task captions --data photos.jsonl --out runs/captions\n"
        "  offramp eval exits --task vqa --images val2014 --out runs/vqa \\\n"
        "      --data v2_OpenEnded_mscoco_val2014_questions.json\n"
        "  offramp eval exits --task vqa --data ... --out runs/vqa --resume\n"
        "  offramp eval --backbone tiny-opt --mode full --task gqa --data questions.jsonl "
        "--out runs/gqa",
        _eval,
        _options,
        usual="task data limit mode batch-size max-new-tokens out resume",
    )


def _options(parser: Parser) -> None:
    measured_options(
        parser,
        "what is evaluated",
        adapter=False,
        seen="trained or calibrated",
        allow_seen=True,
        engines="all",
    )
    threshold_option(parser)
    _evaluation_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for rows.jsonl (an answer a line) and result.json",
    )
    group.add_argument("--resume", action="store_true", help="continue the run in --out")
    group.add_argument(
        "--rescore",
        action="store_true",
        help="score the answers in --out again; no model is loaded",
    )
    runtime_options(parser)


def _evaluation_options(parser: Parser) -> None:
    from offramp.evaluation.tasks import TASK_METRICS, WHICH, EvaluationSettings

    group = parser.add_argument_group("evaluation")
    name_option(group, "--task", TASK_METRICS, "task", required=True)
    field_option(
        group,
        EvaluationSettings,
        "mode",
        "which models answer",
        choices=WHICH,
        default=None,
        shown="both; without exits full",
    )
    batch_option(group, 1, "examples at once; more than 1 measures quality only")
    length_option(group, None, "40 for captions, 20 for dialogue, 10 for questions")


def _eval(arguments: argparse.Namespace) -> None:
    from offramp.common.folders import check_writable
    from offramp.common.progress import progress
    from offramp.evaluation.evaluate import RESULT, evaluate, rescore
    from offramp.evaluation.run_log import ROWS
    from offramp.evaluation.tasks import EvaluationSettings
    from offramp.features.input_processor import InputProcessor

    settings = {n: getattr(arguments, n) for n in ("batch_size", "max_new_tokens")}
    alone = arguments.adapter is None and not arguments.rescore
    settings["mode"] = arguments.mode or ("full" if alone else "both")
    EvaluationSettings(arguments.task, **settings)  # a mistake should not wait for data and model
    check_engine(arguments)
    if alone and engine_named(arguments.engine).replaces:
        raise InputError(f"--engine {arguments.engine} runs an adapter.", "Name one first.")
    if alone and arguments.backbone is None:
        raise InputError("Nothing to evaluate was named.", "Name exits first, or give --backbone.")
    check_writable(arguments.out, folder=True)
    if not (arguments.out / ROWS).exists() and (arguments.out / RESULT).exists():
        raise InputError(
            f"{arguments.out / RESULT} is of no run that is there: it would be lost.",
            "Give another --out.",
        )
    items = read_data(arguments)
    if arguments.rescore:
        result = rescore(arguments.out, items, arguments.task, **settings)
    else:
        runtime = None
        if alone:
            model, processor = load_model(arguments)
            encoder = InputProcessor(model, processor)
        else:
            opened = loaded(arguments, sequences=arguments.batch_size, keep_decoder=True)
            model, runtime, encoder = opened.adapter, opened.runtime, opened.encoder
        if arguments.seen == "leave-out" and not alone:
            items = unseen_items(items, model, ("train", "calibration"))
        result = evaluate(
            model,
            encoder,
            items,
            arguments.task,
            None if alone or arguments.threshold is None else policy_of(arguments, model, ""),
            out=arguments.out,
            runtime=runtime,
            resume=arguments.resume,
            allow_seen=arguments.seen == "allow",
            progress=lambda batches: progress(batches, "evaluate"),
            **settings,
        )
    file = arguments.out / RESULT
    show_result(result, summary(result, file), as_json=arguments.json)
    say_next(f"offramp report {arguments.out} --out report.html")


def summary(result: Mapping[str, Any], file: Path) -> str:
    """Return the result in ten lines for people; all of it is in `file`, and under --json."""
    modes, compared = result["modes"], result.get("compared")
    missing = f", {result['missing']} without an answer" if result["missing"] else ""
    lines = [f"{result['task']}: {result['n']} examples{missing}"]
    for name, mode in modes.items():
        depth = mode["mean_depth"]
        ran = "no tokens" if depth is None else f"mean depth {depth:.2f} of {mode['layers']}"
        rate = (mode["latency"] or {}).get("tokens_per_second")
        lines.append(
            f"{name.replace('_', ' ')}: {ran}" + (f", {rate:.1f} tokens/s" if rate else "")
        )
    metrics = next(iter(modes.values()))["metrics"]
    shown = list(metrics)[:SHOWN]
    for name in shown:
        values = " / ".join(_between(mode["metrics"][name]) for mode in modes.values())
        lines.append(f"{name}: {values}")
    if len(metrics) > len(shown):
        lines[-1] += f"; {len(metrics) - len(shown)} more measures with --json"
    if compared is not None:
        lines.append(f"same answers as the full model: {_between(compared['agreement'])}")
        speeds = {n: s for n, s in compared["speedup"].items() if s}
        if speeds:
            words = (f"{n.replace('_', ' ')} {_between(s)}x" for n, s in speeds.items())
            lines.append(f"speedup over exits off, same model and kernels: {', '.join(words)}")
    return "\n".join([*lines, f"all of it: {file}"])


SHOWN = 4
"""Measures of quality in the summary."""


def _between(figure: Mapping[str, Any]) -> str:
    """A figure with its interval, where it has one."""
    if figure["value"] is None:
        return "none"
    ends = [figure["low"], figure["high"]]
    interval = "" if None in ends else f" [{ends[0]:.3g}, {ends[1]:.3g}]"
    return f"{figure['value']:.3g}{interval}"
