"""Properties of the reader of GGUF headers: it reads what was written, or says why it does not."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp_llama_cpp.gguf_header import read_header

gguf = pytest.importorskip("gguf")

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12)
LETTERS = st.characters(exclude_categories=["Cs"])
VALUES = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False),
    st.text(LETTERS, min_size=1, max_size=20),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=90),
    st.lists(st.text(LETTERS, max_size=5), min_size=1, max_size=90),
)
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def written(path: Path, said: dict[str, Any], shapes: dict[str, list[int]]) -> bytes:
    adders = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    out = gguf.GGUFWriter(path, "llama")
    for key, value in said.items():
        getattr(out, f"add_{adders[type(value)]}")(f"own.{key}", value)
    for number, (name, shape) in enumerate(shapes.items()):
        out.add_tensor(name, np.full(shape, number, dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path.read_bytes()


@pytest.mark.slow
@FEW
@given(st.dictionaries(NAMES, VALUES, max_size=6), st.dictionaries(NAMES, SHAPES, max_size=5))
def test_what_was_written_is_read(
    tmp_path: Path, said: dict[str, Any], shapes: dict[str, list[int]]
) -> None:
    written(tmp_path / "a.gguf", said, shapes)
    found = read_header(tmp_path / "a.gguf", whole=True)
    assert {key: found.said[f"own.{key}"] for key in said} == said
    assert [*found.tensors] == [*shapes]
    for number, (name, shape) in enumerate(shapes.items()):
        assert found.tensors[name].shape == tuple(reversed(shape))
        assert (found.rows(name).view(np.float32) == number).all()


@FEW
@given(st.data())
def test_of_any_bytes_a_header_is_read_that_fits_the_file_or_an_error_in_words(
    tmp_path: Path, data: st.DataObject
) -> None:
    said = {"a": 3, "b": "text", "c": [1, 2]}
    whole = written(tmp_path / "a.gguf", said, {"x": [2, 3], "y": [4]})
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        few = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
        if data.draw(st.booleans()) and at + 8 <= len(changed):
            changed[at : at + 8] = struct.pack("<Q", data.draw(few))
        else:
            changed[at] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.sampled_from([len(changed), len(changed) - 9, 30]))]
    (tmp_path / "b.gguf").write_bytes(changed)
    try:
        found = read_header(tmp_path / "b.gguf", whole=data.draw(st.booleans()))
    except ValueError:
        return
    spans = []
    for name, place in found.tensors.items():
        rows = found.rows(name)
        assert place.at + rows.nbytes <= len(changed)
        spans.append((place.at, place.at + rows.nbytes))
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
