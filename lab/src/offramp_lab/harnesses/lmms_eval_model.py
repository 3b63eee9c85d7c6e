"""`python -m lmms_eval --model offramp --model_args adapter=FOLDER`, by the entry point
`lmms_eval.models`."""

from __future__ import annotations

from typing import Any

from lmms_eval.api.model import lmms

from offramp.core.errors import InputError
from offramp_lab.harnesses.harness import Ask, Harnessed


def manifest() -> Any:
    """Return what the entry point says of the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="offramp", chat_class_path="offramp_lab.harnesses.lmms_eval_model.OfframpLmms"
    )


class OfframpLmms(Harnessed, lmms):
    is_simple = False

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """The answers to requests whose args are a context, a function to messages, options, and
        where the document is."""
        asked = []
        for request in requests:
            _, doc_to_messages, options, doc, task, split = request.args
            messages = doc_to_messages(self.task_dict[task][split][doc])
            asked.append(Ask(*_parts(messages), options))
        results = [None] * len(requests)
        for place, answer in self.harness.answers(asked):
            results[place] = _result(answer.text, answer.tokens)
            context, _, options, *_ = requests[place].args
            self.cache_hook.add_partial("generate_until", (context, options), answer.text)
        return results

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise InputError("Tasks of several rounds are not supported.", "Choose tasks of one round.")


def _parts(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Turns, and the images in them.

    Raises:
        InputError: video or sound.
    """
    turns, images = [], []
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                content.append({"type": "image"})
                images.append(part["url"])
            else:
                raise InputError(
                    f"A task brings {part['type']}, and the model reads text and images.",
                    "Choose tasks of images.",
                )
        turns.append({"role": message["role"], "content": content})
    return turns, images


def _result(text: str, tokens: int) -> Any:
    """With its tokens, where the harness counts them."""
    try:
        from lmms_eval.api.instance import GenerationResult, TokenCounts
    except ImportError:
        return text
    return GenerationResult(text=text, token_counts=TokenCounts(output_tokens=tokens))
