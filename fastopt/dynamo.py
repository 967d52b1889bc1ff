"""torch.compile: what is called from compiled code, and never traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """Keeps a function, and all that it calls, out of the graphs of torch.compile.

    What `torch.compiler.disable` does, but with marks on the function itself in place of a function
    around it, which would cost each call some microseconds and each process torch's compiler.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]  # a call ends the graph,
    try:  # and what is called then runs as it is
        skip = eval_frame._FrameExecStrategy(*[eval_frame._FrameAction.SKIP] * 2)
        eval_frame.set_code_exec_strategy(function.__code__, skip)
    except (AttributeError, TypeError):
        pass  # another torch, which traces what is called: slow to compile, but right
    return function
