"""The noise that sampled tokens are chosen by: a function of a seed and a place in the answer.

Every engine draws from here, in PyTorch or without it, so one seed gives one answer. Exits and the
full model see the same noise at a place: a lossless answer is the full model's sample of its seed,
and a draft is often what the full model says (Daliri et al. 2025).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def gumbel(seed: int, place: int, tokens: int) -> npt.NDArray[np.float32]:
    """Return standard Gumbel noise [tokens] for the token at `place` of an answer.

    The token with the largest sum of score and noise is a draw from the softmax of the scores. The
    bits come from Philox (Salmon et al. 2011), a counter-based generator. Noise of fewer tokens is
    the beginning of the noise of more, so vocabularies that were padded differently agree.

    seed: any whole number, taken modulo 2**64. place: from 0.
    """
    draw = np.random.Philox(key=seed % 2**64, counter=[0, 0, place, 0])
    uniform = ((draw.random_raw(tokens) >> np.uint64(12)) + 0.5) * 2.0**-52  # never 0 or 1
    return np.asarray(-np.log(-np.log(uniform)), dtype=np.float32)
