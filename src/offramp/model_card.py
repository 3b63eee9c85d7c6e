"""The generated README.md of an adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.adapter import Adapter


def model_card(adapter: Adapter) -> str:
    """The generated README.md of an adapter."""
    backbone, policy = adapter.backbone, adapter.policy
    agreement = adapter.metrics.get("agreement", {})
    rows = "\n".join(
        f"| {d} of {backbone.depth} | {agreement.get(str(d), float('nan')):.4f} "
        f"| {policy.thresholds.get(d, 'off')} | {policy.drafts.get(d, 'as the threshold')} |"
        for d in adapter.exits.depths
    )
    return f"""---
library_name: offramp
{_base_model(backbone.name)}tags: [early-exit, vision-language]
---
# Early exits for {backbone.name}

One decoder layer at each depth below, trained on the frozen backbone and read by its own final
norm and LM head.

| depth | agreement with the full model (validation, teacher-forced) | threshold | drafts |
|---|---|---|---|
{rows}

Score: `{policy.score}`; skipped keys and values: `{policy.kv}`. No threshold means that the exit
is off. Drafts: thresholds of the lossless mode.

{_promise(adapter)}

```python
from offramp import Adapter, Backbone
from transformers import AutoProcessor

backbone = Backbone.from_pretrained({backbone.name!r})
processor = AutoProcessor.from_pretrained({backbone.name!r})
adapter = Adapter.from_pretrained("this/folder", backbone)
answer = adapter.generate(processor(images=image, text=prompt, return_tensors="pt"))
```

## Provenance

```json
{json.dumps(dict(adapter.provenance), indent=2, ensure_ascii=False)}
```
"""


def _promise(adapter: Adapter) -> str:
    """The card's sentence on what these thresholds keep."""
    found = adapter.calibration
    if found is None:
        return "The thresholds are not calibrated: nothing is promised."
    what = f"risk `{found['risk']}` at most {found['target']:.3g}"
    if found["measured"] is None:
        return f"Calibration could not promise a {what}, so all exits are off."
    return (
        f"Calibrated: {what}, with {found['confidence']:.0%} confidence on data like those of the "
        f"calibration; measured {found['measured']:.3g}, at most {found['bound']:.3g}, on "
        f"n = {found['n']} (method `{found['method']}`, data digest `{found['data_digest'][:16]}`)."
    )


def _base_model(name: str) -> str:
    """The card's line on the backbone; the hub refuses a card that names a local folder there."""
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return f"base_model: {name}\n" if is_hub_name else ""
