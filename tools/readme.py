"""Write the README's figures from the committed records, so that none is typed by hand."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- demo:begin -->\n", "<!-- demo:end -->"


def figures() -> str:
    """The demo's figures of both shipped models, as Markdown."""
    reports = [
        json.loads((ROOT / "records" / f"demo-{kind}.json").read_text()) for kind in ("opt", "t5")
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
    lines += ["", "`make records` runs both again and rewrites this table."]
    return "\n".join(lines) + "\n"


def _lossless(mode: dict) -> str:
    return f"{mode['speedup_decode']:.2f}x, {mode['speedup_end_to_end']:.2f}x"


def _pair(full: dict, early: dict, metric: str) -> str:
    return f"{full['quality'][metric]:.1%} / {early['quality'][metric]:.1%}"


def rendered(readme: str) -> str:
    """The README with its figures as the records have them."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + figures() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(text != rendered(text))
    path.write_text(rendered(text), encoding="utf-8")
