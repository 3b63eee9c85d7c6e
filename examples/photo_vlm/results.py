"""Write RESULTS.md from its records and the bridge's card, so that no figure is typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.photo_vlm.command import command, parser_of

from offramp.research.comparison.equal_quality import ahead, drawn
from offramp.research.report.plots import tradeoff
from offramp.storage import read_json, write_atomic

HERE = Path(__file__).parent
RECORDS = HERE.parent.parent / "benchmarks" / "records"
RECORD, COMPARED = RECORDS / "photo.json", RECORDS / "compare-photo.json"


def page(record: dict[str, Any], card: dict[str, Any], compared: dict[str, Any] | None) -> str:
    """RESULTS.md. compared: what `examples.photo_vlm.compare` found, if it has run."""
    regimes, matched = (list(record[name].values()) for name in ("regimes", "matched"))
    told = (
        f"Exits at {' and '.join(map(str, record['depths']))} of 30 layers. Held-out photographs "
        "are halved: thresholds are chosen on one half and measured on the other."
    )
    parts = [
        "# What exits are worth on photographs\n",
        f"From [photo.json](../../benchmarks/records/photo.json): {_machine(record)}. "
        f"{told if regimes else 'No exits have been measured yet.'} Written by `python -m "
        "examples.photo_vlm.results`.\n",
        _full(record["full"], card),
        *(_regime(one, record["sizes"]) for one in regimes),
        _lossless(record) if record["lossless"] else "",
        _damaged(record["damaged"]) if record["damaged"] else "",
        _side_by_side(matched, record["matched_sizes"]) if matched else "",
        _compared(compared) if compared else "",
        _by_depth(record["analysis"], record["first"]) if record["analysis"] else "",
    ]
    return "\n".join(part for part in parts if part)


def plot(record: dict[str, Any]) -> str:
    """CIDEr kept against predicted speed along each regime's thresholds, as SVG."""
    regimes = {f"{name}, long": one for name, one in record["regimes"].items()}
    series = {
        name: [(1.0, 1.0), *((p["predicted_speedup"], 1 - p["cider_drop"]) for p in one["path"])]
        for name, one in {**regimes, **record["matched"]}.items()
    }
    return tradeoff(series, "CIDEr, in the full model's")


def _machine(record: dict[str, Any]) -> str:
    origin = record["provenance"]
    return f"bfloat16, {origin['threads']} thread, {origin['processor']}"


def _full(full: dict[str, Any], card: dict[str, Any]) -> str:
    lines = [
        "## The full model",
        "",
        f"| on {full['captions']:,} Flickr8k val photographs | |",
        "|---|---|",
        f"| CIDEr | {full['cider']:.3f} |",
        f"| BLEU-4 | {full['bleu_4']:.3f} |",
        f"| METEOR | {full['meteor']:.3f} |",
        f"| ROUGE-L | {full['rouge_l']:.3f} |",
        f"| DAQUAR accuracy, {full['questions']:,} questions | {full['daquar_accuracy']:.1%} |",
        "",
        f"The bridge learnt for {card['steps']:,} steps, {card['seconds'] / 60:.0f} minutes of one "
        "core. On 150 held-out photographs and as many questions, on the way:",
        "",
        "| step | CIDEr | BLEU-4 | accuracy |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['step']:,} | {row['CIDEr']:.3f} | {row['Bleu_4']:.3f} | {row['accuracy']:.1%} |"
        for row in card["curve"]
    ]
    return "\n".join(lines) + "\n"


