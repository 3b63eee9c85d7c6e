"""Write the README's figures from the committed records, so that none is typed by hand."""

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median

from offramp.evaluation.statistics import t_interval
from offramp.research.comparison.equal_quality import LEVELS, ahead, equal_quality

ROOT = Path(__file__).parent.parent
KINDS = ("opt", "t5")
BEGIN, END = "<!-- figures:begin -->\n", "<!-- figures:end -->"


def figures() -> str:
    """The demo's figures of both shipped models, as Markdown."""
    reports = [
        json.loads((ROOT / "benchmarks" / "records" / f"demo-{kind}.json").read_text())
        for kind in KINDS
    ]
    machine = reports[0]["provenance"]
    lines = [
        "What it printed, on pictures that neither training nor the threshold had seen (batch 1, "
        f"float32, {machine['threads']} thread, {machine['processor']}; medians of "
        f"{reports[0]['sizes']['rounds']} interleaved rounds):",
        "",
        "| | "
        + " | ".join(f"tiny BLIP-2/{r['backbone'].split('-')[1].upper()}" for r in reports)
        + " |",
        "|---|" + "---|" * len(reports),
    ]
    rows = [
        ("decoder layers, exits at", lambda r, e: f"{r['layers']}, {r['exits']}"),
        ("mean depth of a token", lambda r, e: f"{e['mean_depth']:.2f}"),
        ("decoding, against our full-depth loop", lambda r, e: f"**{e['speedup_decode']:.2f}x**"),
        ("end to end, vision and prompt included", lambda r, e: f"{e['speedup_end_to_end']:.2f}x"),
        ("decoding, against stock `generate`", lambda r, e: f"{e['speedup_vs_generate']:.2f}x"),
        ("our full-depth loop against `generate`", lambda r, e: f"{r['full_vs_generate']:.2f}x"),
        ("answers identical to the full model's", lambda r, e: f"{e['agreement']:.1%}"),
        (
            "captions fully right, full / early exit",
            lambda r, e: _pair(r["modes"]["full"], e, "captions"),
        ),
        (
            "questions right, full / early exit",
            lambda r, e: _pair(r["modes"]["full"], e, "questions"),
        ),
        (
            "lossless mode: decoding, end to end",
            lambda r, e: _lossless(r["modes"]["lossless"]),
        ),
        (
            "lossless output identical to the full model's",
            lambda r, e: "yes" if r["modes"]["lossless"]["identical"] else "NO",
        ),
        ("training the exits", lambda r, e: f"{r['training_seconds']:.0f} s"),
    ]
    for title, value in rows:
        cells = " | ".join(value(r, r["modes"]["early_exit"]) for r in reports)
        lines.append(f"| {title} | {cells} |")
    lines += ["", "`make records` runs both again and rewrites this table.", "", *_promised()]
    lines += ["", *_labels(), "", *_photographs(), "", *_photographs_compared()]
    return "\n".join(lines) + "\n"


RISK_NAMES = {
    "disagreement": "answers that differ from the full model's",
    "exact_match_drop": "answers lost that were right",
}


def _promised() -> list[str]:
    """What calibration promised, and what became of it on other pictures."""
    record, violations = (
        json.loads((ROOT / "benchmarks" / "records" / f"{name}.json").read_text())
        for name in ("calibrated", "violations")
    )
    first = record["opt"][0]
    lines = [
        f"Thresholds that keep a promise with {first['confidence']:.0%} confidence, found on "
        f"{first['n_calibration']:,} answers without training on them and measured on "
        f"{first['n_test']:,} others (exits at 2 and 4 of 12):",
        "",
        "| model | at most | promised | on test | decoding | end to end | quality drop |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| tiny {kind.upper()} | {RISK_NAMES[row['risk']]} | {row['risk_target']:.0%} "
        f"| {row['risk_test']:.2%} | **{row['speedup_decode']:.2f}x** "
        f"| {row['speedup_end_to_end']:.2f}x | {row['quality_drop']:+.2%} |"
        for kind in KINDS
        for row in record[kind]
    ]
    rows = [row for kind in KINDS for row in violations[kind]]
    worst = max(rows, key=lambda row: row["violations"])
    lines += [
        "",
        f"Over {worst['splits']} random splits of a pool of {worst['n_pool']:,} answers, each "
        "calibrated on one half and measured on the other, the promise was broken at most "
        f"{worst['violations']} time{'s' * (worst['violations'] != 1)} in any of {len(rows)} "
        f"settings (stated: {violations['stated_share']:.0%}, that is "
        f"{worst['splits'] * violations['stated_share']:.1f}). `make calibrated` runs it again.",
    ]
    return lines


