"""Every module call of a few greedy steps, seen on twins: the model itself is not touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.models.discovery.twin import twin


@dataclass
class Call:
    """One call of a module.

    path: dotted, from the model. level: number of calls around it. inside: the nearest of these.
    input: the first tensor among its arguments. out: its return value. order: place among all
    calls.
    """

    path: str
    module: nn.Module
    level: int
    inside: Call | None
    input: Tensor | None
    kw: dict[str, Any]
    positional: int
    order: int
    out: Any = None

    def around(self) -> Iterator[Call]:
        """The calls around this one, the nearest first."""
        call = self.inside
        while call is not None:
            yield call
            call = call.inside


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in an output or in arguments, through tuples and model outputs."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, tuple | list | Mapping):
        return next((t for t in map(first_tensor, items) if t is not None), None)
    return None


def twin_tree(model: nn.Module) -> tuple[nn.Module, dict[int, str]]:
    """A twin of the model whose every module is a twin, and the paths of the twins by id."""
    twins: dict[int, nn.Module] = {}
    paths: dict[int, str] = {}

    def copied(module: nn.Module, path: str) -> nn.Module:
        if id(module) not in twins:
            made = twins[id(module)] = twin(module)
            paths[id(made)] = path
            for name, child in made._modules.items():
                if child is not None:
                    made._modules[name] = copied(child, f"{path}.{name}" if path else name)
        return twins[id(module)]

    return copied(model, ""), paths


def watch(model: Any, inputs: Mapping[str, Any], *, steps: int = 3) -> list[list[Call]]:
    """Generate `steps` tokens greedily on `inputs` and return the calls of each step, of all but
    the last one the first alone: a step is a call of the whole model, or of its encoder.

    Errors of the model are raised as they are.
    """
    root, paths = twin_tree(model)
    seen: list[list[Call]] = []
    open_calls: list[Call] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]) -> None:
        if not open_calls:
            seen.append([])
        around = open_calls[-1] if open_calls else None
        tensor = first_tensor(args)
        if tensor is None:
            tensor = first_tensor(kw.get("hidden_states", kw))
        calls = seen[-1]
        place = len(calls)
        call = Call(
            paths[id(module)], module, len(open_calls), around, tensor, kw, len(args), place
        )
        calls.append(call)
        open_calls.append(call)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        open_calls.pop().out = out
        if not open_calls and len(seen) > 1:  # tensors of earlier steps go
            seen[-2] = seen[-2][:1]

    for module in root.modules():
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)
    with torch.inference_mode():
        root.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, num_beams=1
        )
    return seen
