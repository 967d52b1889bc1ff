"""What works here, and which backend takes a tensor."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..packing import STORAGES
from ..rule import ASSIGN, HEAD, Rule
from . import torch_abi
from .checks import is_faking, is_wrapper, warn_once
from .torch_abi import Fields

# Not when the first optimizer needs it: a process may be forked before, which the extension has to
# see (csrc/multi_tensor.h).
_import_error: ImportError | None = None
try:
    from .. import _C
except ImportError as error:
    _import_error = error

BACKENDS = ("triton", "cpp", "reference")
BackendName = Literal["auto", "triton", "cpp", "reference"]


class Backend(NamedTuple):
    """Whether a backend works here.

    Args:
        available: whether it can be used.
        detail: what it runs with, or the reason why it cannot be used.
    """

    available: bool
    detail: str


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled extension, or None and the reason."""
    if _import_error is not None:
        return None, (
            f"the compiled extension cannot be imported ({_import_error}): "
            "reinstall fastopt where there is a C++ compiler, or use a wheel for this Python"
        )
    another = "the compiled extension is of another version of fastopt: reinstall fastopt"
    try:
        if [*_C.head(), *_C.storages(), *_C.torch_fields()] != [*HEAD, *STORAGES, *Fields._fields]:
            return None, another
        if found := torch_abi.find():
            fields, functions = found
            _C.use_torch_fields(fields, *functions)
    except (AttributeError, TypeError):
        return None, another
    try:
        if isa := os.environ.get("FASTOPT_ISA"):
            _C.use_isa(isa)
    except ValueError as error:
        return None, f"FASTOPT_ISA={isa}: {error}"
    return _C, ""


def extension() -> ModuleType | None:
    """The compiled extension, None where there is none."""
    return _load()[0]


@functools.cache
def _load_triton() -> tuple[ModuleType | None, str]:
    """``fastopt.kernels.launches``, or None and the reason."""
    if extension() is None:  # which plans the steps of all backends
        return None, _load()[1]
    try:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
            raise ImportError(f"this is {triton.__version__}")
        from ..kernels import launches
    except Exception as error:  # versions that do not fit torch or Python raise this and that
        return None, f"triton 3.6 or later cannot be imported ({error}): pip install 'triton>=3.6'"
    if launches.INTERPRETED:
        return launches, (
            f"CPU tensors only, because TRITON_INTERPRET=1 is set; triton {triton.__version__}"
        )
    if not torch.cuda.is_available():
        return None, "there is no GPU here, and TRITON_INTERPRET=1 is not set, to do without one"
    return launches, f"GPU tensors; triton {triton.__version__}"


def triton_kernels() -> ModuleType | None:
    """The Triton backend, None where it does not work."""
    return _load_triton()[0]


def backends() -> dict[str, Backend]:
    """What works here: for each backend, whether it is available, and with what or why not."""
    return {name: _backend(name) for name in BACKENDS}


def _backend(name: str) -> Backend:
    if name == "reference":
        return Backend(True, f"tensors of any device; torch {torch.__version__} operators")
    module, detail = _loaded(name)
    if module and name == "cpp":
        detail = f"CPU tensors; {module.isa()}, {torch.get_num_threads()} threads"
        if unknown := module.unknown_torch_fields():
            slow = "slow" if unknown == ["tensors"] else "slower"
            how = f"this torch keeps its {' and '.join(unknown)} in an unknown way"
            detail += f"; {slow} on many tensors: {how}"
    return Backend(module is not None, detail)


def resolve(backend: str, rule: Rule | None = None) -> str:
    """The backend that an optimizer's ``backend`` argument stands for.

    ``"auto"`` stands for the environment variable ``FASTOPT_BACKEND`` where it is set.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend does not work here, or does not have the rule.
    """
    asked = f"backend={backend!r}"
    if backend == "auto" and (from_environment := os.environ.get("FASTOPT_BACKEND")):
        backend = from_environment
        asked = f"FASTOPT_BACKEND={backend}"
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{asked}: the backends are auto, {', '.join(BACKENDS)}")
    if backend != "auto" and not (found := _backend(backend)).available:
        raise RuntimeError(f"{asked} does not work here: {found.detail}")
    if rule is not None and (lacks := _lacks(backend, rule)):
        raise RuntimeError(f"{asked} does not work for {rule.name}: {lacks}")
    return backend


def backend_for(tensors: list[Tensor], backend: str, where: object, rule: Rule = ASSIGN) -> str:
    """The backend that updates a parameter by a rule, given with its gradient and states.

    Raises:
        RuntimeError: ``backend`` was asked for and cannot take these tensors.
    """
    if backend == "reference":
        return backend
    kind = tensors[0].device.type
    wanted = backend if backend != "auto" else {"cuda": "triton", "cpu": "cpp"}.get(kind)
    obstacle = _obstacle(tensors)
    lacks = wanted and _lacks(wanted, rule)
    if not obstacle and not lacks and wanted and kind == _device_of(wanted):
        return wanted
    if backend != "auto":
        obstacle = obstacle or f"is on {tensors[0].device}"
        raise RuntimeError(f"{where} {obstacle}, which {backend=} cannot update: use 'auto'")
    if obstacle and not is_faking():
        warn_once(
            f"fastopt steps a parameter that {obstacle} with its slow reference backend, about a "
            "millisecond each in every step"
        )
    elif not obstacle:
        reason = lacks or (_loaded(wanted)[1] if wanted else "it has no kernels for that device")
        warn_once(f"fastopt steps {kind} parameters with its slow reference backend: {reason}")
    return "reference"


@functools.cache
def _lacks(backend: str, rule: Rule) -> str:
    """Why a backend that works here does not have a rule; "" if it has."""
    module = None if backend in ("auto", "reference") else _loaded(backend)[0]
    if module is None or module.rules().get(rule.name) == (*rule.scalar_names, *rule.states):
        return ""
    where = "the compiled extension" if backend == "cpp" else "fastopt.kernels"
    found = "no rule" if rule.name not in module.rules() else "another rule"
    cure = "use backend='reference', or reinstall fastopt if the rule is one of its own"
    return f"{where} has {found} {rule.name!r}: {cure}"


def _loaded(backend: str) -> tuple[ModuleType | None, str]:
    return _load_triton() if backend == "triton" else _load()


def _device_of(backend: str) -> str:
    """The type of the devices whose memory a backend's kernels read; "" where it does not work."""
    kernels, _ = _loaded(backend)
    if kernels is None:
        return ""
    return "cuda" if backend == "triton" and not kernels.INTERPRETED else "cpu"


def _obstacle(tensors: list[Tensor]) -> str:
    """Why kernels, which need plain memory, cannot take these tensors; "" if they can."""
    for tensor in tensors:
        if is_wrapper(tensor):
            return f"is a {type(tensor).__name__}"
        if tensor.is_neg():
            return "is a lazily negated view"
    return ""
