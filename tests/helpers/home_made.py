"""Decoders as people write them: a LLaVA whose stack or layers somebody changed, by idiom."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import families
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from offramp.core.executors.kv_cache import cache_parameter

LAST = families.LAYERS - 1
CACHE = cache_parameter(families.build("llava").model.language_model)
"""What this transformers calls the cache."""


def noise(number: int, like: Tensor) -> Tensor:
    """1 give or take 1e-4, the same for a number."""
    draw = torch.Generator().manual_seed(number)
    return 1 + 1e-4 * torch.randn(like.shape[-1], generator=draw)


class Stack(LlamaModel):
    """Llama's stack with places to do something else in."""

    def enter(self, h: Tensor, positions: Tensor) -> Tensor:
        return h

    def between(self, i: int, h: Tensor, first: Tensor, ids: Any, positions: Tensor) -> Tensor:
        """Behind layer i, but the last."""
        return h

    def seen(self, keys: Tensor, queries: Tensor) -> Tensor | None:
        """Which columns are seen from which; None: all before."""
        return None

    def call(self, layer: Any, h: Tensor, **kw: Any) -> Tensor:
        return layer(h, **kw)  # type: ignore[no-any-return]

    def leave(self, h: Tensor) -> Tensor:
        return self.norm(h)

    def forward(  # type: ignore[no-untyped-def, override]
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        **kw: Any,
    ) -> BaseModelOutputWithPast:
        cache = kw.pop(CACHE, cache)
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past, new = 0 if cache is None else cache.get_seq_length(), h.shape[1]
        if position_ids is None:
            position_ids = (torch.arange(new) + past)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        queries, keys = torch.arange(past, past + new)[:, None], torch.arange(past + new)[None]
        seen = self.seen(keys, queries)
        if seen is not None:
            before = seen & (keys <= queries)
            if mask is not None:
                before = before & (mask if mask.dtype == torch.bool else mask > -1)
            mask = torch.zeros(before.shape).masked_fill(~before, -1e9)
            mask = mask[None, None] if mask.dim() == 2 else mask
        h = first = self.enter(h, position_ids)
        rope = self.rotary_emb(h, position_ids=position_ids)
        by_name = isinstance(self.layers, nn.ModuleDict)
        for i, layer in enumerate(self.layers.values() if by_name else self.layers):
            h = self.call(
                layer,
                h,
                attention_mask=mask,
                position_embeddings=rope,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache, **kw},
            )
            h = h if i == LAST else self.between(i, h, first, input_ids, position_ids)
        return BaseModelOutputWithPast(last_hidden_state=self.leave(h), **{CACHE: cache})


class ScaledOutside(Stack):
    def between(self, i, h, first, ids, positions):  # type: ignore[no-untyped-def]
        return h * (0.5 + 0.3 * i)


class EmbeddingsAdded(Stack):
    def between(self, i, h, first, ids, positions):  # type: ignore[no-untyped-def]
        return h + 0.1 * (i + 1) * first


class TokensAdded(Stack):
    def between(self, i, h, first, ids, positions):  # type: ignore[no-untyped-def]
        return h if ids is None else h + self.embed_tokens((ids + i) % 90)


class Noise(Stack):
    def between(self, i, h, first, ids, positions):  # type: ignore[no-untyped-def]
        return h * noise(i, h)


class Skips(Stack):
    """The output of layer 1 joins again behind layer 3, as in a U-net."""

    def between(self, i, h, first, ids, positions):  # type: ignore[no-untyped-def]
        if i == 1:
            self.kept = h
        return h + 0.5 * self.kept if i == 3 else h


class NormedBetween(Stack):
    def between(self, i, h, first, ids, positions):  # type: ignore[no-untyped-def]
        return self.norm(h) if i == 2 else h


class ScaledByPosition(Stack):
    def between(self, i, h, first, ids, positions):  # type: ignore[no-untyped-def]
        return h * (1 + 0.1 * torch.sin(positions.float()))[..., None]


class EverySecond(Stack):
    """Odd layers leave tokens at odd positions alone."""

    def between(self, i, h, first, ids, positions):  # type: ignore[no-untyped-def]
        if i % 2 == 0:
            self.kept = h
            return h
        return torch.where((positions % 2 == 1)[..., None], self.kept, h)


