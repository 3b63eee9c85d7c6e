"""Baselines, as a plug-in of offramp: importing this registers them.

`offramp` finds it by its entry point, once a policy, an adapter or an option names one of them. It
loads no PyTorch, for the help of commands names them too.
"""

from typing import Any

from offramp.engines import register_engine
from offramp.features.registration import register_exit, register_heads, register_score
from offramp_lab.methods.scores import saturation


def _agreement(*given: Any) -> Any:
    from offramp_lab.methods.streaks import Agreement

    return Agreement(*given)


def _patience(*given: Any) -> Any:
    from offramp_lab.methods.streaks import Patience

    return Patience(*given)


def _off_ramp(*given: Any) -> Any:
    from offramp_lab.methods.deebert import off_ramp

    return off_ramp(*given)


def _propagating(*given: Any, **sizes: Any) -> Any:
    from offramp_lab.methods.propagate import Propagating

    return Propagating.of(*given, **sizes)


register_exit("off_ramp", _off_ramp)
register_heads("agreement", _agreement)
register_heads("patience", _patience)
register_score("saturation", saturation, reads="check")
register_engine("propagate", _propagating, "keys and values of skipped layers projected (CALM)")