def _regime(one: dict[str, Any], sizes: dict[str, Any]) -> str:
    lines = [
        f"## {one['regime'].capitalize()}",
        "",
        f"{_trained(sizes)}, {(one['training_seconds'] or 0) / 60:.0f} minutes of one core, states "
        f"and the model's own answers included. Agreement with the full model, teacher-forced: "
        f"{_agreement(one)}. Full depth through our loop: {one['full_vs_generate']:.2f}x of stock "
        "`generate`.",
    ]
    shortlist = one["checks"].get("shortlist")
    if shortlist:
        lines.append(
            f"The shortlist of {shortlist['size']:,} tokens misses {shortlist['miss_rate']:.2%} "
            f"(at most {shortlist['miss_bound']:.2%}) of held-out tokens."
        )
    lines += [
        "",
        "| chosen by | thresholds | decoding | end to end | CIDEr drop | ROUGE-L | DAQUAR |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_point(row) for row in one["points"]]
    lines += ["", "In brackets 95% intervals, by a paired bootstrap over photographs."]
    return "\n".join(lines) + "\n"


def _trained(sizes: dict[str, Any]) -> str:
    return (
        f"{sizes['steps']:,} steps on {sizes['captions']:,} photographs to caption and "
        f"{sizes['questions']:,} questions"
    )


def _agreement(one: dict[str, Any]) -> str:
    return ", ".join(f"{a:.1%} at {d}" for d, a in one["agreement"].items())


def _lossless(record: dict[str, Any]) -> str:
    lines = [
        "## Lossless",
        "",
        "Held-out captions decoded alone, by the full model and by drafts that it verifies, of the "
        f"exits above: {record['first']}. "
        "In bfloat16 the likeliest tokens often tie, and rounding, which depends on how many "
        "tokens a matrix product holds, picks one; float32 has no such ties.",
        "",
        "| precision | decoding | end to end | against `generate` | identical | drafts kept | "
        "tokens a second, full | lossless |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in (record["lossless"], record["lossless_bfloat16"]):
        rate = one["tokens_per_second"]
        lines.append(
            f"| {one['dtype']} | **{one['speedup_decode']:.2f}x** "
            f"| {one['speedup_end_to_end']:.2f}x | {one['speedup_vs_generate']:.2f}x "
            f"| {one['identical_captions']:,} of {one['captions']:,} | {one['acceptance']:.0%} "
            f"| {rate['full']:.1f} | {rate['lossless']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _damaged(found: dict[str, Any]) -> str:
    """CIDEr under each damage, of each regime's exits."""
    names = [f"{regime}: early | drop" for regime in found]
    lines = [
        "## Damaged photographs",
        "",
        "Severity 3 of 5, each regime by the first of its thresholds above.",
        "",
        f"| | CIDEr at full depth | {' | '.join(names)} |",
        "|---|---|" + "---|---|" * len(names),
    ]
    for name, one in next(iter(found.values())).items():
        cells = [f"{f[name]['cider']:.3f} | {f[name]['cider_drop']:+.1%}" for f in found.values()]
        lines.append(f"| {name} | {one['cider_full']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _point(row: dict[str, Any]) -> str:
    if not row["thresholds"]:
        why = row.get("reason") or "none of the thresholds keeps it"
        return f"| {row['chosen_by']} | off: {why} | 1.00x | 1.00x | | | |"
    at = ", ".join(f"{t:g} at {d}" for d, t in row["thresholds"].items())
    low, high = row["cider_drop_interval"]
    drop = f"{row['cider_drop']:+.1%} [{low:+.1%}, {high:+.1%}]"
    return (
        f"| {row['chosen_by']} | {at} | **{row['speedup_decode']:.2f}x** "
        f"| {row['speedup_end_to_end']:.2f}x | {drop} | {row['rouge_l']:.3f} "
        f"| {row['daquar_accuracy']:.1%} (full {row['daquar_accuracy_full']:.1%}) |"
    )


def _side_by_side(regimes: list[dict[str, Any]], sizes: dict[str, Any]) -> str:
    names = [row["chosen_by"] for row in regimes[0]["points"]]
    lines = [
        "## Regimes side by side",
        "",
        f"Each {_trained(sizes)}: far shorter than above, to compare them. Agreement is on each "
        "regime's own answers: what people wrote, or the model. Labels are all five captions that "
        "people wrote of a photograph; the model writes one. Then decoding against full depth, and "
        "the drop of CIDEr.",
        "",
        f"| regime | agreement | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for one in regimes:
        cells = [
            f"{row['speedup_decode']:.2f}x, {row['cider_drop']:+.1%}"
            if row["thresholds"]
            else "off"
            for row in one["points"]
        ]
        lines.append(f"| {one['regime']} | {_agreement(one)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n![CIDEr against speed](../../benchmarks/records/photo.svg)\n"


def _compared(found: dict[str, Any]) -> str:
    """Speeds at equal quality, the fastest first, and by how much FREE is ahead."""
    plan, curves = found["plan"], found["equal_quality"]["curves"]
    taught, levels = plan["training"], list(curves[0]["speedup_decode"])
    lines = [
        "## Objectives and policies at equal quality",
        "",
        f"From [compare-photo.json](../../benchmarks/records/compare-photo.json). Each objective "
        f"{taught['steps']:,} steps on {found['n_train']:,} photographs, with the largest "
        f"probability as score and an exit at {plan['depths'][0]}; each policy on the exits of "
        f"FREE there or at {', '.join(map(str, plan['several']))}. `cross_entropy` learns all "
        "captions that people wrote, `cross_entropy_few` those of "
        f"{taught['labelled_fraction']:.0%} of the photographs. All else reads no labels: it "
        "learns from those that the model wrote with a confidence of "
        f"{taught['min_confidence']:g} or more, `cross_entropy_own` by cross-entropy alone. "
        "Exits start as the layer that `--initial-layer "
        f"{taught['initial_layer']}` chooses, those of `free_next_layer` as the next. Quality: "
        "CIDEr of "
        f"{found['n_test']:,} other photographs, {found['quality_full']:.3f} at full depth; an "
        f"interleaved race of {plan['timed']} captions in {plan['rounds']} rounds, where points "
        "that do the same work run as one.",
        "",
        "Decoding against full depth where CIDEr drops by at most so much; behind it by how much "
        "FREE with the largest probability is faster, at the same depths where objectives differ, "
        "with its 95% bootstrap interval over photographs and rounds.",
        "",
        f"| objective | policy | {' | '.join(f'{float(at):.1%}' for at in levels)} |",
        "|---|---|" + "---|" * len(levels),
    ]
    for curve in sorted(curves, key=lambda one: -one["speedup_decode"]["0.01"]):
        cells = [f"{curve['speedup_decode'][at]:.2f}x, {ahead(curve, at)}" for at in levels]
        names = (f"`{curve[name]}`" for name in ("objective", "policy"))
        lines.append(f"| {' | '.join((*names, *cells))} |")
    return (
        "\n".join(lines)
        + "\n\n![CIDEr against speed](../../benchmarks/records/compare-photo.svg)\n"
    )


def _by_depth(found: dict[str, Any], first: str) -> str:
    """Agreement and accuracy at every depth, the dip if there is one, and overthinking."""
    forced, thought = found["teacher_forced"], found["overthinking"]
    columns = {
        f"{title}, {name}": dict(
            zip(forced[kind][measure]["depths"], forced[kind][measure]["values"], strict=True)
        )
        for measure, title in {"agreement": "agreement", "accuracy": "accuracy"}.items()
        for kind, name in {"lens": "logit lens", "exits": "exits"}.items()
    }
    depths = sorted({depth for column in columns.values() for depth in column})
    lines = [
        "## By depth",
        "",
        "Teacher-forced: tokens on which a depth agrees with the final layer, and on which it says "
        "what the first human caption says. Logit lens: the backbone's own norm and head, nothing "
        f"trained. Exits: {first}.",
        "",
        f"| depth | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for depth in depths:
        cells = [f"{c[depth]['value']:.1%}" if depth in c else "" for c in columns.values()]
        lines.append(f"| {depth} | {' | '.join(cells)} |")
    dip = forced["lens"]["accuracy"]["dip"]
    told = (
        f"The logit lens falls by {dip['fall']:.1%} from depth {dip['from_depth']} to "
        f"{dip['to_depth']} (mid-crisis)."
        if dip["found"]
        else "The logit lens rises with depth: no mid-crisis."
    )
    lost = thought["exits"]["overthought"]
    lines += [
        "",
        f"{told} Overthinking: of {thought['exits']['tokens']:,} tokens, some exit is right and "
        f"the final layer wrong on {lost['n']:,} ({lost['share']['value']:.1%}; accuracy "
        f"{thought['exits']['final']['value']:.1%}, with the best depth for each token "
        f"{thought['exits']['oracle']['value']:.1%}).",
    ]
    return "\n".join(lines) + "\n"


@command
def main() -> None:
    parser = parser_of("results", "", str(__doc__))
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--compared", type=Path, default=COMPARED)
    arguments = parser.parse_args()
    record = read_json(arguments.record)
    if record["matched"]:
        write_atomic(arguments.record.with_suffix(".svg"), plot(record))
    compared = read_json(arguments.compared) if arguments.compared.is_file() else None
    if compared:
        write_atomic(arguments.compared.with_suffix(".svg"), drawn(compared))
    text = page(record, read_json(HERE / "bridge" / "bridge.json"), compared)
    write_atomic(HERE / "RESULTS.md", text)
    print(HERE / "RESULTS.md")


if __name__ == "__main__":
    main()