class TokenBefore(Stack):
    """Mixes in the state of the token before, kept on the module."""

    def between(self, i, h, first, ids, positions):  # type: ignore[no-untyped-def]
        if i != 2:
            return h
        kept = self.__dict__.get("kept", h)
        before = kept if kept.shape == h.shape and h.shape[1] == 1 else h.roll(1, 1)
        self.__dict__["kept"] = h[:, -1:]
        return h + 0.3 * before


class PositionsEnter(Stack):
    def enter(self, h: Tensor, positions: Tensor) -> Tensor:
        return h + 0.3 * torch.sin(positions.float())[..., None]


class SeesThePrompt(Stack):
    """Below the first layer each token of a prompt gets the mean of all, later ones too."""

    def enter(self, h: Tensor, positions: Tensor) -> Tensor:
        return h if h.shape[1] == 1 else h + h.mean(1, keepdim=True)


class ScaledFrom24(Stack):
    """States of later tokens are scaled, as attention is beyond a length in some models."""

    def between(self, i, h, first, ids, positions):  # type: ignore[no-untyped-def]
        return torch.where((positions >= 24)[..., None], h * (1 + 0.2 * i), h)


class Window(Stack):
    def seen(self, keys: Tensor, queries: Tensor) -> Tensor:
        return queries - keys < 8


class Strided(Stack):
    def seen(self, keys: Tensor, queries: Tensor) -> Tensor:
        return ((queries - keys) % 2 == 0) | (queries - keys < 2)


class NormedTwice(Stack):
    def leave(self, h: Tensor) -> Tensor:
        return self.norm(self.norm(h))


