"""A server that speaks as vLLM's does with exits, and answers by offramp itself.

python vllm_stand_in.py -P -m MODULE --config FILE
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template
from PIL import Image

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import GREEDY, answers_of
from offramp.adapter.shipped import load_tiny
from offramp.core.decoding.policy import FULL
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example

SETTINGS = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
BACKBONE, PROCESSOR = load_tiny("opt")
ENCODER = InputProcessor(BACKBONE, PROCESSOR)
EXITS = json.loads(SETTINGS["additional-config"])["offramp"]["exits"]
ADAPTER = Adapter.from_pretrained(BACKBONE, EXITS)
ONE = threading.Lock()
OFF = Path(os.environ["OFFRAMP_VLLM_PYTHON"]).with_name("off")
"""Where it exists, the check at start found other answers."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        on = not OFF.exists()
        self._tell(200, f'offramp:checked{{reason="{"" if on else "too few"}"}} {int(on)}.0\n')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {SETTINGS['api-key'][0]}":
            self._say(401, {"error": "no key"})
            return
        with ONE:
            self._say(200, answer(body) if "messages" in body else {})

    def _say(self, code: int, said: Any) -> None:
        self._tell(code, json.dumps(said))

    def _tell(self, code: int, text: str) -> None:
        told = text.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *told: Any) -> None:
        pass


def answer(body: Any) -> Any:
    picture, text = body["messages"][0]["content"]
    code = picture["image_url"]["url"].partition("base64,")[2]
    image = Image.open(io.BytesIO(base64.b64decode(code)))
    inputs = ENCODER.prompts([Example(image, text["text"], (), key="asked")])
    asked = body["vllm_xargs"]
    policy = FULL
    if "offramp_trust" in asked:
        policy = replace(ADAPTER.policy, thresholds={}, trust=asked["offramp_trust"])
    elif asked.get("offramp_mode") == "lossless":
        policy = replace(ADAPTER.policy, lossless=True)
    elif "offramp_threshold" in asked:
        level = asked["offramp_threshold"]
        policy = ADAPTER.policy.moved(dict.fromkeys(ADAPTER.exits.depths, level))
    made = ADAPTER.generate(inputs, policy=policy, max_new_tokens=body["max_tokens"], **GREEDY)
    [one] = answers_of(made, ENCODER)
    logs = [float(torch.tensor(score).log()) for score in one.scores]
    choice = {
        "token_ids": one.ids,
        "offramp": {
            "depths": one.depths,
            "offers": [{"trust": trust, "tokens": ids} for trust, ids in one.offers],
        },
        "logprobs": {"content": [{"logprob": log} for log in logs]},
    }
    template = Template(Path(SETTINGS["chat-template"]).read_text())
    prompt = template.render(messages=body["messages"])
    ids = ENCODER.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return {"prompt_token_ids": ids, "choices": [choice]}


if __name__ == "__main__":
    ThreadingHTTPServer((SETTINGS["host"], SETTINGS["port"]), Handler).serve_forever()
