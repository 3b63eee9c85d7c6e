"""The check at start: answers that `offramp.generate` wrote, written again by the engine as it will
serve. Where they differ, every token runs to full depth, and the log says so."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

from offramp_vllm import tell
from offramp_vllm.adapter import Checked, Exported
from offramp_vllm.policy import FULL, MODE, THRESHOLD
from offramp_vllm.refuse import WITHOUT, Refused

log = logging.getLogger("vllm.offramp")
HALF = 0.5
"""Share of an answer's tokens that must be the stored ones up to the first that differs, and of
their depths, where numbers are rounded otherwise than they were for the stored answers; in float32
all must be."""
Answer = tuple[Sequence[int], Sequence[int]]
Make = Callable[[Mapping[str, Any]], Any]


def check(core: Any, exported: Exported) -> None:
    """Compare, switch exits off where it fails, and tell. core: vLLM's EngineCore, before it takes
    requests.

    Raises:
        Refused: at full depth, too, the answers are not the model's own.
    """
    config = core.vllm_config.model_config
    own = config.quantization is not None
    exact = exported.dtype == "float32" == str(config.dtype)[6:] and not own
    asked = list(_requests(core, exported))
    shares = {"tokens": 0.0, "depths": 0.0, "full": 0.0}
    if asked:
        shares = _shares(core, asked, exported.rule.early, exact=exact, own=own)
        if shares["full"] < (1.0 if exact else HALF / 2):
            raise Refused(
                f"At full depth {shares['full']:.0%} of the stored answers' tokens are the model's "
                f"own while exits stand beside it, of {config.model}.",
                WITHOUT,
            )
    least = 1.0 if exact else HALF
    good = shares["tokens"] >= least and shares["depths"] >= least
    if not asked:
        why = "no answer could be checked"
    elif good:
        why = ""
    else:
        why = "answers differ from the stored ones"
    words = f"{shares['tokens']:.0%} of tokens and {shares['depths']:.0%} of their depths"
    if good:
        whose = "the same alone and together" if own else "the stored ones"
        log.info("Exits checked on %d answers: %s are %s.", len(asked), words, whose)
    else:
        core.model_executor.collective_rpc("offramp_switch", args=(False,))
        log.warning(
            "Early exits are OFF: %s (%s the same, %.0f%% needed). All tokens run at full depth.\n"
            "Serve the model that the exits in %s were trained for, or export them again.",
            why,
            words,
            100 * least,
            exported.folder,
        )
    _say(core, {"on": good, "reason": why, **{n: f"{s:.3f}" for n, s in shares.items()}})


def _shares(
    core: Any,
    asked: Sequence[tuple[Checked, Make]],
    early: Mapping[str, Any],
    *,
    exact: bool,
    own: bool,
) -> dict[str, float]:
    """The shares of tokens, of their depths, and of full depth's tokens that are the stored ones:
    of the worst answer, or in the mean where numbers are rounded otherwise.

    early: what a request for the stored early answers says. own: the weights are other numbers than
    those of the stored answers, so the engine's answers are held to its own: together to alone, and
    exits that let nothing leave to full depth.
    """
    alone = [_answers(core, [one], early)[0] for one in asked]
    together, full = _answers(core, asked, early), _answers(core, asked, {MODE: FULL})
    stored = [(one.tokens, one.depths) for one, _ in asked]
    whole = [(one.full, ()) for one, _ in asked]
    if own:
        stored, whole = alone, _answers(core, asked, {THRESHOLD: 1.0})
    core.reset_prefix_cache()
    core.reset_mm_cache()
    tokens, depths = [], []
    for (want, at), (said, told) in zip([*stored, *stored], [*alone, *together], strict=True):
        same = _same(want, said)
        tokens.append(same / len(want))
        pairs = list(zip(at, told, strict=False))[: max(1, same)]
        depths.append(sum(a == b for a, b in pairs) / max(1, len(pairs)))
    deep = [_same(w, s) / min(len(w), len(s)) for (w, _), (s, _) in zip(whole, full, strict=True)]
    found = min if exact else _mean
    return {"tokens": found(tokens), "depths": found(depths), "full": found(deep)}


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares)


def _same(stored: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens are the stored ones up to the first that differs."""
    for place, pair in enumerate(zip(stored, tokens, strict=False)):
        if pair[0] != pair[1]:
            return place
    return min(len(stored), len(tokens))


def _requests(core: Any, exported: Exported) -> Iterator[tuple[Checked, Make]]:
    """What is checked, with what makes a request of it in a mode."""
    pictures = [one for one in exported.checked if one.image is not None]
    looks = _looks(core, exported, pictures) if pictures else []
    seen = iter(looks)
    for place, one in enumerate(exported.checked):
        look = None if one.image is None else next(seen, None)
        if one.image is None or look is not None:
            yield one, _maker(one, place, look)


def _looks(core: Any, exported: Exported, pictures: Sequence[Checked]) -> list[Any]:
    """Requests about pictures, as vLLM's own processor makes them; none where it cannot."""
    from PIL import Image
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm import SamplingParams

    made = []
    try:
        processor = InputProcessor(core.vllm_config)
        for one in pictures:
            picture = Image.open(exported.folder / str(one.image)).convert("RGB")
            prompt = {"prompt_token_ids": [*one.prompt], "multi_modal_data": {"image": picture}}
            made.append(processor.process_inputs("0", prompt, SamplingParams(), ("generate",)))
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        log.warning("Answers about pictures are not checked: %s", why)
        return []
    return made


def _maker(one: Checked, place: int, look: Any) -> Make:
    def make(extra: Mapping[str, Any]) -> Any:
        from vllm.v1.engine import EngineCoreRequest

        from vllm import SamplingParams

        new = len(one.full if FULL in extra.values() else one.tokens)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            extra_args=dict(extra),
        )
        return EngineCoreRequest(
            request_id=f"offramp-check-{uuid4().hex}",
            prompt_token_ids=list(one.prompt if look is None else look.prompt_token_ids),
            mm_features=None if look is None else look.mm_features,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=f"offramp-check-{place}",
            data_parallel_rank=None,
        )

    return make


def _answers(
    core: Any, asked: Sequence[tuple[Checked, Make]], extra: Mapping[str, Any]
) -> list[Answer]:
    """Tokens and depths of each prompt's greedy answer, all at once. extra: of the requests."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for _, make in asked:
        request = make(extra)
        found[request.request_id] = [], []
        core.add_request(*core.preprocess_add_request(request))
    while core.scheduler.has_unfinished_requests():
        outputs, ran = core.step()
        core.post_step(ran)
        for client in outputs.values():
            for output in client.outputs:
                tokens, depths = found[output.request_id]
                tokens += output.new_token_ids
                depths += (output.kv_transfer_params or {}).get(tell.KEY, {}).get("depths", [])
    core.step()  # the last finished requests leave the batch
    return list(found.values())


def _say(core: Any, found: dict[str, Any]) -> None:
    """Tell the processes that show metrics: each client of the engine, or this one."""
    queue, clients = getattr(core, "output_queue", None), getattr(core, "addresses", None)
    if queue is None or clients is None:
        tell.show_checked(found)
        return
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    for client in range(len(clients.outputs)):
        told = EngineCoreOutput(
            request_id="offramp-check", new_token_ids=[], kv_transfer_params={tell.CHECKED: found}
        )
        queue.put_nowait((client, EngineCoreOutputs(outputs=[told])))
