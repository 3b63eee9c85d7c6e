"""Compiles the C files into the wheel, where the build has a compiler and llama.cpp's headers.

The headers are llama-cpp-python's: `python -m build --no-isolation` sees those of the environment.
Without them the wheel is for any platform, and what it holds is compiled at first use.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).parent
PACKAGE = "offramp_llama_cpp/native"
NATIVE = HERE / "src" / PACKAGE


class CompiledLibraries(BuildHookInterface):  # type: ignore[type-arg]
    """Puts one file for each build of each library into a wheel, which is then for one platform."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        compiler = shlex.split(os.environ.get("CC") or "cc")
        headers = _headers()
        if version == "editable" or shutil.which(compiler[0]) is None or headers is None:
            return
        recipe = runpy.run_path(str(NATIVE / "recipe.py"))
        self.folder = tempfile.mkdtemp()
        for name, builds in recipe["FLAGS"].items():
            read = None if name in recipe["WITHOUT_HEADERS"] else headers
            for flags in builds:
                source = NATIVE / f"{name}.c"
                file = recipe["built"](source, flags, read)
                made = Path(self.folder) / file.name
                options = [*recipe["COMMAND"], f"-I{headers}", "-o", str(made), str(source)]
                if subprocess.run([*compiler, *options, *flags], check=False).returncode == 0:
                    place = f"{PACKAGE}/{recipe['BUILT']}/{file.name}"
                    build_data["force_include"][str(made)] = place
        if build_data["force_include"]:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data.update(pure_python=False, tag=f"py3-none-{platform}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)


def _headers() -> Path | None:
    """The folder of llama.cpp's header files; None where this environment has none."""
    found = importlib.util.find_spec("llama_cpp")
    folder = Path(str(found.origin)).parents[1] / "include" if found else None
    return folder if folder and (folder / "ggml.h").is_file() else None