class NormedBehind(Stack):
    def leave(self, h: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(self.norm(h), h.shape[-1:])


class NoiseByLength(LlamaDecoderLayer):
    """Calls of several tokens compute otherwise than calls of one."""

    def forward(self, hidden_states, *args, **kw):  # type: ignore[no-untyped-def]
        h = super().forward(hidden_states, *args, **kw)
        return h * noise(3, h) if h.shape[1] == 1 else h


class NoiseByCall(LlamaDecoderLayer):
    """No call is as the one before."""

    def forward(self, hidden_states, *args, **kw):  # type: ignore[no-untyped-def]
        self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        h = super().forward(hidden_states, *args, **kw)
        return h * noise(self.calls, h)


class StateBeside(LlamaDecoderLayer):
    """The mean of all states so far, kept beside the cache."""

    def forward(self, hidden_states, *args, cache=None, **kw):  # type: ignore[no-untyped-def]
        cache, kept = kw.pop(CACHE, cache), self.__dict__.setdefault("kept", {})
        total, count = kept.get(id(cache), (0, 0))
        total, count = total + hidden_states.sum(1, keepdim=True), count + hidden_states.shape[1]
        kept[id(cache)] = total, count
        hidden_states = hidden_states + 0.3 * total / count
        return super().forward(hidden_states, *args, **{CACHE: cache, **kw})


class ScaledByCache(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, cache=None, **kw):  # type: ignore[no-untyped-def]
        cache = kw.pop(CACHE, cache)
        length = 0 if cache is None else cache.get_seq_length()
        h = super().forward(hidden_states, *args, **{CACHE: cache, **kw})
        return h * (1 + 0.01 * length)


class AcrossRows(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kw):  # type: ignore[no-untyped-def]
        h = super().forward(hidden_states, *args, **kw)
        return h + 0.1 * h.mean(0, keepdim=True)


class Head(LlavaForConditionalGeneration):
    """LLaVA with logits that are not its head's output."""

    def read(self, logits: Tensor, positions: Any) -> Tensor:
        return logits

    def forward(  # type: ignore[no-untyped-def, override]
        self, input_ids=None, pixel_values=None, attention_mask=None, position_ids=None, **kw: Any
    ) -> Any:
        named = {"pixel_values": pixel_values, "attention_mask": attention_mask}
        out = super().forward(input_ids, position_ids=position_ids, **named, **kw)
        out.logits = self.read(out.logits, position_ids)
        return out


class Tempered(Head):
    def read(self, logits: Tensor, positions: Any) -> Tensor:
        return logits / 0.7


class TemperedALittle(Head):
    def read(self, logits: Tensor, positions: Any) -> Tensor:
        return logits * 1.00003


class TemperedByPosition(Head):
    def read(self, logits: Tensor, positions: Any) -> Tensor:
        return logits if positions is None else logits * (1 + 0.01 * positions[..., -1:, None])


class Capped(Head):
    def read(self, logits: Tensor, positions: Any) -> Tensor:
        return 7.25 * torch.tanh(logits / 7.25)


class Biased(Head):
    def read(self, logits: Tensor, positions: Any) -> Tensor:
        return logits + self.logits_bias


class CappedAndBiased(Head):
    def read(self, logits: Tensor, positions: Any) -> Tensor:
        return 7.25 * torch.tanh(0.5 * logits / 7.25) + self.logits_bias


class BiasedByNothing(Head):
    """By what is no parameter or buffer."""

    def read(self, logits: Tensor, positions: Any) -> Tensor:
        return logits + torch.linspace(-2, 2, logits.shape[-1])


class BiasedInCap(Head):
    def read(self, logits: Tensor, positions: Any) -> Tensor:
        return 7.25 * torch.tanh((logits + self.logits_bias) / 7.25)


class Sliced(Head):
    def read(self, logits: Tensor, positions: Any) -> Tensor:
        return logits[..., :90]


class WithoutConfig(Stack):
    """It holds what it is built by under another name."""

    def forward(self, *args, **kw):  # type: ignore[no-untyped-def]
        self.__dict__["config"] = self.built_by
        try:
            return super().forward(*args, **kw)
        finally:
            del self.__dict__["config"]


class NamesStates(Stack):
    """Its layers take their states as `x`, by name."""

    def call(self, layer: Any, h: Tensor, **kw: Any) -> Tensor:
        return layer(x=h, **kw)  # type: ignore[no-any-return]


class TakesX(LlamaDecoderLayer):
    def forward(self, x, **kw):  # type: ignore[no-untyped-def]
        return super().forward(x, **kw)


class ByName(Stack):
    """Its layers stand in an `nn.ModuleDict`."""


class Sees(LlamaDecoderLayer):
    """Adds what it was handed from outside."""

    def forward(self, hidden_states, *args, **kw):  # type: ignore[no-untyped-def]
        seen = self.__dict__.get("seen")
        h = hidden_states if seen is None else hidden_states + seen
        return super().forward(h, *args, **kw)


class CountsSteps(LlamaDecoderLayer):
    """Every third step of an answer is scaled."""

    def forward(self, hidden_states, *args, **kw):  # type: ignore[no-untyped-def]
        steps = 0 if hidden_states.shape[1] > 1 else self.__dict__.get("steps", 0) + 1
        self.__dict__["steps"] = steps
        return super().forward(hidden_states, *args, **kw) * (1.3 if steps % 3 == 2 else 1)


class ScaledFrom18(LlamaDecoderLayer):
    """Where the first answers do not reach."""

    def forward(self, hidden_states, *args, position_ids=None, **kw):  # type: ignore[no-untyped-def]
        h = super().forward(hidden_states, *args, position_ids=position_ids, **kw)
        return h * torch.where(position_ids[..., None] >= 18, -1.2, 1.0)


def seen_of(pixels: Tensor) -> Tensor:
    return 2 * torch.sin(pixels.sum() * torch.arange(families.WIDTH))


class HandsToLayers(LlavaForConditionalGeneration):
    """As Flamingo's descendants do."""

    def forward(self, input_ids=None, pixel_values=None, **kw):  # type: ignore[no-untyped-def]
        if pixel_values is not None:
            for layer in self.model.language_model.layers:
                layer.seen = seen_of(pixel_values)
        return super().forward(input_ids, pixel_values=pixel_values, **kw)


class SetsUp(LlavaForConditionalGeneration):
    """For the time of `generate`."""

    def generate(self, *args, pixel_values=None, **kw):  # type: ignore[no-untyped-def]
        layers = self.model.language_model.layers
        for layer in layers:
            layer.seen = None if pixel_values is None else seen_of(pixel_values)
        try:
            return super().generate(*args, pixel_values=pixel_values, **kw)
        finally:
            for layer in layers:
                layer.seen = None


class LoopOfItsOwn(LlavaForConditionalGeneration):
    def _sample(self, input_ids, processors, *args, **kw):  # type: ignore[no-untyped-def]
        turned = [lambda ids, scores: scores.flip(-1)]
        return super()._sample(input_ids, LogitsProcessorList(turned), *args, **kw)


class CarriesOn(LlavaForConditionalGeneration):
    """A hint goes from step to step."""

    def _update_model_kwargs_for_generation(self, out, kw, **more):  # type: ignore[no-untyped-def]
        kw = super()._update_model_kwargs_for_generation(out, kw, **more)
        self.__dict__["hint"] = int(out.logits[0, -1].argmax()) % 2
        return kw

    def forward(self, *args, **kw):  # type: ignore[no-untyped-def]
        out = super().forward(*args, **kw)
        if kw.get("pixel_values") is None:
            out.logits = out.logits.roll(self.__dict__.get("hint", 0), -1)
        return out


class RewritesTheEnd(LlavaForConditionalGeneration):
    """Its answers are not what was decoded."""

    def generate(self, *args, **kw):  # type: ignore[no-untyped-def]
        made = super().generate(*args, **kw)
        made[:, -1] = families.FIRST_WORD
        return made


class RewritesAWord(LlavaForConditionalGeneration):
    """Where it was said, which first answers may not."""

    def generate(self, *args, **kw):  # type: ignore[no-untyped-def]
        made = super().generate(*args, **kw)
        return torch.where(made % 7 == 3, families.FIRST_WORD, made)


class LeavesThePromptOut(LlavaForConditionalGeneration):
    def generate(self, input_ids=None, **kw):  # type: ignore[no-untyped-def]
        return super().generate(input_ids=input_ids, **kw)[:, input_ids.shape[1] :]


class AsksTwice(LlavaForConditionalGeneration):
    """What it says first is part of what it is asked next."""

    def generate(self, input_ids=None, attention_mask=None, **kw):  # type: ignore[no-untyped-def]
        ids = super().generate(input_ids=input_ids, attention_mask=attention_mask, **kw)
        return super().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **kw)


