"""What a release needs: a changelog that describes it, and one address of the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CHANGELOG.md").read_text("utf-8")
HEADING = re.compile(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", re.MULTILINE)


def git(*words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=ROOT, check=False, capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []


def test_the_changelog_has_a_section_with_a_date_for_every_version() -> None:
    names = re.findall(r"^## .*$", TEXT, re.MULTILINE)
    found = [match.groups() for match in HEADING.finditer(TEXT)]
    assert len(found) == len(names) and found[0] == ("Unreleased", None)
    assert all(date for _, date in found[1:])
    numbers = [tuple(map(int, version.split("."))) for version, _ in found[1:]]
    assert numbers == sorted(numbers, reverse=True) and (0, 1, 0) in numbers
    assert {tag.removeprefix("v") for tag in git("tag", "--list", "v*")} <= dict(found).keys()


def notes(version: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("no make")
    return subprocess.run(
        ["make", "-s", "notes", f"VERSION={version}"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )


def test_the_notes_of_a_release_are_its_section() -> None:
    done = notes("0.1.0")
    assert done.returncode == 0
    assert len(HEADING.findall(done.stdout)) == 1 and done.stdout.startswith("## [0.1.0]")
    assert "### Added" in done.stdout and done.stdout.strip() in TEXT
    assert notes("9.9.9").returncode != 0


def test_the_repository_has_one_address_or_none() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    site = re.search(r"^repo_url: (\S+)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    addresses = {
        project["urls"].get("Repository"),
        citation.get("repository-code"),
        site and site[1],
    }
    assert len(addresses) == 1


def test_mike_serves_versions() -> None:
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert "provider: mike" in config and "mike" in (ROOT / "Makefile").read_text("utf-8")