WAYS = {
    "max_probability": "",
    "patience": ", by patience (PABEE)",
    "saturation": ", by saturation (MuE)",
}
OURS = {"free": "FREE, no labels", "free_supervised": "FREE, all labels"}
BASELINES = {
    "cross_entropy": "cross-entropy, all labels",
    "cross_entropy_few": "cross-entropy, {few:.0%} of the labels",
    "logit_lens": "logit lens",
}
HELD = {
    "free": ("cross_entropy_few", "FREE, no labels, ahead of the best with {few:.0%}"),
    "free_supervised": ("cross_entropy", "FREE, all labels, ahead of the best with all"),
}
"""What is held against the best of the baselines that learn from so many labels, or from none."""


def _labels() -> list[str]:
    """FREE without labels and with them beside methods that need labels, and those without any."""
    record = json.loads((ROOT / "benchmarks" / "records" / "compare.json").read_text())
    models = {kind: record[kind] for kind in KINDS}
    plan = models["opt"]["plan"]
    few = plan["training"]["labelled_fraction"]
    at, several = (
        " and ".join(f"{m['plan'][name]} ({_tiny(kind)})" for kind, m in models.items())
        for name in ("depths", "several")
    )
    heads = [f"{_tiny(kind)}, {_percent(str(level))}" for kind in KINDS for level in LEVELS]
    lines = [
        "What labels are worth: decoding where quality drops by at most so much, by how exits at "
        f"{at} were trained, all from `--initial-layer {plan['training']['initial_layer']}`; those "
        f"by patience and saturation stand at {several}. Means of {plan['seeds']} seeds ([all "
        "objectives and policies](docs/choices.md)).",
        "",
        f"| exits trained by | {' | '.join(heads)} |",
        "|---|" + "---|" * len(heads),
    ]
    names = [*product(OURS, ["max_probability"]), *product(BASELINES, WAYS)]
    raced = {(p["objective"], p["policy"]) for p in models["opt"]["points"]}
    speeds = {name: _speeds(models, *name) for name in names if name in raced}
    for (objective, policy), some in speeds.items():
        title = {**OURS, **BASELINES}[objective].format(few=few) + WAYS[policy]
        cells = " | ".join(f"{speed:.2f}x" for speed in some)
        lines.append(f"| {title} | {cells} |")
    for ours, (labelled, title) in HELD.items():
        theirs = [some for (name, _), some in speeds.items() if name in (labelled, "logit_lens")]
        best = map(max, zip(*theirs, strict=True))
        ratios = zip(speeds[ours, "max_probability"], best, strict=True)
        cells = " | ".join(f"**{our / their:.2f}**" for our, their in ratios)
        lines.append(f"| {title.format(few=few)} | {cells} |")
    return lines


def _speeds(models: dict[str, dict], objective: str, policy: str) -> list[float]:
    """At every level of each model; with the largest probability at the first depths alone."""
    found = []
    for model in models.values():
        points = [
            p for p in model["points"] if (p["objective"], p["policy"]) == (objective, policy)
        ]
        if policy == "max_probability":
            points = [p for p in points if p["depths"] == model["plan"]["depths"]]
        found += equal_quality(points)["curves"][0]["speedup_decode"].values()
    return found


