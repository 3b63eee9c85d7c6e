"""An EAGLE-3 drafter at work in the batch engine, for comparison with exits.

`attached` has it draft for policies of `drafts={"eagle3": level}`. Drafts change speed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from offramp_vllm.exports.eagle3 import Eagle3Drafter
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from offramp.core.decoding.drafting import Draft, DraftBudget, Drafter, Drafts
from offramp.core.decoding.executor import Executor
from offramp.core.decoding.sequence import Sequence as Row
from offramp.core.executors.prefill import image_tokens
from offramp.core.models.backbone import Backbone
from offramp.core.models.opened import first
from offramp.features.registration import register_drafter
from offramp.features.text_drafts import TextDrafts

NAME = "eagle3"
_attached: list[Callable[[Executor, int], Drafter]] = []


def _of_attached(executor: Executor, depth: int) -> Drafter:
    return _attached[-1](executor, depth)


register_drafter(NAME, _of_attached)


def load_drafter(backbone: Backbone, folder: Path) -> Eagle3Drafter:
    """The drafter that `offramp export --to speculators` wrote, in float32."""
    found = load_file(folder / "model.safetensors")
    drafter = Eagle3Drafter(backbone, found["d2t"] + torch.arange(len(found["d2t"])))
    state = {name.replace("layers.0.", "layer."): tensor for name, tensor in found.items()}
    drafter.load_state_dict(state)
    return drafter


@contextmanager
def attached(backbone: Backbone, drafter: Eagle3Drafter, slots: int, limit: int) -> Iterator[None]:
    """Have a drafter draft for the backbone, in engines of so many slots of `limit` columns that
    are made meanwhile, one after the other."""
    tapped = _Tapped(drafter.depths)

    def make(executor: Executor, depth: int) -> EagleDrafts:
        return EagleDrafts(executor, depth, backbone, drafter, tapped, slots, limit)

    with ExitStack() as stack:
        for depth in drafter.depths:
            layer = backbone.layers[depth - 1]
            stack.callback(layer.register_forward_hook(tapped.hook(depth)).remove)
        _attached.append(make)
        stack.callback(_attached.pop)
        yield


class _Tapped:
    """States at some depths of the passes through all layers, the latest last."""

    def __init__(self, depths: Sequence[int]) -> None:
        self.passes: list[Tensor] = []
        self._depths, self._states = depths, dict[int, Tensor]()

    def hook(self, depth: int) -> Any:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            self._states[depth] = first(output).flatten(0, 1)
            if depth == self._depths[-1]:
                self.passes.append(torch.cat([self._states[d] for d in self._depths], -1))

        return note


@dataclass(eq=False)
class _Known:
    """place: in the drafter's cache. column, states: the first column that the drafter has not run,
    and what it is given from there on [n, D]."""

    place: int
    column: int
    states: Tensor


class EagleDrafts(TextDrafts):
    """Slot p is given the state at token p and the embedding of token p+1, and says token p+2; the
    next draft is given what that slot made. Images are not among what it sees, as in training."""

    def __init__(
        self,
        executor: Executor,
        depth: int,
        backbone: Backbone,
        drafter: Eagle3Drafter,
        tapped: _Tapped,
        slots: int,
        limit: int,
    ) -> None:
        super().__init__(executor, depth, lambda *_: ())
        self._drafter, self._tapped, self._words = drafter, tapped, drafter.words
        self._embed = backbone.stack.get_input_embeddings()
        self._images = torch.tensor([*image_tokens(backbone.model.config)])
        heads, size = drafter.config.num_key_value_heads, drafter.config.head_dim
        assert heads is not None and size is not None
        self._keys, self._values = torch.zeros(2, slots, limit, heads, size)
        self._seen = torch.zeros(slots, limit, dtype=torch.bool)
        self._rows: WeakKeyDictionary[Row, _Known] = WeakKeyDictionary()
        tapped.passes.clear()

    def draft(self, rows: Sequence[Row], budgets: Sequence[DraftBudget]) -> list[Draft]:
        known = self._known(rows)
        drafts = [*map(Drafts, budgets)]
        going = [place for place, budget in enumerate(budgets) if budget.max_drafts]
        # The last column of each is written again until all have as many.
        ends = [row.ran[0] for row in rows]
        wide = max(end - one.column for one, end in zip(known, ends, strict=True))
        slots = torch.stack(
            [
                torch.arange(one.column, one.column + wide).clamp(max=end - 1)
                for one, end in zip(known, ends, strict=True)
            ]
        )
        given = torch.stack(
            [one.states[own - one.column] for one, own in zip(known, slots, strict=True)]
        )
        texts = [torch.tensor([*row.sampler.prompt, *row.ids]) for row in rows]
        words = torch.stack([text[own + 1] for text, own in zip(texts, slots, strict=True)])
        places = torch.tensor([one.place for one in known])
        state = self._slots(places, words, given, slots)[:, -1:]
        at = slots[:, -1:]
        for one, end in zip(known, ends, strict=True):
            one.column, one.states = end, one.states[:0]
        while going:
            logits = self._drafter.logits(state[going, 0])
            shares, said = logits.softmax(-1).max(-1)
            ids = self._words[said]
            on = [
                n
                for n, (place, token, share) in enumerate(
                    zip(going, ids.tolist(), shares.tolist(), strict=True)
                )
                if drafts[place].add(token, share)
            ]
            going = [going[n] for n in on]
            if going:
                at = at + 1
                state[going] = self._slots(places[going], ids[on, None], state[going], at[going])
        made = []
        for row, own in zip(rows, drafts, strict=True):
            ended = bool(own.ids) and row.sampler.ends(own.ids[-1])
            made.append(Draft([row.ids[-1], *(own.ids[:-1] if ended else own.ids)], own.ids))
        return made

    def verify(self, rows: Sequence[Row], drafts: Sequence[Draft]) -> Any:
        made = super().verify(rows, drafts)
        states = self._drafter.fuse([self._tapped.passes.pop()])
        for row, own in zip(
            rows, torch.split(states, [len(draft.fed) for draft in drafts]), strict=True
        ):
            self._rows[row].states = own
        return made

    def _known(self, rows: Sequence[Row]) -> list[_Known]:
        """What is known of each; of those that came since, from the passes over their prompts."""
        new = [row for row in rows if row not in self._rows]
        passes = self._tapped.passes[len(self._tapped.passes) - len(new) :]
        for row, states in zip(new, passes, strict=True):
            taken = {one.place for one in self._rows.values()}
            place = next(n for n in range(len(self._seen)) if n not in taken)
            text = ~torch.isin(torch.tensor(row.sampler.prompt), self._images)
            self._seen[place] = True
            self._seen[place, : len(text)] = text
            begin = int(text.nonzero()[0])
            self._rows[row] = _Known(place, begin, self._drafter.fuse([states[begin:]]))
        self._tapped.passes.clear()
        return [self._rows[row] for row in rows]

    def _slots(self, places: Tensor, words: Tensor, state: Tensor, slots: Tensor) -> Tensor:
        """States [B, T, D] that the layer makes of slots [B, T] of sequences."""
        drafter, layer = self._drafter, self._drafter.layer
        attention, size = layer.self_attn, layer.self_attn.size
        embedded = layer.input_layernorm(self._embed(words).float())
        both = torch.cat([embedded, layer.hidden_norm(state)], -1)
        query, key, value = (
            read(both).unflatten(-1, (-1, size)).transpose(1, 2)
            for read in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *drafter.rotary(state, slots))
        self._keys[places[:, None], slots] = key.transpose(1, 2)
        self._values[places[:, None], slots] = value.transpose(1, 2)
        columns = torch.arange(int(slots.max()) + 1)
        seen = (columns <= slots[..., None]) & self._seen[places, None, : len(columns)]
        keys, values = (
            kept[places, : len(columns)].transpose(1, 2) for kept in (self._keys, self._values)
        )
        out = F.scaled_dot_product_attention(query, keys, values, seen[:, None], enable_gqa=True)
        state = state + attention.o_proj(out.transpose(1, 2).flatten(2))
        return state + layer.mlp(layer.post_attention_layernorm(state))  # type: ignore[no-any-return]