class AsksNobody(LlavaForConditionalGeneration):
    def generate(self, input_ids=None, max_new_tokens=8, **kw):  # type: ignore[no-untyped-def]
        asked = {n: v for n, v in kw.items() if n in ("pixel_values", "attention_mask")}
        return torch.cat([input_ids, self(input_ids, **asked).logits.argmax(-1)[:, -1:]], 1)


class TakesNoLoop(LlavaForConditionalGeneration):
    def generate(
        self,
        input_ids,
        pixel_values,
        attention_mask=None,
        max_new_tokens=8,
        do_sample=False,
        min_new_tokens=None,
        suppress_tokens=None,
    ):  # type: ignore[no-untyped-def]
        return super().generate(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )


class HeadByImage(LlavaForConditionalGeneration):
    """Which way its head reads, the image says."""

    def forward(self, input_ids=None, pixel_values=None, **kw):  # type: ignore[no-untyped-def]
        if pixel_values is not None:
            self.lm_head.turned = bool(pixel_values.sum() > 0)
        out = super().forward(input_ids, pixel_values=pixel_values, **kw)
        out.logits = out.logits.roll(1, -1) if self.lm_head.turned else out.logits
        return out


KEEPING = (Sees, CountsSteps, ScaledFrom18)
"""Layers of which more than one answer tells."""
TOPS = (
    HandsToLayers,
    HeadByImage,
    SetsUp,
    LoopOfItsOwn,
    CarriesOn,
    RewritesTheEnd,
    RewritesAWord,
    LeavesThePromptOut,
    AsksTwice,
    AsksNobody,
    TakesNoLoop,
)
STACKS, HEADS = Stack.__subclasses__(), Head.__subclasses__()
LAYERS = [k for k in LlamaDecoderLayer.__subclasses__() if k.__module__ == __name__]
LAYERS = [k for k in LAYERS if k not in (*KEEPING, TakesX)]  # those of patches stand below


def build(kind: type) -> Any:
    """A tiny LLaVA with one of `STACKS`, `LAYERS` or `HEADS` in it; unless it is a head, its own
    class is Hugging Face's. Heads are of a type that nobody registered."""
    model = families.build("llava")
    stack = model.model.language_model
    if kind in STACKS:
        stack.__class__ = kind
    if kind is WithoutConfig:
        stack.__dict__["built_by"] = stack.__dict__.pop("config")
    if kind is NamesStates:
        for layer in stack.layers:
            layer.__class__ = TakesX
    if kind is ByName:
        stack.layers = nn.ModuleDict({f"layer_{i}": it for i, it in enumerate(stack.layers)})
    if kind in (*LAYERS, *KEEPING, *TOPS):
        for layer in stack.layers:
            layer.__class__ = Sees if kind in TOPS else kind
    if kind in (*HEADS, *TOPS):
        model.__class__ = kind
        model.config.__class__ = type("Own", (type(model.config),), {"model_type": "home_made"})
        bias = torch.linspace(-2, 2, families.VOCABULARY) ** 3
        model.register_buffer("logits_bias", bias)
    return model