def _photographs() -> list[str]:
    """What exits trained without labels are worth on a model of photographs."""
    record = json.loads((ROOT / "benchmarks" / "records" / "photo.json").read_text())
    regimes, exact = record["regimes"].values(), record["lossless"]
    counts = {row["n_test"] for one in regimes for row in one["points"] if row["thresholds"]}
    lines = [
        "On photographs, SmolLM2-135M behind a bridge to EfficientNet-lite0, exits trained without "
        "labels ([more](examples/photo_vlm/RESULTS.md)): captions of "
        f"{max(counts):,} Flickr8k photographs on which nothing was chosen.",
        "",
        "| exits | chosen on other photographs | decoding | end to end | CIDEr, full / early |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['regime']} | {row['chosen_by']} | **{row['speedup_decode']:.2f}x** "
        f"| {row['speedup_end_to_end']:.2f}x | {row['cider_full']:.3f} / {row['cider']:.3f} |"
        for one in regimes
        for row in one["points"]
        if row["thresholds"]
    ]
    same = f"{exact['identical_captions']:,} of {exact['captions']:,} identical"
    lines.append(
        f"| {record['first']} | lossless ({exact['dtype']}) | **{exact['speedup_decode']:.2f}x** "
        f"| {exact['speedup_end_to_end']:.2f}x | {same} |"
    )
    return lines


BESIDE = {
    ("free", "max_probability"): "FREE, no labels",
    ("distillation", "max_probability"): "distillation alone, no labels",
    ("cross_entropy_own", "max_probability"): "cross-entropy, captions of the model's own",
    ("cross_entropy", "max_probability"): "cross-entropy, all human captions",
    ("cross_entropy_few", "max_probability"): "cross-entropy, 10% of the human captions",
    ("free", "patience"): "FREE, leaving by patience (PABEE)",
    ("free", "saturation"): "FREE, leaving by saturation (MuE)",
    ("logit_lens", "saturation"): "logit lens, leaving by saturation (MuE)",
    ("logit_lens", "max_probability"): "logit lens",
}


def _photographs_compared() -> list[str]:
    """FREE beside the usual baselines on photographs, at equal CIDEr."""
    record = json.loads((ROOT / "benchmarks" / "records" / "compare-photo.json").read_text())
    curves = {(c["objective"], c["policy"]): c for c in record["equal_quality"]["curves"]}
    levels = list(map(str, LEVELS))
    heads = " | ".join(f"{_percent(level)}, FREE ahead by" for level in levels)
    lines = [
        f"Beside other ways, on {record['n_test']:,} photographs: decoding where CIDEr drops by at "
        "most so much, and by how much FREE is faster, with its 95% interval "
        "([all of them](examples/photo_vlm/RESULTS.md)).",
        "",
        f"| exits | {heads} |",
        "|---|" + "---|" * len(levels),
    ]
    for name, title in BESIDE.items():
        curve = curves[name]
        cells = [f"{curve['speedup_decode'][at]:.2f}x{_over(curve, at)}" for at in levels]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _over(curve: dict, level: str) -> str:
    itself = curve["free_over_interval"][level] == [1, 1]
    return "" if itself else f", {ahead(curve, level)}"


def performance_figures() -> str:
    """What skipped layers are worth in time, and what else could be switched on, as Markdown."""
    bench, peers, dialogues = (
        json.loads((ROOT / "benchmarks" / "records" / f"{name}.json").read_text())
        for name in ("bench", "peers", "dialogues")
    )
    machine = bench[0]["machine"]
    forced = [e for e in bench if e["exit_depth"] is not None]
    subjects = dict.fromkeys((e["shape"], e["batch"], e["exit_depth"]) for e in forced)
    parts = [
        "Exits forced on random weights in the real sizes (bfloat16, "
        f"{machine['threads']} thread, {machine['processor']}): decoding in multiples of full "
        "depth, and in brackets what the cost model said before. In the batch every row leaves by "
        "a plan of its own. Lossless: 80% is planned; fewer are accepted where the full model, "
        "verifying several positions, says something else than it said over one, as random "
        "weights in bfloat16 may. Last "
        "column: exits that look at every token and let none go.",
        "",
        "| decoder, exit at | 50% leave | 75% | 90% | 90%, propagated keys "
        "| lossless, 80% right | none leaves |",
        "|---|---|---|---|---|---|---|",
        *(_forced_row(forced, *subject) for subject in subjects),
        "",
        _whole_loop([e for e in bench if e["policy"] == "full"]),
        "",
        "What else a user could switch on, on the tiny models that ship, with the same prompts in "
        "one interleaved race ([as a plot](benchmarks/records/peers.svg)): decoding and end to end "
        "in multiples of full depth, and the share of answers that are the full model's.",
        "",
        "| | tiny OPT | tiny T5 |",
        "|---|---|---|",
        *(
            f"| {name.replace('_', ' ')} | "
            + " | ".join(_peer(peers[k][name]) for k in KINDS)
            + " |"
            for name in peers["opt"]
        ),
        "",
        "Turns of dialogues with short answers, end to end in multiples of full depth, and the "
        "share of the time that goes by before the first token: where that is large, keep image "
        "features and the prompt's keys and values between calls (`vision_cache`, `prefix_cache`; "
        "the latter for decoder-only models). Answers stay the same.",
        "",
        "| | tiny OPT | tiny T5 |",
        "|---|---|---|",
        *(
            f"| {name.replace('_', ' ')} | "
            + " | ".join(_turns(dialogues[k][name]) for k in KINDS)
            + " |"
            for name in dialogues["opt"]
        ),
        "",
        "`make bench` measures all of this again.",
    ]
    return "\n".join(parts) + "\n"


