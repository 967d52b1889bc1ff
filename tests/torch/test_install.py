"""Which files `import fastopt` finds, and which of its sources a build compiles."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers import ROOT

import fastopt

NAMES_FILES = "import fastopt, fastopt.kernels as k; print(fastopt.__file__, k.__file__)"


def files_found(folder: Path) -> list[Path]:
    found = subprocess.run(
        [sys.executable, "-c", NAMES_FILES], cwd=folder, capture_output=True, text=True, check=True
    )
    return [Path(name).resolve() for name in found.stdout.split()]


def test_a_script_beside_a_clone(tmp_path):
    """A folder named fastopt, without an __init__.py, is no package."""
    (tmp_path / "fastopt").mkdir()
    assert files_found(tmp_path)[0] == Path(fastopt.__file__).resolve()


def test_a_second_clone_runs_its_own_kernels(tmp_path):
    for folder in ("fastopt", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True)
    package, kernels = files_found(tmp_path)
    assert package == tmp_path / "fastopt/__init__.py"
    assert kernels == tmp_path / "kernels/__init__.py"


def compiled(clone: Path, **environment: str) -> list[str]:
    """The sources that a build compiles."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, **environment}
    built = subprocess.run(command, cwd=clone, env=environment, capture_output=True, check=True)
    return sorted(re.findall(r"-c csrc/(\w+)\.cpp", built.stdout.decode()))


def test_a_build_compiles_what_changed(tmp_path):
    pytest.importorskip("pybind11")
    scripts = sysconfig.get_path("scripts")
    if shutil.which("ninja", path=os.pathsep.join([scripts, *os.get_exec_path()])) is None:
        pytest.skip("needs ninja")
    sources = tmp_path / "a clone/csrc"
    header, kernels, plan = map(sources.joinpath, ("rules/sgd.h", "kernels.cpp", "plan.cpp"))
    header.parent.mkdir(parents=True)
    header.touch()
    kernels.write_text('#include "rules/sgd.h"')
    plan.touch()
    clone = sources.parent
    (clone / "fastopt").mkdir()
    shutil.copy(ROOT / "setup.py", clone)
    assert compiled(clone) == ["kernels", "plan"]
    assert compiled(clone) == []
    header.write_text("int sgd();")
    assert compiled(clone) == ["kernels"]
    assert compiled(clone, CXXFLAGS="-DCHANGED") == ["kernels", "plan"]
    header.unlink()
    kernels.write_text("int without() { return 1; }")
    assert compiled(clone, CXXFLAGS="-DCHANGED") == ["kernels"]
    assert [file.stem.split(".")[0] for file in (clone / "fastopt").iterdir()] == ["_C"]
