"""The VLMs that are known by a short name: two tiny ones of drawn shapes, which ship with the
package, and two of photographs, each of which is built once."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.core.errors import AdapterError, InputError, did_you_mean
from offramp.core.plugins import plugin

if TYPE_CHECKING:
    import torch

    from offramp.core.models.backbone import Backbone  # names of models need no PyTorch

TINY = ("opt", "t5")
PHOTO, PHOTO_CHAT = "offramp/photo", "offramp/photo-chat"
"""The names in adapters of the photo model, which writes captions, and of the one that answers
questions; "photo" and "photo-chat" for short. Both need the extra photo."""
PHOTOS = {"photo": PHOTO, "photo-chat": PHOTO_CHAT}
KNOWS = {
    "offramp/tiny-opt": "drawn shapes, and nothing else",
    "offramp/tiny-t5": "drawn shapes, and nothing else",
    PHOTO: "photographs of people and dogs outdoors, and rooms a little",
    PHOTO_CHAT: "photographs of people and dogs outdoors, and rooms a little",
}
"""By a backbone's name, what it was trained on: what else it is shown it answers all the same."""


def short_name(name: str) -> str:
    """Return a tiny model's name without its prefix: "opt" for "tiny-opt"."""
    return name.removeprefix("offramp/").removeprefix("tiny-")


def tiny_kind(name: str) -> str | None:
    """Return the kind of a tiny model's name, such as "opt" for "tiny-opt"; None for other
    names."""
    kind = short_name(name)
    return kind if kind in TINY and kind != name else None


def photo_kind(name: str) -> str | None:
    """Return the short name of a model of photographs, such as "photo" for "offramp/photo"; None
    for other names, and for a folder of that name."""
    kind = name.removeprefix("offramp/")
    return kind if kind in PHOTOS and not os.path.isdir(name) else None


def _photo() -> Any:
    """The module that loads the models of photographs and knows their files."""
    return plugin("models", "photo")


def close_shipped(name: str) -> str:
    """Return a question with the shipped model that a misspelt name may mean; "" for none, or for a
    name that is right."""
    known = (*PHOTOS, *(f"tiny-{kind}" for kind in TINY))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    misspelt = close and name not in close and not os.path.exists(name)
    return f"Did you mean {close[0]!r}? " if misspelt else ""


def check_spelling(name: str) -> None:
    """Raise `InputError` for a name that is nearly a shipped model's."""
    if close := close_shipped(name):
        raise InputError(f"No model {name!r} ships with offramp.", close)


def tiny_folder(kind: str) -> Path:
    """Return the folder of a shipped model, for plain `from_pretrained`. Raise `InputError` if
    unknown.

    kind: "opt" or "t5", or "tiny-opt" or "tiny-t5" as on the command line.
    """
    kind = short_name(kind)
    if kind not in TINY:
        raise InputError(f"No tiny model {kind!r} ships with offramp.", did_you_mean(kind, TINY))
    return Path(__file__).parent / "shipped_models" / kind


def load_tiny(
    kind: str, dtype: torch.dtype | str = "float32", device: str | None = None
) -> tuple[Backbone, Any]:
    """Load a shipped model, "opt" or "t5", and its processor."""
    from offramp.core.models.backbone import Backbone
    from offramp.core.models.hub import load_processor

    kind, folder = short_name(kind), tiny_folder(kind)
    backbone = Backbone.from_pretrained(folder, dtype=dtype, device=device)
    backbone.name = f"offramp/tiny-{kind}"
    return backbone, load_processor(folder)


def load_named(
    name: str, *, revision: str | None = None, dtype: str = "auto", device: str | None = None
) -> tuple[Backbone, Any]:
    """Load a model and its processor by name.

    name: a shipped model's name, a hub name or a folder. dtype: torch's name of a precision, or
    "auto": as saved, but float32 for shipped models.

    Raises:
        InputError: a revision of a shipped model; or as of `Backbone.from_pretrained`, or, for a
            model of photographs, of `offramp_photo.load`.
    """
    if not name.strip():
        raise InputError(
            "The backbone's name is empty.", "Give a hub name or a folder, or tiny-opt or tiny-t5."
        )
    import torch

    from offramp.core.models.backbone import Backbone
    from offramp.core.models.hub import load_processor

    exact: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    kind, photo = tiny_kind(name), photo_kind(name)
    if kind is None and photo is None:
        check_spelling(name)
        backbone = Backbone.from_pretrained(name, revision=revision, dtype=exact, device=device)
        return backbone, load_processor(name, revision=revision)
    if revision is not None:
        raise InputError(
            f"{name} ships with offramp and has no revision {revision!r}.",
            "Leave the revision out.",
        )
    if dtype == "auto":
        exact = torch.float32
    if photo is None:
        return load_tiny(name, exact, device)
    backbone, processor = _photo().load(photo, dtype=exact, device=device)
    backbone.name = PHOTOS[photo]
    return backbone, processor


def exits_folder(name: str | Path, **hub: Any) -> Path:
    """Return an adapter's folder: of a shipped model, on this machine, or downloaded from the hub.

    hub: revision, token, cache_dir and others of `snapshot_download`.

    Raises:
        InputError: as of `shipped_exits`.
        AdapterError: there is no such folder, or the hub gave none.
    """
    if (shipped := shipped_exits(str(name))) is not None:
        return shipped
    if os.path.isdir(name):
        return Path(name)
    from offramp.common.names import close_name, is_hub_name

    if not is_hub_name(str(name)):
        raise AdapterError(
            f"There is no adapter folder {str(name)!r}.",
            f"{close_name(name) or close_shipped(str(name))}Give a folder of `offramp train`, a "
            "name of the hub as OWNER/NAME, or photo, photo-chat or tiny-opt, which ship.",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), **hub))
    except Exception as error:  # offline, missing, private: hub errors share no useful base
        raise AdapterError(
            f"No adapter folder {str(name)!r}, and the hub gave none: {error}",
            "Correct the path or the name, or be online.",
        ) from error


def shipped_exits(name: str) -> Path | None:
    """Return the folder of the shipped exits with a short name, such as "photo"; None for other
    names.

    Raises:
        InputError: the package of the models of photographs is not installed, or the model ships
            without exits.
    """
    if (photo := photo_kind(name)) is not None:
        folder: Path = _photo().exits_folder(photo)
        if not folder.is_dir():
            raise InputError(
                f"{photo} ships without exits.",
                f"Train some: offramp train {photo} --data photos --depths 8 --out exits.",
            )
        return folder
    kind = None if os.path.isdir(name) else tiny_kind(name)
    return None if kind is None else tiny_exits(kind)


def example_picture(name: str) -> Path:
    """Return a picture to try a backbone on: a photograph for models of photographs, else a drawn
    scene."""
    if name not in PHOTOS.values():
        return Path(__file__).parent / "shipped_models" / "scene.png"
    picture: Path = _photo().example_picture()
    return picture


def tiny_exits(kind: str) -> Path:
    """Return the folder of a tiny model's shipped exits, calibrated as by `offramp demo`, for
    `Adapter.from_pretrained`. Raise `InputError` if none ship."""
    kind = short_name(kind)
    folder = tiny_folder(kind).with_name(f"{kind}_exits")
    if not folder.is_dir():
        raise InputError(
            f"No exits for the tiny model {kind!r} ship with offramp.",
            f"Train them in a few minutes: offramp demo {kind}.",
        )
    return folder
