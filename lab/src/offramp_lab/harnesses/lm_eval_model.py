"""`lm_eval --model offramp --model_args adapter=FOLDER`: generation tasks, with images or without.

Found by the entry point `lm_eval.models`, which EleutherAI's harness reads in versions after
0.4.13; before, import this module in the process and call `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM

from offramp_lab.harnesses.harness import Ask, Harnessed


class OfframpLM(Harnessed, LM):
    MULTIMODAL = True

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers to requests whose args are a context, options and, with images, a dict of
        them."""
        asked = []
        for request in requests:
            context, options, *more = request.args
            images = more[0].get("visual", []) if more else []
            # the harness's own placeholder
            context = context.replace("<image>", self.harness.encoder.image_mark or "")
            asked.append(Ask(context, images, options))
        texts = [""] * len(requests)
        for place, answer in self.harness.answers(asked):
            texts[place] = answer.text
            self.cache_hook.add_partial("generate_until", requests[place].args[:2], answer.text)
        return texts

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        self.loglikelihood(requests)
        return []

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(getattr(self.harness.encoder.processor, "chat_template", None) or "")

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The harness's turns as one prompt. add_generation_prompt: False: the last turn is the
        answer's beginning, which the model goes on with."""
        turns = [
            {
                "role": turn["role"],
                "content": [{"type": "text", "text": turn["content"]}]
                if isinstance(turn["content"], str)
                else turn["content"],
            }
            for turn in chat_history
        ]
        return self.harness.encoder.conversation_text(
            turns, add_generation_prompt=add_generation_prompt
        )
