"""From the calls of one decoding step to a `Family`: layers, stack, norm, head and their scales.

The outermost list whose members run in the step is the layers, what encloses their calls is the
stack, the child of the stack that takes exactly the last layer's output is the norm, and the last
module of vocabulary width is the head. Ratios between what one returns and the next takes give the
scale of states; what the model makes of a head that says what we like is a scale of logits, a cap
on them, a bias and the tokens that are never said. Nothing is believed: `self_check` holds the
result to the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.errors import UnsupportedBackboneError
from offramp.core.models.discovery.probe import accepts, text_prompt
from offramp.core.models.discovery.twin import graft, twin
from offramp.core.models.discovery.watch import Call, first_tensor, watch
from offramp.core.models.in_place_of import InPlaceOf
from offramp.core.models.registry import Family

_TOWERS = (
    "vision_tower",
    "vision_model",
    "visual",
    "vision_encoder",
    "vision_embed_tokens",
    "vqmodel",
    "encoder",
)


def discover(model: Any, example: Mapping[str, Any] | None = None) -> Family:
    """Return the family of a model that is not registered.

    example: the processor's output for a prompt with an image; needed where the model does not run
    without one.

    Raises:
        UnsupportedBackboneError: the model cannot run, or its decoder is not one chain of layers.
    """
    if not hasattr(model, "generate"):
        raise UnsupportedBackboneError(
            f"{type(model).__name__} does not generate text token by token.",
            "Use a model whose class has generate() with a KV cache.",
        )
    step = _watched(model, example)
    layers = _layers(model, step)
    stack = _stack(model, layers)
    _check_chain(layers)
    last = first_tensor(layers[-1].out)
    assert last is not None
    norm, normed = _norm(step, stack, layers[-1], last)
    logits = _logits(model, step)
    head, scale = _head(step, layers[-1], normed, logits)
    return Family(
        stack=stack.path,
        layers=_inside(stack.path, layers[0].path.rpartition(".")[0]),
        norm=None if norm is None else _inside(stack.path, norm.path),
        head=head.path,
        vision=_tower(model, stack.path),
        hidden_scale=scale,
        **_readout(
            model, step[0].path, head, logits, text_prompt(model) if example is None else example
        ),
        causal_prompt=False,
        discovered=True,
    )


def _watched(model: Any, example: Mapping[str, Any] | None) -> list[Call]:
    """The calls of a step in which the model writes a token."""
    try:
        seen = watch(model, text_prompt(model) if example is None else example)
    except Exception as error:  # whatever this model raises on a prompt it does not take
        alone = " without an image" if example is None else ""
        raise UnsupportedBackboneError(
            f"{type(model).__name__} could not be watched generating{alone}: "
            f"{type(error).__name__}: {str(error)[:200]}",
            "Give what its processor returns for one prompt with an image: Backbone(model, "
            "example=inputs); or register it, see docs/models.md."
            if example is None
            else "Check that model.generate(**example, max_new_tokens=3) works.",
        ) from error
    if len(seen) < 2:
        raise UnsupportedBackboneError(
            f"{type(model).__name__} does not generate token by token.",
            "Use a model that calls its decoder once for each token.",
        )
    return seen[-1]


def _inside(stack: str, path: str) -> str:
    """`path` from the stack on; from the model, after a dot, where it lies elsewhere."""
    return path[len(stack) + 1 :] if stack and path.startswith(f"{stack}.") else f".{path}"


def _layers(model: Any, calls: Sequence[Call]) -> list[Call]:
    """The calls of the outermost list's members, in order."""
    lists: dict[str, Any] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1
    }
    members: dict[str, list[Call]] = {}
    for call in calls:
        parent, _, name = call.path.rpartition(".")
        if parent in lists and name in lists[parent]._modules:
            members.setdefault(parent, []).append(call)
    outer = {
        path: chain
        for path, chain in members.items()
        if len({c.path for c in chain}) == len(lists[path])
        and not any(
            a.path.rpartition(".")[0] in members and a.path.rpartition(".")[0] != path
            for a in chain[0].around()
        )
    }
    if len(outer) > 1:
        final = {p: max(c.order for c in chain) for p, chain in outer.items()}
        last = max(final, key=final.__getitem__)
        level = {p: chain[0].level for p, chain in outer.items()}
        if any(level[p] == level[last] and p != last for p in outer):
            raise UnsupportedBackboneError(
                f"Layers of {' and of '.join(sorted(outer))} run side by side in every step.",
                "This decoder is not one chain of layers, so none can be left out; see "
                "docs/models.md.",
            )
        outer = {last: outer[last]}
    if not outer:
        raise UnsupportedBackboneError(
            f"No list of decoder layers runs in each step of {type(model).__name__}.",
            "Register its paths with offramp.register_backbone; docs/models.md shows how.",
        )
    (path, chain), *_ = outer.items()
    if len(chain) != len(lists[path]):
        raise UnsupportedBackboneError(
            f"Layers of {path} run more than once for a token ({len(chain)} calls of "
            f"{len(lists[path])} layers).",
            "A decoder that loops over its layers cannot leave any out; see docs/models.md.",
        )
    if [call.path.rpartition(".")[2] for call in chain] != [*lists[path]._modules]:
        raise UnsupportedBackboneError(
            f"Layers of {path} run in another order than they stand in.",
            "Only decoders whose layers follow on one another can be exited early; see "
            "docs/models.md.",
        )
    return chain


