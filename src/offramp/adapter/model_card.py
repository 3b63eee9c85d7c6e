"""The model card that an adapter's folder holds as README.md."""

from __future__ import annotations

import json
import re

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from offramp.adapter.certificate import Certificate
from offramp.adapter.records import AdapterParts
from offramp.common.names import is_hub_name
from offramp.core.decoding.policy import resolved
from offramp.core.models.backbone import Backbone
from offramp.promises.conditions import Conditions, of_exits, of_policy
from offramp.promises.guarantee import SCALES, shown_conditions, standing

_UNSAID = {
    "measured": None,
    "risk": "?",
    "target": None,
    "answers": "?",
    "level": None,
    "method": "?",
    "data_digest": "?",
    "kinds": (),
    "each_kind": False,
}
"""Of a calibration by an earlier version, which said less."""


def model_card(backbone: Backbone, adapter: AdapterParts) -> str:
    """Return the card: the hub's metadata as YAML, then depths, thresholds, guarantee and
    provenance."""
    environment = Environment(
        loader=PackageLoader("offramp.adapter", ""),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, of our own values
        keep_trailing_newline=True,
    )
    environment.filters.update(
        fixed=lambda number: f"{number:.4f}",
        short=lambda number: "?" if number is None else f"{number:.3g}",
        percent=lambda number: f"{number:.0%}",
        repr=repr,
    )
    text = environment.get_template("model_card.md.jinja").render(
        backbone=backbone,
        exits=adapter.exits,
        policy=adapter.policy,
        agreement=adapter.metrics.get("agreement", {}),
        of_format=adapter.provenance.get("of_format"),
        drafting=adapter.metrics.get("drafting", {}),
        calibration=adapter.calibration,
        said={**_UNSAID, **(adapter.calibration or {})},
        scale=SCALES.get((adapter.calibration or {}).get("risk", ""), 1),
        standing=standing(adapter.calibration, _wherever_it_runs(backbone, adapter)),
        conditions=shown_conditions(adapter.calibration),
        verified=verified_section(adapter.certificate),
        provenance=json.dumps(dict(adapter.provenance), indent=2, ensure_ascii=False),
        nan=float("nan"),
    )
    return f"---\n{card_data(backbone.name).to_yaml()}\n---\n{text}"


def _wherever_it_runs(backbone: Backbone, adapter: AdapterParts) -> Conditions:
    """A card's readers may run the exits otherwise than who wrote it, and it names the conditions;
    of these, those that are the adapter's own."""
    dtype = Conditions.of_calibration(adapter.calibration).get("dtype")
    same = dtype == str(backbone.dtype).removeprefix("torch.")  # else exits differ by rounding
    own = of_policy(resolved(adapter.policy, backbone))
    return Conditions({**own, **(of_exits(adapter.exits) if same else {}), "dtype": dtype})


def verified_section(certificate: Certificate | None) -> str:
    """Return the card's section on the findings of `offramp verify`, without its heading."""
    if certificate is None:
        return "Not verified on any machine yet: `offramp verify FOLDER`."
    return "\n".join(f"* {run.words}" for run in certificate.runs)


def with_verified(card: str, certificate: Certificate) -> str:
    """Return a card, edited or not, with this section in place of its own or at its end."""
    section = f"## Verified\n\n{verified_section(certificate)}\n"
    text, found = re.subn(
        r"(?ms)^## Verified$.*?(?=^## |\Z)", lambda _: f"{section}\n", card, count=1
    )
    return text if found else f"{card.rstrip()}\n\n{section}"


def card_data(backbone: str) -> ModelCardData:
    """Return the hub's metadata. A base model is only named by its hub name, because the hub
    refuses cards with a local folder."""
    on_hub = is_hub_name(backbone)
    return ModelCardData(
        base_model=backbone if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="offramp",
        pipeline_tag="image-text-to-text",
        tags=["early-exit", "free", "speculative-decoding", "vision-language"],
    )