def _forced_row(entries: list[dict], shape: str, batch: int, depth: int) -> str:
    """One decoder and exit: the cells of the table."""

    def cell(policy: str, rate: float) -> str:
        found = [
            e for e in entries
            if (e["shape"], e["batch"], e["exit_depth"]) == (shape, batch, depth)
            and (e["policy"], e["exit_rate"]) == (policy, rate)
            and e.get("rows", "independent") == "independent"
        ]  # fmt: skip
        if not found:
            return ""
        text = f"{found[0]['measured']:.2f}x ({found[0]['predicted']:.2f})"
        if policy != "lossless":
            return text
        # A draft counts up to the first wrong one of its round.
        planned = mean(rate**n for n in range(1, found[0]["max_draft"] + 1))
        kept = found[0]["accepted"] / found[0]["drafted"]
        return text if kept > planned - 0.2 else f"{text}, only {kept:.0%} accepted"

    cells = [cell("recompute", rate) for rate in (0.5, 0.75, 0.9)]
    cells += [cell("propagate", 0.9), cell("lossless", 0.8), cell("recompute", 0.0)]
    rows = f", {batch} rows" if batch > 1 else ""
    return f"| {shape}{rows}, {depth} | " + " | ".join(cells) + " |"


def _whole_loop(entries: list[dict]) -> str:
    """Our loop without exits, over all backbones that were measured."""
    ratios = sorted(e["measured"] for e in entries)
    return (
        f"With exits off the loop takes the time of HF's `generate`: over {len(ratios)} backbones "
        f"it is {ratios[0]:.2f} to {ratios[-1]:.2f} times as fast, {median(ratios):.2f} in the "
        "middle."
    )


def _turns(found: dict) -> str:
    text = f"{found['speedup_end_to_end']:.2f}x, {found['prefill_share']:.0%}"
    return text if found["same_answers"] else text + ", OTHER ANSWERS"


def _peer(found: dict) -> str:
    if "not_applicable" in found:
        return f"not applicable: {found['not_applicable']}"
    text = f"{found['speedup_decode']:.2f}x, {found['speedup_end_to_end']:.2f}x, "
    text += f"{found['identical']:.0%}"
    return text + (f" ({found['setting']})" if found["setting"] else "")


def _lossless(mode: dict) -> str:
    return f"{mode['speedup_decode']:.2f}x, {mode['speedup_end_to_end']:.2f}x"


def _pair(full: dict, early: dict, metric: str) -> str:
    return f"{full['quality'][metric]:.1%} / {early['quality'][metric]:.1%}"


def tiny_figures() -> str:
    """What the shipped models reach on the test split, as Markdown."""
    record = json.loads((ROOT / "recipes" / "tiny_vlm" / "record.json").read_text())
    models = [record["opt"], record["t5"]]
    rows = [
        ("questions right", lambda m: f"{m['question_accuracy']:.3f}"),
        ("captions fully right", lambda m: f"{m['captions_right']:.3f}"),
        ("captions of four objects", lambda m: f"{m['four_object_captions_right']:.3f}"),
        ("dialogue turns right (own history)", lambda m: f"{m['dialogue_accuracy']:.3f}"),
    ]
    rows += [
        (f"questions: {kind}", lambda m, k=kind: f"{m['question_accuracy_by_kind'][k]:.3f}")
        for kind in models[0]["question_accuracy_by_kind"]
    ]
    rows += [
        ("parameters, million", lambda m: f"{m['parameters'] / 1e6:.2f}"),
        ("folder, MB", lambda m: f"{m['folder_bytes'] / 1e6:.1f}"),
        ("steps, stage 1 (shared)", lambda m: f"{m['training']['see_steps']:,}"),
        ("steps, stage 2", lambda m: f"{m['training']['speak_steps']:,}"),
        ("seconds, stage 2", lambda m: f"{m['training']['speak_seconds']:,}"),
    ]
    lines = [f"| {title} | " + " | ".join(value(m) for m in models) + " |" for title, value in rows]
    return "\n".join(["| | OPT | T5 |", "|---|---|---|", *lines]) + "\n"


