"""Which files `import fastopt` finds."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fastopt

REPOSITORY = Path(fastopt.__file__).parents[1]
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
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, symlinks=True)
    package, kernels = files_found(tmp_path)
    assert package == tmp_path / "fastopt/__init__.py"
    assert kernels == tmp_path / "kernels/__init__.py"


def compiled(clone: Path, **environment: str) -> list[str]:
    """The sources that a build compiles."""
    found = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=clone,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(re.findall(r"-c (csrc/\w+\.cpp)", found.stdout))


def test_a_build_compiles_what_changed(tmp_path):
    pytest.importorskip("pybind11")
    scripts = sysconfig.get_path("scripts")
    if shutil.which("ninja", path=os.pathsep.join([scripts, os.environ["PATH"]])) is None:
        pytest.skip("needs ninja")
    clone = tmp_path / "a clone"
    header, kernels, plan = (
        clone / "csrc" / name for name in ("rules/sgd.h", "kernels.cpp", "plan.cpp")
    )
    header.parent.mkdir(parents=True)
    header.touch()
    kernels.write_text('#include "rules/sgd.h"')
    plan.touch()
    (clone / "fastopt").mkdir()
    shutil.copy(REPOSITORY / "setup.py", clone)
    assert compiled(clone) == ["csrc/kernels.cpp", "csrc/plan.cpp"]
    assert compiled(clone) == []
    header.write_text("int sgd();")
    assert compiled(clone) == ["csrc/kernels.cpp"]
    assert compiled(clone, CXXFLAGS="-DCHANGED") == ["csrc/kernels.cpp", "csrc/plan.cpp"]
    plan.unlink()
    header.unlink()
    kernels.write_text("int left() { return 1; }")
    assert compiled(clone, CXXFLAGS="-DCHANGED") == ["csrc/kernels.cpp"]
    (extension,) = (clone / "fastopt").iterdir()
    assert extension.name.startswith("_C.")
