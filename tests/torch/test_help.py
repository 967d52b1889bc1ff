"""What help() and a type checker tell a user of the optimizers' arguments."""

import ast
import inspect
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

import fastopt

#: A word of each mistake, by its line.
MISTAKES = {7: "max_nrom", 8: "splitt", 9: "4bit", 10: "cuda", 11: '"lr"'}
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
    told = dict(re.findall(r"^    (\w+)(?: \(default (.+?)\))?: \S", cls.__doc__, re.MULTILINE))
    defaults = {name: arg.default for name, arg in inspect.signature(cls).parameters.items()}
    assert told.keys() >= defaults.keys()
    del defaults["params"]
    for name, default in defaults.items():
        if isinstance(default, torch.dtype):
            assert told[name] == str(default)
        else:
            assert ast.literal_eval(told[name]) == default
    extra = told.keys() - defaults.keys() - {"params", "grad_norm"}
    assert extra <= {"ValueError", "TypeError", "NotImplementedError", "RuntimeError"}
    assert "..." not in cls.__doc__
    assert max(map(len, cls.__doc__.splitlines())) <= 100


def test_mypy_sees_mistakes(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER_SCRIPT)
    # What mypy knows of torch takes it long: it is kept beside that of `make lint`.
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", ROOT / ".mypy_cache/user", "user.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    errors = re.findall(r"^user.py:(\d+): error: (.*)", found.stdout, re.MULTILINE)
    assert [int(line) for line, _ in errors] == list(MISTAKES), found.stdout + found.stderr
    for (_, told), mistake in zip(errors, MISTAKES.values(), strict=True):
        assert mistake in told
