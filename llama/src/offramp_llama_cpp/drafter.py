"""An exit that drafts on from its own state inside llama.cpp, its layer in a file of its own.

As in `offramp.core.executors.drafter`, in numpy. Nothing here need come out the same to the last
bit.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from offramp.core.decoding.drafting import DraftBudget, Drafts, Ends
from offramp.core.errors import AdapterError
from offramp_llama_cpp.chain import CallSizes, SegmentChain
from offramp_llama_cpp.gguf_files import DRAFT_INPUT, SegmentFiles
from offramp_llama_cpp.graphs import Array
from offramp_llama_cpp.native.drafts import DraftLoop
from offramp_llama_cpp.native.tap import States
from offramp_llama_cpp.prompt import Prompt
from offramp_llama_cpp.segment import EngineOptions, Segment

_AT_ONCE = 32
"""Verified rows in a call."""
_NAMES = ("embedding_norm.weight", "state_norm.weight", "embedding.weight", "state.weight")


class ChainDrafter:
    """Drafts for each slot of a chain.

    depth: of the exit. segment: its layer and the head of what it can say, tapped after the layer.
    """

    def __init__(
        self,
        depth: int,
        segment: Segment,
        weights: Mapping[str, Array],
        shortlist: Sequence[int] | None,
        embedded: Callable[[Sequence[int]], States],
    ) -> None:
        """weights: of `DraftInput`, by name. shortlist: ids of what the exit says; None: all.
        embedded: embeddings [n, E] of tokens, without positions."""
        self.depth: int = depth
        self._segment = segment
        self._chain = SegmentChain([segment], CallSizes(most=_AT_ONCE, first=_AT_ONCE))
        self._states: dict[int, States] = {}
        self._wanted: set[int] = set()
        self._embedded, self._ids = embedded, None if shortlist is None else [*shortlist]
        word_norm, state_norm, of_words, of_states = (weights[name] for name in _NAMES)
        self._of_words = np.ascontiguousarray((word_norm * of_words).T)
        self._of_states = np.ascontiguousarray(state_norm * of_states)
        self._known: dict[int, States] = {}
        self._loop: DraftLoop | None = None
        self._ending = lru_cache(maxsize=16)(self._asked_of_all)
        if self._ids is not None:  # what it says it is given next
            entering = self._entering(self._ids)
            self._known = {token: row for token, row in zip(self._ids, entering, strict=True)}
            self._loop = segment.draft_loop(entering, self._of_states.T)

    @classmethod
    def load(
        cls, files: SegmentFiles, engine: EngineOptions, embedded: Callable[[Sequence[int]], States]
    ) -> ChainDrafter | None:
        """Load the drafter of an export; None where no exit of it drafts on.

        Raises:
            AdapterError: a file that does not load.
        """
        if files.drafter is None:
            return None
        segment = Segment(files.drafter, engine, tap_layer=0)
        try:
            weights = read_draft_input(files.drafter.with_name(DRAFT_INPUT), segment.width)
            return cls(files.depths[-1], segment, weights, files.shortlist, embedded)
        except BaseException:
            segment.close()
            raise

    def close(self) -> None:
        """Give the memory back."""
        self._segment.close()

    def shared(self, slot: int, prompt: Prompt) -> int:
        """Return the number of a prompt's first tokens that the drafter has already taken."""
        return self._chain.shared(prompt, slot=slot) if slot in self._wanted else 0

    def begin(self, slot: int, prompt: Prompt | None, kept: int = 0) -> None:
        """Forget a sequence, but for its first `kept` tokens: what is taken next is of another's
        prompt. None: of one whose drafts nobody asks for."""
        self._states.pop(slot, None)
        self._chain.reset(prompt=prompt, slot=slot, kept=kept)
        self._wanted.discard(slot)
        if prompt is not None:
            self._wanted.add(slot)

    def take(self, slot: int, states: States) -> None:
        """States [n, D] of tokens after those before, as they enter the exit."""
        if slot in self._wanted:
            self._chain.run(states, None, slot)

    def draft(self, slot: int, token: int | None, budget: DraftBudget) -> Drafts:
        """Return what follows a token, within its budget, from the state of the one before.
        token: None: that is the exit's own, after what it took last."""
        chain, segment = self._chain, self._segment
        if not budget.max_drafts:  # what it took waits until a round drafts
            return Drafts(budget)
        if chain.waits(slot):
            logits = chain.finish(1, slot)[0]
            self._states[slot] = segment.tapped()[-1:]
            if token is None:
                return self._from_its_own(slot, logits, budget)
        state = self._states.get(slot)
        if state is None or token is None:
            return Drafts(budget)
        if self._loop is None or self._ids is None:
            return self._one_by_one(slot, token, state, budget)
        ending, word = self._ending(budget.ends), self._word(token)
        most, least = budget.max_drafts, budget.min_probability
        said, product = segment.draft(self._loop, word, state[0], ending, most, least, slot)
        return self._with(Drafts(budget), [self._ids[place] for place in said], product)

    def _with(self, drafts: Drafts, ids: Sequence[int], product: float) -> Drafts:
        """Return drafts with more that keep within their budget."""
        drafts.ids += ids
        drafts.product *= product
        return drafts

    def _from_its_own(self, slot: int, logits: Array, budget: DraftBudget) -> Drafts:
        """Return what it says in logits [S], and what follows that."""
        token, probability = self._likeliest(logits)
        drafts = Drafts(budget)
        if not drafts.add(token, probability):
            return drafts
        rest = DraftBudget(budget.max_drafts - 1, budget.min_probability / probability, budget.ends)
        more = self.draft(slot, token, rest)
        return self._with(drafts, more.ids, more.product)

    def _likeliest(self, logits: Array) -> tuple[int, float]:
        """The token of the largest of logits [S], and its probability."""
        said = int(logits.argmax())
        probability = 1 / float(np.exp(logits - logits[said]).sum())
        return said if self._ids is None else self._ids[said], probability

    def _one_by_one(self, slot: int, token: int, state: States, budget: DraftBudget) -> Drafts:
        """Draft without the loop in C."""
        segment, drafts, fed, goes_on = self._segment, Drafts(budget), 0, True
        while goes_on:
            enters = self._word(token) + self._of_states @ _normed(state[0])
            segment.feed(np.asarray(enters[None], dtype=np.float32), 1, slot=slot)
            token, probability = self._likeliest(segment.logits(1)[0])
            goes_on, fed = drafts.add(token, probability), fed + 1
            state = segment.tapped()
        segment.crop(fed, slot)
        return drafts

    def crop(self, slot: int, columns: int) -> None:
        """Forget what a sequence has from a column on."""
        if slot in self._wanted:
            self._chain.crop(self._chain.tokens(slot) - columns, slot)

    def _asked_of_all(self, ends: Ends) -> npt.NDArray[np.bool_]:
        """Which of the drafter's tokens end an answer."""
        return np.array([ends(token) for token in self._ids or ()])

    def _word(self, token: int) -> States:
        """A token's part [D] of what enters the layer."""
        known: States | None = self._known.get(token)
        return np.asarray(self._entering([token])[0]) if known is None else known

    def _entering(self, tokens: Sequence[int]) -> Array:
        """The embeddings' part [n, D] of what enters the layer."""
        return np.asarray(_normed(self._embedded(tokens)) @ self._of_words, dtype=np.float32)


def _normed(rows: Array) -> Array:
    """Normalise by the root mean square, as `torch.nn.RMSNorm` does."""
    small = np.finfo(np.float32).eps
    mean = np.square(rows).mean(-1, keepdims=True) + small
    return np.asarray(rows / np.sqrt(mean), dtype=np.float32)


def write_draft_input(file: Path, state: Mapping[str, Array]) -> None:
    """Write the weights of a `DraftInput`. state: by its names."""
    np.savez(file, allow_pickle=False, **{name: state[name] for name in _NAMES})


def read_draft_input(file: Path, width: int) -> dict[str, Array]:
    """Read the weights that were written. width: D of states.

    Raises:
        AdapterError: the file holds something else.
    """
    try:
        with np.load(file, allow_pickle=False) as held:
            found = {name: held[name].astype(np.float32) for name in _NAMES}
        words = found["embedding_norm.weight"].shape
        shapes = [words, (width,), (width, *words), (width, width)]
        if [found[name].shape for name in _NAMES] != shapes:
            raise ValueError(f"its states are not {width} wide")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise AdapterError(
            f"{file} does not say what enters an exit that drafts on: {error}.",
            "Export the exits again.",
        ) from error
    return found