class Around(nn.Module):
    """Stands around a module: what goes in and comes out may be changed."""

    def __init__(self, inner: nn.Module, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, *args, **kw):  # type: ignore[no-untyped-def]
        first, *args = args or (kw.pop("hidden_states"),)
        out = self.inner(first if self.before is None else self.before(first), *args, **kw)
        if self.after is None:
            return out
        return (self.after(out[0]), *out[1:]) if isinstance(out, tuple) else self.after(out)


def stack_of(model: Any) -> Any:
    return model.model.language_model


def scaled(factor: float) -> Any:
    return lambda module, args, out: out * factor


def hung(model: Any) -> None:
    """A `generate` of an instance, which rewrites the last token."""
    own = model.generate

    def generate(*args: Any, **kw: Any) -> Any:
        made = own(*args, **kw)
        made[:, -1] = families.FIRST_WORD
        return made

    model.generate = generate


def said_by_two(model: Any) -> None:
    first = nn.Linear(families.WIDTH, families.WIDTH, bias=False).requires_grad_(False)
    model.lm_head = nn.Sequential(first, model.lm_head)


def parametrized(model: Any) -> None:
    for layer in stack_of(model).layers[2:4]:
        nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)


def patched_forward(model: Any) -> None:
    layer = stack_of(model).layers[3]
    own = layer.forward
    layer.forward = lambda h, *args, **kw: own(h, *args, **kw) * 0.7


def put(path: str, make: Any) -> Any:
    """Put something in the place of a module of the stack."""

    def patch(model: Any) -> None:
        where, _, name = path.rpartition(".")
        at = stack_of(model).get_submodule(where)
        setattr(at, name, make(getattr(at, name)))

    return patch


def shared(model: Any) -> None:
    layers = stack_of(model).layers
    layers[3].mlp = layers[1].mlp


def keys_changed(change: Any) -> Any:
    """What an attention has stored is changed behind it, as quantised and pruned caches are."""

    def patch(model: Any) -> None:
        for number, layer in enumerate(stack_of(model).layers):

            def behind(module: Any, args: Any, kw: Any, out: Any, n: int = number) -> None:
                cache = kw.get(CACHE)
                held = None if cache is None else getattr(cache, "layers", [None] * 99)[n]
                if getattr(held, "keys", None) is not None:
                    change(held)

            layer.self_attn.register_forward_hook(behind, with_kwargs=True)

    return patch


def rounded(held: Any) -> None:
    held.keys = (held.keys * 4).round() / 4


def forgotten(held: Any) -> None:
    """All but the first two and the newest twelve."""
    held.keys[:, :, 2:-12] = 0
    held.values[:, :, 2:-12] = 0


def routed(model: Any) -> None:
    """Odd tokens pass a layer by; which they are the embeddings note."""
    stack, noted = stack_of(model), {}
    stack.embed_tokens.register_forward_pre_hook(lambda m, args: noted.update(ids=args[0]))

    def behind(module: Any, args: Any, out: Any) -> Any:
        ids, h = noted.get("ids"), out[0] if isinstance(out, tuple) else out
        if ids is None or ids.shape != h.shape[:2]:
            return out
        made = torch.where((ids % 2 == 1)[..., None], args[0] if args else h, h)
        return (made, *out[1:]) if isinstance(out, tuple) else made

    stack.layers[3].register_forward_hook(behind)


class CalledOtherwise(LlamaDecoderLayer):
    """It does something around its own hooks."""

    def __call__(self, *args, **kw):  # type: ignore[no-untyped-def]
        return super().__call__(*args, **kw) * 0.8


class LooksAtItsCall(LlamaDecoderLayer):
    """It turns all states of a call round by the sign of their sum."""

    def forward(self, hidden_states, *args, **kw):  # type: ignore[no-untyped-def]
        h = super().forward(hidden_states, *args, **kw)
        return h if float(h.sum()) > 0 else h.flip(-1)


class RunsTwice(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kw):  # type: ignore[no-untyped-def]
        h = super().forward(hidden_states, *args, **kw)
        return h + 0.5 * self.mlp(self.post_attention_layernorm(h))


