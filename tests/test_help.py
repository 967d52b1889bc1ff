"""What help() and a type checker tell a user of the optimizers' arguments."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastopt

USER_SCRIPT = """\
import fastopt
import torch

params = [torch.ones(3)]
fastopt.AdamW(params, max_norm=1.0, master_weights="split", state_dtype="8bit", backend="cpp")
fastopt.AdamW(params, state_dtype=torch.bfloat16, master_weights=None).step()
fastopt.AdamW(params, max_nrom=1.0)
fastopt.SGD(params, master_weights="splitt")
fastopt.RMSprop(params, state_dtype="4bit")
fastopt.Adam(params, backend="cuda")
fastopt.Adagrad(params, lr="0.1")
"""


@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_help_describes_every_argument(cls):
    """With its default, in the constructor's words."""
    described = re.findall(r"^    (\w+)(?: \(default (.+?)\))?: \S", cls.__doc__, re.MULTILINE)
    told = dict(described)
    arguments = inspect.signature(cls).parameters
    assert [name for name in arguments if name not in told] == []
    for name, argument in arguments.items():
        if name == "params":
            continue
        if isinstance(argument.default, torch.dtype):
            assert told[name] == str(argument.default)
        else:
            assert ast.literal_eval(told[name]) == argument.default
    extra = told.keys() - arguments.keys()
    assert extra <= {"grad_norm", "ValueError", "TypeError", "NotImplementedError", "RuntimeError"}
    assert "..." not in cls.__doc__
    assert max(map(len, cls.__doc__.splitlines())) <= 100


def test_mypy_sees_mistakes(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER_SCRIPT)
    # What mypy knows of torch takes it long: it is kept beside that of `make lint`.
    source = Path(fastopt.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", source / ".mypy_cache/user", "user.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(source)},
        capture_output=True,
        text=True,
    )
    errors = [line for line in found.stdout.splitlines() if line.startswith("user.py")]
    mistakes = ("max_nrom", "splitt", "4bit", "cuda", '"lr"')
    assert len(errors) == len(mistakes) + 1, found.stdout + found.stderr  # and a note
    for line, mistake in enumerate(mistakes, start=7):
        (told,) = (error for error in errors if error.startswith(f"user.py:{line}: error: "))
        assert mistake in told
