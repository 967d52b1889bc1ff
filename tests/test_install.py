"""Which files `import fastopt` finds."""

import shutil
import subprocess
import sys
from pathlib import Path

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
