"""Write RESULTS.md from records/photo.json and the bridge's card, so that no figure is typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.photo_vlm.command import command, parser_of

from offramp.records import read_json, write_atomic

HERE = Path(__file__).parent
RECORD = HERE.parent.parent / "records" / "photo.json"


def page(record: dict[str, Any], card: dict[str, Any]) -> str:
    """RESULTS.md."""
    regimes = list(record["regimes"].values())
    trained = (
        f"Exits at depths {' and '.join(map(str, record['depths']))} of 30, each trained for "
        f"{record['sizes']['steps']} steps on {record['sizes']['captions']:,} photographs to "
        f"caption and {record['sizes']['questions']:,} questions. Held-out photographs are halved: "
        "thresholds are chosen on one half and measured on the other."
    )
    parts = [
        "# What exits are worth on photographs\n",
        f"From [records/photo.json](../../records/photo.json): {_machine(record)}. "
        f"{trained if regimes else 'No exits have been measured yet.'} Written by `python -m "
        "examples.photo_vlm.results`.\n",
        _full(record["full"], card),
        *(_regime(one) for one in regimes),
        _side_by_side(regimes) if len(regimes) > 1 else "",
        _by_depth(record["analysis"]) if record.get("analysis") else "",
    ]
    return "\n".join(part for part in parts if part)


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


def _regime(one: dict[str, Any]) -> str:
    shortlist, gates = one["checks"].get("shortlist"), one["checks"].get("gates", {})
    agreement = ", ".join(f"{a:.1%} at {d}" for d, a in one["agreement"].items())
    lines = [f"## {one['regime'].capitalize()}", ""]
    lines.append(
        f"Agreement with the full model, teacher-forced: {agreement}; trained in "
        f"{(one['training_seconds'] or 0) / 60:.0f} minutes. Full depth through our loop: "
        f"{one['full_vs_generate']:.2f}x of stock `generate`."
    )
    if shortlist:
        lines.append(
            f"The shortlist of {shortlist['size']:,} tokens misses {shortlist['miss_rate']:.2%} "
            f"(at most {shortlist['miss_bound']:.2%}) of held-out tokens."
        )
    for depth, gate in gates.items():
        used = "on" if gate["used"] else "off"
        lines.append(
            f"Gate at {depth}: shuts out {gate['shut']:.0%} of tokens, saves "
            f"{gate['gain_layers']:+.2f} layers a token, so it is {used}."
        )
    lines += [
        "",
        "| chosen by | thresholds | decoding | end to end | CIDEr drop | ROUGE-L | DAQUAR |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_point(row) for row in one["points"]]
    lossless = one["lossless"]
    lines += [
        "",
        f"Lossless: **{lossless['speedup_decode']:.2f}x** decoding, "
        f"{lossless['speedup_end_to_end']:.2f}x end to end, {lossless['identical_captions']:,} of "
        f"{lossless['captions']:,} captions identical to the full model's; "
        f"{lossless['acceptance']:.0%} of drafts accepted.",
    ]
    if one["damaged"]:
        damaged = "; ".join(
            f"{name} {f['cider_full']:.3f} full, {f['cider']:.3f} early"
            for name, f in one["damaged"].items()
        )
        lines += ["", f"CIDEr on damaged photographs (severity 3 of 5): {damaged}."]
    return "\n".join(lines) + "\n"


def _point(row: dict[str, Any]) -> str:
    if not row["thresholds"]:
        why = row.get("reason") or "none of the thresholds keeps it"
        return f"| {row['chosen_by']} | off: {why} | 1.00x | 1.00x | | | |"
    at = ", ".join(f"{t:g} at {d}" for d, t in row["thresholds"].items())
    return (
        f"| {row['chosen_by']} | {at} | **{row['speedup_decode']:.2f}x** "
        f"| {row['speedup_end_to_end']:.2f}x | {row['cider_drop']:+.1%} | {row['rouge_l']:.3f} "
        f"| {row['daquar_accuracy']:.1%} (full {row['daquar_accuracy_full']:.1%}) |"
    )


def _side_by_side(regimes: list[dict[str, Any]]) -> str:
    names = [row["chosen_by"] for row in regimes[0]["points"]]
    lines = [
        "## Side by side",
        "",
        "Decoding against full depth, and the drop of CIDEr.",
        "",
        f"| regime | {' | '.join(names)} | lossless |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for one in regimes:
        cells = [
            f"{row['speedup_decode']:.2f}x, {row['cider_drop']:+.1%}"
            if row["thresholds"]
            else "off"
            for row in one["points"]
        ]
        lossless = f"{one['lossless']['speedup_decode']:.2f}x"
        lines.append(f"| {one['regime']} | {' | '.join(cells)} | {lossless} |")
    return "\n".join(lines) + "\n"


def _by_depth(found: dict[str, Any]) -> str:
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
        "trained.",
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
    arguments = parser.parse_args()
    text = page(read_json(arguments.record), read_json(HERE / "bridge" / "bridge.json"))
    write_atomic(HERE / "RESULTS.md", text)
    print(HERE / "RESULTS.md")


if __name__ == "__main__":
    main()
