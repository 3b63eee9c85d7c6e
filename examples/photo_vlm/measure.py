"""Train exits on the photo model in several regimes, and measure what each is worth on photographs.

Photographs to train exits on are of the training splits; the held-out ones are halved, and what is
chosen on one half is measured on the other. Every regime's figures are written as soon as they are
there, and what is there is not measured again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.evaluate import load
from examples.photo_vlm.held_out import DRAFTS, REGIMES, SIZES, Photos, full_figures
from examples.photo_vlm.regime import ALWAYS, OPTIONS, PROMISE, measured, promised_of, timings_of
from offramp.adapter.adapter import Adapter
from offramp.calibration.draft_thresholds import draft_speeds
from offramp.common.provenance import provenance
from offramp.core.decoding.policy import FULL
from offramp.core.errors import InputError
from offramp.core.models.exits import Exits
from offramp.core.storage import read_json, write_json
from offramp.data.decontamination import picture_digests
from offramp.evaluation.timing import speedups
from offramp.inputs.example import Example

# -- what is asked of the first regime alone --------------------------------------------------


def lossless(photos: Photos, adapter: Adapter, examples: Sequence[Example]) -> dict[str, Any]:
    """Speed, and whether the captions of `examples` are the full model's, each decoded alone."""
    drafting = draft_speeds(adapter, photos.drafted, thresholds=DRAFTS, **OPTIONS)
    policy = replace(adapter.policy, lossless=True, drafts=drafting[0].thresholds)
    timings = timings_of(photos, adapter, {"lossless": policy})
    same, drafted, accepted = 0, 0, 0
    for example in tqdm(examples, "lossless", disable=None, leave=False):
        prompt = photos.encoder.prompts([example])
        made = adapter.generate(prompt, policy=policy, **OPTIONS)
        full = photos.none.generate(prompt, policy=FULL, **OPTIONS)
        same += bool(torch.equal(made.sequences, full.sequences))
        drafted += sum(n for n, _ in made.rounds)
        accepted += sum(n for _, n in made.rounds)
    return {
        "dtype": str(photos.backbone.dtype).removeprefix("torch."),
        **speedups(timings, "lossless"),
        "tokens_per_second": {name: timing.tokens_per_second for name, timing in timings.items()},
        "identical": same == len(examples),
        "identical_captions": same,
        "captions": len(examples),
        "acceptance": accepted / max(1, drafted),
        "drafts": {str(d): t for d, t in policy.drafts.items()},
    }


def shipped(adapter: Adapter, figures: dict[str, Any], examples: Sequence[Example]) -> Adapter:
    """What is needed to exit by the policy that is guaranteed, or else by the first that was found:
    its exits. examples: what the guarantee stands on.

    Raises:
        InputError: none of the policies exits early.
    """
    chosen = [row for row in figures["points"] if row["chosen_by"] != ALWAYS and row["thresholds"]]
    if not chosen:
        raise InputError("These exits have no thresholds that keep what was asked.", "Train on.")
    row = next((row for row in chosen if row["chosen_by"] == PROMISE), chosen[0])
    thresholds, first = (
        {int(d): t for d, t in row[name].items()} for name in ("thresholds", "first")
    )
    policy = replace(adapter.policy, thresholds=thresholds, first=first)
    seen = adapter.seen
    if "calibration" in row:
        seen = {**seen, "calibration": sorted(picture_digests(examples))}
    exits = Exits(adapter.backbone, sorted(thresholds)).to(adapter.backbone.dtype)
    for depth in exits.depths:
        exits.at(depth).load_state_dict(adapter.exits.at(depth).state_dict())
    agreement = {str(d): adapter.metrics["agreement"][str(d)] for d in exits.depths}
    return replace(
        adapter,
        exits=replace(adapter.exits, modules=exits),
        policy=policy,
        metrics={**adapter.metrics, "agreement": agreement},
        calibration=row.get("calibration"),
        attempts=row.get("attempts", []),
        seen=seen,
    )


# -- all of it --------------------------------------------------------------------------------


