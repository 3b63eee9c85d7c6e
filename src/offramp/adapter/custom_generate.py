"""The file by which transformers decodes with exits from the hub, without an import of offramp."""

from __future__ import annotations

from pathlib import Path

FOLDER = "custom_generate"
_GENERATE = '''"""Decode with early exits.

model.generate(..., custom_generate={exits!r}, trust_remote_code=True)

The package `offramp` has the decoder; mode="lossless" or "full" and all options of its
`Adapter.generate` can be given.
"""

from weakref import WeakKeyDictionary

EXITS = {exits!r}
_ATTACHED = WeakKeyDictionary()


def generate(model, revision=None, **arguments):
    import offramp
    from offramp.core.errors import AdapterError

    by_revision = _ATTACHED.setdefault(model, {{}})
    if revision not in by_revision:
        try:
            by_revision[revision] = offramp.attach(model, EXITS, revision=revision)
        except AdapterError as error:
            raise AdapterError(
                error.problem,
                "Where a model hands custom_generate to a language model in it, as BLIP-2 does, "
                f"give custom_generate=offramp.attach(model, {{EXITS!r}}).",
            ) from error
    given = {{name: value for name, value in arguments.items() if value is not None}}
    made = by_revision[revision].generate(**given)
    return made if given.get("return_dict_in_generate") else made.sequences.clone()
'''


def write_custom_generate(folder: str | Path, exits: str) -> None:
    """Write `custom_generate/` into an adapter's folder, for an upload.

    folder: the adapter's. exits: hub name or folder of the exits for `custom_generate` to load.
    """
    at = Path(folder) / FOLDER
    at.mkdir()
    (at / "generate.py").write_text(_GENERATE.format(exits=exits), encoding="utf-8")
    (at / "requirements.txt").write_text("offramp\n", encoding="utf-8")
