"""The CMake shim: builds the extension `llmserve._C`. Everything else is in pyproject.toml.

Works the same for `pip install .`, an editable install and a wheel. Objects stay in `build/<python tag>`, so the
second build compiles only what changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """Path of a build tool: beside this interpreter (the pinned one) before the system's."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(name)
    if found is None:
        raise SystemExit(f"llmserve: {name} is not installed; run `pip install {name}` or `make build`")
    return found


class CMakeBuild(build_ext):
    """Configures and builds the target `_C`, then copies it to where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        build_dir = ROOT / "build" / (sys.implementation.cache_tag or "python")
        configure = [
            find_tool("cmake"),
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            "--log-level=WARNING",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("LLMSERVE_CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        jobs = str(len(os.sched_getaffinity(0)))
        subprocess.run([configure[0], "--build", str(build_dir), "--target", "_C", "-j", jobs], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build_dir / "_C.so", target)


class CleanBuild(build):
    """Starts from an empty staging folder: modules deleted from the source must not stay in a wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension("llmserve._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