def choices_figures() -> str:
    """What the defaults were chosen by, as Markdown."""
    ablation = json.loads((ROOT / "benchmarks" / "records" / "ablation.json").read_text())
    compared = json.loads((ROOT / "benchmarks" / "records" / "compare.json").read_text())
    parts = [_equal_quality(compared), _kv(compared), _more_seeds(compared)]
    parts += [_adversary(ablation, kind) for kind in KINDS]
    return "\n".join(parts)


def _equal_quality(record: dict) -> str:
    """Speeds at equal quality, the fastest first, and by how much FREE is ahead."""
    models = {kind: record[kind] for kind in KINDS}
    plan, share = models["opt"]["plan"], models["opt"]["plan"]["training"]["labelled_fraction"]
    steps = " and ".join(
        f"{m['plan']['training']['steps']:,} ({_tiny(kind)})" for kind, m in models.items()
    )
    levels = list(models["opt"]["equal_quality"]["curves"][0]["speedup_decode"])
    places = " and ".join(
        f"{m['plan']['depths']} or {m['plan']['several']} ({_tiny(kind)})"
        for kind, m in models.items()
    )
    lines = [
        "## Objectives and policies at equal quality",
        "",
        "Decoding against full depth (1.00x) where quality drops by at most "
        f"{', '.join(map(_percent, levels))}. Every objective with the largest probability as "
        "score and exits at the first depths; every policy on the exits of FREE at the first or "
        "the second; and patience and saturation, as PABEE and MuE were published, on exits that "
        f"labels taught or on none, at the second: {places} of 12 layers. Training: {steps} steps "
        f"on {models['opt']['n_train']:,} examples; `cross_entropy` and `free_supervised` read "
        f"their labels, `cross_entropy_few` {share:.0%} of them, and nothing else any. Exits start "
        f"as the layer that `--initial-layer {plan['training']['initial_layer']}` chooses, those "
        "of `free_next_layer` as the next. "
        f"FREE with weight {plan['training']['adversarial']:g} of the adversary. Quality: on "
        f"{models['opt']['n_test']:,} examples of other pictures. {plan['seeds']} seeds, each with "
        f"an interleaved race of {plan['timed']} answers in {plan['rounds']} rounds, where points "
        "that do the same work on an answer run as one; means.",
        "",
        *_by_level(models, levels, lambda c, at: f"{c['speedup_decode'][at]:.2f}x"),
        "",
        "By how much FREE with the largest probability is faster, at the same depths where "
        "objectives differ, and with the labels (`free_supervised`) where `cross_entropy` has "
        "them; in brackets the seeds' range.",
        "",
        *_by_level(models, levels, partial(ahead, spread="free_over_by_seed")),
    ]
    return "\n".join(lines) + "\n"


