"""Baselines, as a plug-in of offramp: importing this registers them.

`offramp` finds it by its entry point, once a policy, an adapter or an option names one of them.
"""

from offramp_lab.methods import propagate, scores

__all__ = ["propagate", "scores"]