def first_of_all(photos: Photos, precise: Callable[[], Photos], regime: str, out: Path) -> Adapter:
    """Measure what is asked of one regime alone, each part once; its exits as they are shipped.

    precise: loads the same in float32, where likely tokens do not tie as they do in bfloat16, where
        rounding picks one of them.
    """
    exits = out / "exits" / _slug(regime)
    adapter = Adapter.load(exits, photos.backbone)
    figures = read_json(out / f"{_slug(regime)}.json")
    early = shipped(adapter, figures, promised_of(photos))
    write_json(out / "first.json", regime)

    def lossless_exactly() -> dict[str, Any]:
        other = precise()
        held = other.held["captions"][: photos.sizes.exact]
        return lossless(other, Adapter.load(exits, other.backbone), held)

    parts: dict[str, Callable[[], Any]] = {"lossless": lossless_exactly}
    if photos.sizes.curves:
        held = photos.held["captions"][:300]
        parts["lossless_bfloat16"] = lambda: lossless(photos, adapter, held)
    for name, measure in parts.items():
        if not (file := out / f"{name}.json").is_file():
            write_json(file, measure())
            print(name, read_json(file), file=sys.stderr)
    drafts = {int(d): t for d, t in read_json(out / "lossless.json")["drafts"].items()}
    return early.with_policy(replace(early.policy, drafts=drafts))


def assemble(place: Path, size: str, depths: Sequence[int]) -> dict[str, Any]:
    """The record, of what has been measured so far in a size."""
    parts: dict[str, Any] = {"full": read_json(place / "full.json")}
    files = {r: place / f"{_slug(r)}.json" for r in REGIMES}
    parts["regimes"] = {r: read_json(file) for r, file in files.items() if file.is_file()}
    for name in ("first", "lossless", "lossless_bfloat16"):
        file = place / f"{name}.json"
        parts[name] = read_json(file) if file.is_file() else None
    return {
        **parts,
        "depths": list(depths),
        "sizes": vars(SIZES[size]),
        "provenance": provenance(0, sys.argv, None),
    }


@command
def main() -> None:
    parser = parser_of("measure", "--regimes unsupervised", str(__doc__), "data", "work")
    parser.add_argument(
        "--regimes",
        nargs="+",
        default=list(REGIMES),
        metavar="REGIME",
        help="without --size small, more is measured of the first one (default: all)",
    )
    parser.add_argument("--depths", type=int, nargs="+", default=(4,), help="of the exits")
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="large",
        help="large: one regime in two hours; middle: in one; modest: in ten minutes; small: to "
        "hold regimes against each other; quick: only to try it out",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/photo-exits.json"))
    parser.add_argument(
        "--ship", type=Path, metavar="FOLDER", help="save the first regime's exits there"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.regimes) - set(REGIMES):
        raise InputError(
            f"Regime {', '.join(sorted(unknown))} is not known.", f"Known: {', '.join(REGIMES)}."
        )
    size = arguments.size
    depths = "-".join(map(str, arguments.depths))
    place = arguments.work / f"measured-{size}-{depths}"

    def photographs(dtype: str) -> Photos:
        return Photos(load(dtype), arguments.data, SIZES[size], arguments.depths)

    photos = photographs("bfloat16")
    if not (place / "full.json").is_file():
        write_json(place / "full.json", full_figures(photos))
    for regime in arguments.regimes:
        file = place / f"{_slug(regime)}.json"
        if not file.is_file():
            exits = place / "exits" / _slug(regime)
            write_json(file, measured(photos, regime, exits, len(arguments.regimes)))
        print(read_json(file), file=sys.stderr)
    if size != "small":
        first = arguments.regimes[0]
        early = first_of_all(photos, lambda: photographs("float32"), first, place)
        if arguments.ship is not None:
            early.save(arguments.ship)
    if size != "quick":
        write_json(arguments.out, assemble(place, size, arguments.depths))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.replace("%", "")).strip("-")


if __name__ == "__main__":
    main()
