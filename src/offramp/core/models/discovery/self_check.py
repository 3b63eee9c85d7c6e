"""Whether a model is read as it reads itself: one short prompt at load.

Part 1: the final norm over the last layer's output is what the decoder stack returns. It catches a
norm that was missed, and states that carry another axis.
Part 2: logits read from that state are the model's own. It catches factors on states or logits,
which leave every greedy token as it is and put every threshold and every sample at another
temperature.

What only decoding shows is left to `offramp.features.self_check`, part 3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.errors import UnsupportedBackboneError
from offramp.core.models.discovery.comparison import relative_difference
from offramp.core.models.discovery.probe import (
    accepts,
    encoder_states,
    prompt_ids,
    special_ids,
    text_prompt,
    vocabulary,
)
from offramp.core.models.discovery.watch import first_tensor
from offramp.core.models.intercept import InterceptedModel
from offramp.core.models.opened import LayerCall, OpenedModel
from offramp.core.models.sharding import device_of

_WIDE = {torch.float32: 1e-5, torch.float64: 1e-5}
"""Largest difference allowed, relative to the largest value; elsewhere `_HALF`. The same modules
read the same state here, in other shapes at most."""
_HALF = 3e-2
_TOKENS = 2
"""Of the probe."""
_ROWS = 1000
"""Of a plain head, about as many are compared: to read it all a second time would take longest."""


@dataclass(frozen=True)
class Layout:
    """Measurements of a decoder by the probe.

    width: of its states. vocabulary: of its logits. returns: for each layer, how many values it
    returns; 0 where it returns the state alone. softcap, words, read_as: as of `OpenedModel`, by
    which our logits equal the model's.
    """

    width: int
    vocabulary: int
    returns: tuple[int, ...]
    softcap: float | None
    words: int | None
    read_as: Mapping[int, int] = field(default_factory=dict)


class _Listener:
    """A handler that notes what layers return.

    whole: run every layer; else the first of each kind and the last, for how the last state is read
        does not depend on what came before, and weights that are not read cost nothing.
    """

    def __init__(self, backbone: OpenedModel, *, whole: bool) -> None:
        self.backbone, self.whole = backbone, whole
        self.returns = [0] * backbone.depth
        self.last: Tensor | None = None
        self._values: dict[type, int] = {}

    def layer(self, call: LayerCall) -> Any:
        kind, ends = type(call.layer), call.index == self.backbone.depth - 1
        if self.whole or ends or kind not in self._values:
            out = call.run(call.layer)
            self._values[kind] = len(out) if isinstance(out, tuple) else 0
        else:
            out = self.backbone.handed_through(call, self._values[kind])
        self.returns[call.index] = self._values[kind]
        self.last = first_tensor(out)
        return out


def self_check(backbone: OpenedModel, example: Mapping[str, Any] | None = None) -> Layout:
    """Run parts 1 and 2 of the self-check, and return the layout that the probe shows.

    For a model without weights (on the meta device), which cannot run, the layout follows from
    shapes.

    Raises:
        UnsupportedBackboneError: a part failed, or no prompt could be run.
    """
    if device_of(backbone.layers).type == "meta":
        width, vocabulary = backbone.text_config.hidden_size, len(backbone.head.weight)
        returns = (0,) * backbone.depth
        return Layout(int(width), vocabulary, returns, backbone.softcap, backbone.words)

    try:
        return _probed(backbone, example, whole=False)
    except UnsupportedBackboneError:  # some layers read what others leave for them
        return _probed(backbone, example, whole=True)


def _probed(backbone: OpenedModel, example: Mapping[str, Any] | None, *, whole: bool) -> Layout:
    """Run the probe, all layers or few, and hold what is read of the last state to the model."""
    backbone = copy.copy(backbone)  # on which part 2 tries what holds
    listener = _Listener(backbone, whole=whole)
    intercepted = InterceptedModel(backbone, listener)
    made: dict[str, Any] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, out: made.__setitem__(name, out)

    reader = intercepted.model.get_submodule(_around(backbone.family.stack, backbone.family.head))
    handles = [
        intercepted.stack.register_forward_hook(note("stack")),
        reader.register_forward_hook(note("reader")),
    ]
    try:
        with torch.inference_mode():
            _run(intercepted.model, reader, example)
            if listener.last is None or "stack" not in made:
                raise UnsupportedBackboneError(
                    f"{backbone.family.stack}.{backbone.family.layers} did not run in the probe.",
                    "Point the family at the language decoder; see docs/models.md.",
                )
            normed = _check_norm(backbone, listener.last, made["stack"])
            words = _check_logits(backbone, normed, made["reader"])
    finally:
        for handle in handles:
            handle.remove()
    width, returns = int(listener.last.shape[-1]), tuple(listener.returns)
    read_as = _read_as(backbone, returns)
    return Layout(width, words, returns, backbone.softcap, backbone.words, read_as)


class _Entry:
    """A handler that keeps what enters the first layer, and runs none."""

    def __init__(self, backbone: OpenedModel, returns: Sequence[int]) -> None:
        self._backbone, self._returns = backbone, returns
        self.states: Tensor | None = None

    def layer(self, call: LayerCall) -> Any:
        if call.index == 0:
            self.states = call.hidden
        return self._backbone.handed_through(call, self._returns[call.index])


def _read_as(backbone: OpenedModel, returns: Sequence[int]) -> dict[int, int]:
    """Special ids that the model reads as others where they come alone, as in an answer.

    Raises:
        UnsupportedBackboneError: it reads one as no token's embedding.
    """
    if backbone.is_encoder_decoder:  # whose decoder is shown no image
        return {}
    words, device = vocabulary(backbone.model)
    some = [i for i in special_ids(backbone.model) if 0 < i < words]
    word = int(prompt_ids(backbone.model)[0, 0])
    ids = torch.tensor([[word], [0], *([i] for i in some)], device=device)
    ours, theirs = (_entered(backbone, returns, ids, whole=whole) for whole in (False, True))
    if ours is None or theirs is None or not torch.equal(ours[0], theirs[0]):
        return {}  # it enters otherwise in any case: part 3 judges
    read_as = {}
    for number, mine, its in zip(ids[:, 0].tolist(), ours, theirs, strict=True):
        if torch.equal(mine, its):
            continue
        alike = next((i for i, row in enumerate(ours) if torch.equal(row, its)), None)
        if alike is None:
            raise UnsupportedBackboneError(
                f"{type(backbone.model).__name__} reads token {number}, where an answer holds it, "
                "as no token's embedding.",
                "Its answers cannot be decoded with exits; please report its model_type.",
            )
        read_as[number] = int(ids[alike, 0])
    return read_as


def _entered(
    backbone: OpenedModel, returns: Sequence[int], ids: Tensor, *, whole: bool
) -> Tensor | None:
    """The states [n, 1, D] that enter the first layer for ids [n, 1]; None where it is not reached.
    whole: run the module that returns logits, else the stack alone."""
    entry = _Entry(backbone, returns)
    intercepted = InterceptedModel(backbone, entry)
    family = backbone.family
    reader = intercepted.model.get_submodule(_around(family.stack, family.head))
    try:
        with torch.inference_mode():
            (reader if whole else intercepted.stack)(input_ids=ids, use_cache=False)
    except Exception:  # each model has its own way to refuse a prompt
        pass
    return entry.states


def _around(stack: str, head: str) -> str:
    """The path of the innermost module that holds both."""
    shared = []
    for name, other in zip(stack.split("."), head.split("."), strict=False):
        if name != other:
            break
        shared.append(name)
    return ".".join(shared)


def _run(model: Any, reader: Any, example: Mapping[str, Any] | None) -> None:
    """Run the module that returns logits on a prompt without an image, else the model on `example`.

    Ways to feed a decoder, likelier ones first: as text, as text after states that an encoder
    might have made, and by the whole model's `generate`.
    """
    failure: Exception | None = None
    for call in (_as_text, _behind_encoder, _generate):
        try:
            call(model, reader, example)
        except UnsupportedBackboneError:
            raise
        except Exception as error:  # each model has its own way to refuse a prompt
            failure = failure or error
            continue
        return
    if "inference tensor" in str(failure):
        raise UnsupportedBackboneError(
            f"{type(model).__name__}, as it is quantised, does not run in torch.inference_mode, in "
            "which tokens are decoded.",
            "Load it in a scheme that docs/quantisation.md names, or in float.",
        ) from failure
    raise UnsupportedBackboneError(
        f"{type(model).__name__} could not be probed: {type(failure).__name__}: "
        f"{str(failure)[:200]}",
        "Give what its processor returns for one prompt with an image: "
        "Backbone(model, example=inputs).",
    ) from failure


def _as_text(model: Any, reader: Any, _: Any) -> None:
    ids = prompt_ids(model)[:, :_TOKENS]
    more: dict[str, Any] = {"logits_to_keep": 1} if accepts(reader, "logits_to_keep") else {}
    if reader.config.is_encoder_decoder:
        more["decoder_input_ids"] = ids
    reader(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **more)


def _behind_encoder(model: Any, reader: Any, _: Any) -> None:
    ids = prompt_ids(model)[:, :_TOKENS]
    parameter = next(p for p in reader.parameters() if p.is_floating_point())
    states = encoder_states(model.config, ids.device, parameter.dtype)
    if accepts(reader, "encoder_outputs"):
        reader(encoder_outputs=states, decoder_input_ids=ids, use_cache=False)
    else:
        hidden = states.last_hidden_state
        reader(input_ids=ids, encoder_hidden_states=hidden, use_cache=False)


def _generate(model: Any, _: Any, example: Mapping[str, Any] | None) -> None:
    inputs = text_prompt(model) if example is None else example
    model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, num_beams=1)


def _check_norm(backbone: OpenedModel, last: Tensor, out: Any) -> Tensor:
    """Part 1."""
    returned = first_tensor(getattr(out, "last_hidden_state", out))
    assert returned is not None
    family = backbone.family
    if last.dim() != 3:
        raise UnsupportedBackboneError(
            f"Self-check, part 1: states of {family.stack}.{family.layers} carry another axis: "
            f"{list(last.shape)}, not [B, T, D].",
            "Exits read one state for a token; decoders with several streams (AltUp, "
            "hyper-connections) are not supported.",
        )
    normed = backbone.final_norm(last)
    apart = relative_difference(normed, returned)
    if apart > _allowed(returned):
        alike = normed.shape == returned.shape
        difference = f"off by {apart:.1e}" if alike else "of another shape"
        raise UnsupportedBackboneError(
            f"Self-check, part 1: norm={family.norm!r} over the last layer's output is not what "
            f"{family.stack} returns ({difference}).",
            _remedy(backbone, "norm"),
        )
    return normed


def _check_logits(backbone: OpenedModel, normed: Tensor, out: Any) -> int:
    """Part 2; how many logits there are."""
    theirs = getattr(out, "logits", None)
    if not isinstance(theirs, Tensor):
        raise UnsupportedBackboneError(
            f"Self-check, part 2: {type(backbone.model).__name__} returned no logits.",
            _remedy(backbone, "head"),
        )
    theirs, words = theirs[:, -1:], theirs.shape[-1]
    low = torch.finfo(theirs.dtype).min / 2  # what tokens have that are never said
    head: nn.Module | None = None
    plain = type(backbone.head) is nn.Linear and len(backbone.head.weight) == words
    plain = plain and not backbone.split  # whose rows all processes would gather
    if plain and not backbone.family.suppressed and bool((theirs > low).all()):
        ids = torch.arange(0, words, max(1, words // _ROWS), device=theirs.device)
        head, theirs = backbone.head_rows(ids), theirs[..., ids]
    ours = backbone.logits(normed[:, -1:].clone(), head)
    if ours.shape[-1] > words and head is None and backbone.words is None:
        backbone.words = words  # a vocabulary that is padded in the head alone
        return _check_logits(backbone, normed, out)
    apart = relative_difference(ours, theirs)
    if apart > _allowed(theirs):
        if backbone.softcap is not None:  # a wrapper may leave its text model's out
            backbone.softcap = None
            return _check_logits(backbone, normed, out)
        family = backbone.family
        difference = "of another shape"
        if ours.shape == theirs.shape:
            mine, own = ours.double(), theirs.to(ours.device).double()
            factor = float((mine * own).sum() / mine.square().sum())
            difference = f"off by {apart:.1e}; theirs are about {factor:.4g} times ours"
        raise UnsupportedBackboneError(
            f"Self-check, part 2: logits read by head={family.head!r} are not the model's own "
            f"({difference}).",
            _remedy(backbone, "head, hidden_scale or logit_scale"),
        )
    return words


def _allowed(tensor: Tensor) -> float:
    return _WIDE.get(tensor.dtype, _HALF)


def _remedy(backbone: OpenedModel, fields: str) -> str:
    kind = backbone.model.config.model_type
    if backbone.family.discovered:
        return (
            f"It was found by watching; name the paths: register_backbone({kind!r}, Family(...)); "
            "see docs/models.md."
        )
    return f"Correct {fields} in register_backbone({kind!r}, Family(...)); see docs/models.md."
