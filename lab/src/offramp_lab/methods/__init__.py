"""Baselines, as a plug-in of offramp: importing this registers them.

`offramp` finds it by its entry point, once a policy, an adapter or an option names one of them. It
loads no PyTorch, for the help of commands names them too.
"""

from typing import Any

from offramp.engine.confidence import register_score
from offramp.engine.policy import KV_POLICIES
from offramp_lab.methods.scores import Patience, discriminator, saturation


def _propagated(*given: Any) -> Any:
    """A call of `generate` whose skipped keys and values are projected."""
    from offramp_lab.methods.propagate import Propagated

    return Propagated(*given)


register_score("patience", Patience, reads="exits")
register_score("saturation", saturation, reads="check")
register_score("discriminator", discriminator, reads="check")
KV_POLICIES["propagate"] = _propagated