def of_layers(kind: type, *numbers: int) -> Any:
    def patch(model: Any) -> None:
        for number in numbers:
            stack_of(model).layers[number].__class__ = kind

    return patch


def prepared(change: Any) -> Any:
    """What the model prepares for each step is changed."""

    def patch(model: Any) -> None:
        own = type(model)

        def prepare_inputs_for_generation(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            given = own.prepare_inputs_for_generation(self, *args, **kwargs)
            change(given)
            return given

        name = "prepare_inputs_for_generation"
        model.__class__ = type("Prepares", (own,), {name: prepare_inputs_for_generation})

    return patch


def shifted(given: Any) -> None:
    if given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"] + 7 * (given["position_ids"] > 12)


def hidden(given: Any) -> None:
    """Later tokens do not see the third column."""
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() == 2 and given.get("pixel_values") is None:
        given["attention_mask"] = mask.clone()
        given["attention_mask"][:, 2] = 0


def penalised(model: Any) -> None:
    own = type(model)

    def _get_logits_processor(self, *args, **kw):  # type: ignore[no-untyped-def]
        made = own._get_logits_processor(self, *args, **kw)
        made.append(lambda ids, scores: scores.scatter(1, ids[:, -4:], -50.0))
        return made

    model.__class__ = type("Penalises", (own,), {"_get_logits_processor": _get_logits_processor})


STEP: ContextVar[int] = ContextVar("step", default=0)


def in_context(model: Any) -> None:
    """A layer reads what the model left in the thread's context."""

    def note(module: Any, args: Any, kw: Any) -> None:
        STEP.set(0 if kw.get("pixel_values") is not None else STEP.get() + 1)

    model.register_forward_pre_hook(note, with_kwargs=True)
    stack_of(model).layers[2].register_forward_hook(
        lambda module, args, out: out * (1.2 if STEP.get() % 2 else 1)
    )


PATCHES: dict[str, Any] = {
    "keys are rounded in the cache": keys_changed(rounded),
    "old keys are forgotten": keys_changed(forgotten),
    "tokens are routed by their ids": routed,
    "a layer is called otherwise": of_layers(CalledOtherwise, 3),
    "a layer looks at its whole call": of_layers(LooksAtItsCall, 2, 4),
    "a part of a layer runs twice": of_layers(RunsTwice, 3),
    "positions are shifted": prepared(shifted),
    "a column is hidden from the answer": prepared(hidden),
    "the model penalises what it said": penalised,
    "a step in the thread's context": in_context,
    "a hook scales a layer": lambda m: stack_of(m).layers[2].register_forward_hook(scaled(0.8)),
    "a hook before a layer": lambda m: (
        stack_of(m)
        .layers[2]
        .register_forward_pre_hook(lambda module, args: (args[0] * 1.1, *args[1:]))
    ),
    "a hook scales the norm": lambda m: stack_of(m).norm.register_forward_hook(scaled(0.8)),
    "a hook scales the head": lambda m: m.lm_head.register_forward_hook(scaled(0.5)),
    "a hook turns logits": lambda m: m.lm_head.register_forward_hook(lambda *it: it[2].roll(3, -1)),
    "a hook on the embedding": lambda m: stack_of(m).embed_tokens.register_forward_hook(scaled(2)),
    "a hook on an MLP": lambda m: stack_of(m).layers[4].mlp.register_forward_hook(scaled(-1)),
    "a hook on the projector": lambda m: m.model.multi_modal_projector.register_forward_hook(
        scaled(3)
    ),
    "a layer's forward is another": patched_forward,
    "generate is another": hung,
    "two layers have one MLP": shared,
    "a head of two matrices": said_by_two,
    "weights are computed": parametrized,
    "a norm of another kind": put("norm", lambda own: nn.LayerNorm(families.WIDTH)),
    "an MLP behind a layer norm": put(
        "layers.2.mlp", lambda own: nn.Sequential(nn.LayerNorm(families.WIDTH), own)
    ),
    "an MLP by the sign of its input": put("layers.2.mlp", lambda own: Around(own, torch.abs)),
    "a wrapped layer": put("layers.3", lambda own: Around(own, after=lambda h: h * 0.9)),
    "a wrapped attention": put("layers.3.self_attn", lambda own: Around(own, after=torch.sin)),
    "wrapped embeddings": put("embed_tokens", lambda own: Around(own, after=lambda h: h * 1.5)),
}
"""What somebody does to a model of a known family before it is opened."""