def _by_level(models: dict, levels: list[str], cell: Callable[[dict, str], str]) -> list[str]:
    """A table with a column for each model and drop, the first model's fastest at 1% first."""
    curves = [
        {(c["objective"], c["policy"]): c for c in m["equal_quality"]["curves"]}
        for m in models.values()
    ]
    heads = [f"{_tiny(kind)}, {_percent(level)}" for kind in models for level in levels]
    lines = [f"| objective | policy | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for name in sorted(curves[0], key=lambda n: -curves[0][n]["speedup_decode"]["0.01"]):
        cells = [cell(c[name], level) for c in curves for level in levels]
        lines.append(f"| {' | '.join([*(f'`{part}`' for part in name), *cells])} |")
    return lines


def _tiny(kind: str) -> str:
    return f"tiny {kind.upper()}"


def _percent(level: str) -> str:
    return f"{100 * float(level):g}%"


def _kv(record: dict) -> str:
    """What fills the cache behind tokens that left."""
    lines = [
        "## Keys and values",
        "",
        f"Threshold {record['opt']['kv']['threshold']}: decoding against full depth, and answers "
        "that stay the full model's.",
        "",
        "| policy | tiny OPT | tiny T5 |",
        "|---|---|---|",
    ]
    for policy in ("recompute", "propagate"):
        found = [record[m]["kv"][policy] for m in KINDS]
        cells = [f"{f['speedup_decode']:.2f}x, {f['identical_answers']:.1%}" for f in found]
        lines.append(f"| `{policy}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _more_seeds(record: dict) -> str:
    """FREE against distillation alone, in more seeds and on more answers than the rest has."""
    curves = {kind: record[kind]["distillation"] for kind in KINDS}
    levels = list(curves["opt"]["free_over_by_seed"])
    lines = [
        "## Does the adversary cost speed?",
        "",
        "By how much FREE decodes faster than distillation alone where quality drops by at most so "
        "much: exits, steps and race as in the first table, more seeds and thresholds, quality on "
        f"{curves['opt']['n_test']:,} answers; means of the seeds' ratios, with 95% t-intervals.",
        "",
        f"| | seeds | {' | '.join(map(_percent, levels))} |",
        "|---|---|" + "---|" * len(levels),
    ]
    for kind, curve in curves.items():
        ratios = curve["free_over_by_seed"]
        cells = [_mean(ratios[level]) for level in levels]
        lines.append(f"| {_tiny(kind)} | {len(ratios[levels[0]])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> str:
    """Of several seeds, with its 95% t-interval."""
    low, high = t_interval(values)
    return f"{mean(values):.3f} [{low:.3f}, {high:.3f}]"


def _adversary(record: dict, kind: str) -> str:
    """FREE and its variants against distillation alone on one model."""
    sizes, cells = record["sizes"], [c for c in record["cells"] if c["backbone"] == kind]
    lines = [
        f"## Does the adversary help? Tiny {kind.upper()}",
        "",
        f"Exits at depth {record['depth']} of 12, {sizes['steps']} steps on {sizes['pictures']} "
        f"pictures, or {sizes['long']} on {sizes['few']}; {len(cells[0]['seeds'])} seeds. "
        "Distillation alone: means. The others: paired differences from it in points, with 95% "
        "t-intervals; bold where 0 is outside. Identical: answers that stay the full model's when "
        f"every token leaves. May leave: tokens that can leave while "
        f"{record['answers_kept']:.0%} of the answers stay. Damaged: "
        f"{', '.join(record['corruptions'])}"
        f" at severity {record['severity']} of 5.",
        "",
        "| setting | game | identical | identical, damaged | may leave | may leave, damaged |",
        "|---|---|---|---|---|---|",
    ]
    figures = ("identical_in", "identical_out", "may_leave_in", "may_leave_out")
    for cell in cells:
        shown = " | ".join(_gap(cell, name) for name in figures)
        lines.append(f"| {cell['setting']} | {cell['game']} | {shown} |")
    return "\n".join(lines) + "\n"


def _gap(cell: dict, name: str) -> str:
    figure = cell[name]
    if cell["game"] == "distillation":
        return f"{figure['mean']:.1%}"
    text = f"{100 * figure['difference']:+.2f}"
    if figure["low"] is None:
        return text
    text += f" [{100 * figure['low']:+.2f}, {100 * figure['high']:+.2f}]"
    return f"**{text}**" if figure["low"] > 0 or figure["high"] < 0 else text


PAGES = {
    "README.md": (figures, performance_figures),
    "recipes/tiny_vlm/README.md": (tiny_figures,),
    "docs/choices.md": (choices_figures,),
}


def rendered(name: str, page: str) -> str:
    """The page `name` with its figures as the records have them."""
    done = ""
    for make in PAGES[name]:
        before, rest = page.split(BEGIN, 1)
        done += before + BEGIN + make() + END
        page = rest.split(END, 1)[1]
    assert BEGIN not in page, f"{name} has more figures than PAGES knows"
    return done + page


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(rendered(name, path.read_text(encoding="utf-8")), encoding="utf-8")
