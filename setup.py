"""Compile native kernels into the package, if the variable SPHEREHEAD_BUILD_NATIVE asks for it; see docs/native.md."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("SPHEREHEAD_BUILD_NATIVE") or "0"
if MODE not in ("0", "1"):
    raise SystemExit(f"SPHEREHEAD_BUILD_NATIVE: expected 0 or 1, came {MODE!r}")


class BuildNative(build_py):
    """Build libraries after the Python files were copied."""

    def run(self) -> None:
        """Run the command."""
        super().run()
        if MODE == "1":
            package = ROOT if self.editable_mode else Path(self.build_lib).resolve()
            # pip hides the environment's packages from builds by a variable, and -E shows them again: the kernels have
            # to be built with the PyTorch that they will run with, not with one that was fetched for the build.
            sight = [] if importlib.util.find_spec("torch") else ["-E"]
            folder = package / "torch_utils" / "ops" / "lib"
            command = [sys.executable, *sight, "-m", "torch_utils.native", "ahead", "--folder", str(folder)]
            if subprocess.run([sys.executable, *sight, "-c", "import torch"], cwd=ROOT).returncode != 0:
                raise SystemExit("SPHEREHEAD_BUILD_NATIVE=1: expected PyTorch in the environment; install it first")
            if subprocess.run(command, cwd=ROOT).returncode != 0:
                raise SystemExit("SPHEREHEAD_BUILD_NATIVE=1: the native kernels cannot be built (see above)")


class PlatformWheel(bdist_wheel):
    """Name the platform in the wheel, but no version of Python, because the libraries know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags (Python, ABI, platform)."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if MODE == "1" else (python, abi, platform)


class PlatformDistribution(Distribution):
    """Hold files of one platform if native kernels are built."""

    def has_ext_modules(self) -> bool:
        """Return whether the distribution belongs to one platform."""
        return MODE == "1" or super().has_ext_modules()


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildNative, "bdist_wheel": PlatformWheel})