def _stack(model: Any, layers: Sequence[Call]) -> Call:
    """The nearest call around the layers that takes embeddings in the tokens' place."""
    for call in layers[0].around():
        if accepts(call.module, "inputs_embeds"):
            return call
    raise UnsupportedBackboneError(
        f"The module around {layers[0].path.rpartition('.')[0]} does not take inputs_embeds.",
        "Register its paths with offramp.register_backbone; docs/models.md shows how.",
    )


def _check_chain(layers: Sequence[Call]) -> None:
    """Raise where what a layer takes is not what the one before it returned."""
    for before, after in itertools.pairwise(layers):
        out, entry = first_tensor(before.out), after.input
        assert out is not None
        if out.dim() != 3:
            raise UnsupportedBackboneError(
                f"States of {before.path} carry another axis: {list(out.shape)}, not [B, T, D].",
                "Exits read one state for a token; models with several streams (AltUp, "
                "hyper-connections) are not supported.",
            )
        if entry is None or entry.shape != out.shape or not torch.equal(entry, out):
            raise UnsupportedBackboneError(
                f"Something changes the states between {before.path} and {after.path} in every "
                "step.",
                "Only decoders whose layers follow on one another can be exited early; see "
                "docs/models.md.",
            )


def _same(tensor: Tensor | None, other: Tensor) -> bool:
    return tensor is not None and tensor.shape == other.shape and torch.equal(tensor, other)


def _norm(
    calls: Sequence[Call], stack: Call, layer: Call, last: Tensor
) -> tuple[Call | None, Tensor]:
    """The module that takes exactly the last layer's output and makes the stack's, if any."""
    made = first_tensor(getattr(stack.out, "last_hidden_state", stack.out))
    assert made is not None
    after = [c for c in calls if c.order > layer.order and not _is_under(c, layer)]
    for call in after:
        out = first_tensor(call.out)
        if call.path.startswith(f"{stack.path}.") and _same(call.input, last) and out is not None:
            return call, out
    if _same(made, last):
        return None, last
    raise UnsupportedBackboneError(
        f"What {stack.path} returns is not its last layer's output under one norm.",
        "Register its paths with offramp.register_backbone; docs/models.md shows how.",
    )


def _is_under(call: Call, other: Call) -> bool:
    return any(a is other for a in call.around()) or call is other


def _logits(model: Any, calls: Sequence[Call]) -> Tensor:
    logits = getattr(calls[0].out, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedBackboneError(
            f"{type(model).__name__} returns no logits in a decoding step.",
            "Use a model with a language-modelling head.",
        )
    return logits


def _head(
    calls: Sequence[Call], layer: Call, normed: Tensor, logits: Tensor
) -> tuple[Call, float | None]:
    """The module that reads the normed state, times a constant, into logits."""
    after = [c for c in calls if c.order > layer.order and not _is_under(c, layer)]
    words = logits.shape[-1]
    wide = [c for c in after if (_width(c.out) or 0) >= words and c.level > 0]
    wide.sort(key=lambda c: _width(c.out) == words)  # else the model keeps the first alone
    for call in reversed(wide):  # the innermost that reads the state itself
        if any(True for _ in call.module.children()):
            continue
        for reader in (call, *call.around()):
            if reader.level == 0:
                break
            scale = _ratio(reader.input, normed)
            if scale is not None:
                return reader, None if scale == 1.0 else scale
    raise UnsupportedBackboneError(
        "No module reads the last normed state into logits.",
        "Register its paths with offramp.register_backbone; docs/models.md shows how.",
    )


def _width(out: Any) -> int | None:
    tensor = first_tensor(out)
    return None if tensor is None or tensor.dim() == 0 else int(tensor.shape[-1])


def _ratio(tensor: Tensor | None, other: Tensor) -> float | None:
    """The constant c with tensor = c * other for the last token, if there is one."""
    if tensor is None or not tensor.is_floating_point() or tensor.shape[-1] != other.shape[-1]:
        return None
    a, b = tensor.reshape(-1, tensor.shape[-1])[-1].double(), other[0, -1].double()
    scale = float((a * b).sum() / (b * b).sum())
    close = (a - scale * b).abs().max() <= _tolerance(tensor) * a.abs().max()
    if not close or scale == 0.0:
        return None
    return 1.0 if abs(scale - 1.0) < 1e-6 else scale


def _tolerance(tensor: Tensor) -> float:
    return 1e-5 if tensor.dtype in (torch.float32, torch.float64) else 1.6e-2


class _Says(InPlaceOf):
    """Stands in the LM head's place and returns given logits for every state."""

    def __init__(self, head: nn.Module, words: Tensor) -> None:
        super().__init__(head)
        self.__dict__["_words"] = words

    def __call__(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return self._words.expand(*hidden.shape[:-1], -1)  # type: ignore[no-any-return]


def _readout(
    model: Any, top: str, head: Call, logits: Tensor, example: Mapping[str, Any]
) -> dict[str, Any]:
    """What the model does to what its head says, as fields of a `Family`: scale, cap, bias, and the
    tokens that are never said. top: path of the module that returns logits."""
    said = first_tensor(head.out)
    assert said is not None
    allowed = _tolerance(logits)

    def of(words: Tensor) -> Tensor:
        """Logits [V], in double precision, where the head says these words [W]."""
        root = twin(model)
        graft(root, head.path, _Says(head.module, words.to(said)))
        made: list[Tensor] = []  # as a `generate` of somebody's own may hand out anything
        handle = root.get_submodule(top).register_forward_hook(
            lambda _, args, out: made.append(out.logits[0, -1])
        )
        with handle, torch.inference_mode():
            root.generate(  # type: ignore[operator]
                **example, max_new_tokens=1, do_sample=False, num_beams=1
            )
        return made[0].double()

    spread = torch.linspace(-1, 1, said.shape[-1], dtype=torch.float64, device=said.device)
    bias = of(torch.zeros_like(spread))
    never = bias <= torch.finfo(logits.dtype).min / 2
    bias[never] = 0
    most = (of(1e4 * spread.sign()) - bias)[~never].abs().max().item()
    words, cap = spread[: len(bias)][~never], None
    x, y = words * 1e-2, (of(spread * 1e-2) - bias)[~never]
    scale = _scale(x, y)
    if abs(most - 1e4 * abs(scale)) > 0.5 * 1e4 * abs(scale):
        cap = _named(model.config.to_dict(), most, allowed)
        scale = _scale(x, torch.atanh((y / cap).clamp(-0.999999, 0.999999)) * cap)
    scale = _named(model.config.to_dict(), scale, allowed)
    for size in (1.0, 30.0):
        x, y = size * words * scale, (of(spread * size) - bias)[~never]
        x = x if cap is None else torch.tanh(x / cap) * cap
        if not (y - x).abs().max() <= 20 * allowed * max(y.abs().max().item(), 1e-6):
            raise UnsupportedBackboneError(
                "The model's logits are not its head's output times a constant, capped or with a "
                "bias.",
                "Its readout is not known; see docs/models.md.",
            )
    return {
        "logit_scale": scale,
        "softcap": cap,
        "logit_bias": _place_of(model, bias) if bool(bias.any()) else None,
        "suppressed": tuple(never.nonzero()[:, 0].tolist()),
    }


def _scale(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x * x).sum())


def _place_of(model: Any, bias: Tensor) -> str:
    """The path of the parameter or buffer that a bias of logits is."""
    for path, value in (*model.named_parameters(), *model.named_buffers()):
        held = value.flatten()[: len(bias)]
        if held.numel() == len(bias) and torch.equal(held.to(bias), bias):
            return str(path)
    raise UnsupportedBackboneError(
        "The model adds to its logits what is no parameter or buffer of it.",
        "Keep it in one: self.register_buffer('logits_bias', ...).",
    )


def _named(config: Mapping[str, Any], measured: float, tolerance: float) -> float:
    """The configuration's exact number for a measured one: a field, or its reciprocal."""
    if abs(measured - 1.0) < tolerance:
        return 1.0
    for value in _numbers(config):
        for exact in (value, 1 / value):
            if abs(exact - measured) < tolerance * abs(measured):
                return exact
    return measured


def _numbers(config: Mapping[str, Any]) -> list[float]:
    numbers: list[float] = []
    for value in config.values():
        if isinstance(value, Mapping):
            numbers += _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and value:
            numbers.append(float(value))
    return numbers


def _tower(model: Any, stack: str) -> str | None:
    """The vision tower by the usual names, outside the decoder."""
    for prefix in ("model.", ""):
        for name in _TOWERS:
            path = f"{prefix}{name}"
            node: Any = model
            for part in path.split("."):
                node = getattr(node, part, None)
            if isinstance(node, nn.Module) and not f"{stack}.".startswith(f"{path}."):
                return path
    return None
