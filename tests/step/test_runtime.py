"""The process around the kernels: OpenMP, fork, instruction sets, what is reported."""

import os
import runpy
import subprocess
import sys

import pytest
import torch
from helpers import CASES, ISAS, assert_same_bits

import fastopt
from fastopt.packing import STORAGES
from fastopt.rule import HEAD
from fastopt.rules import RULES
from fastopt.step import dispatch, torch_abi

_C = dispatch.extension()

PRELUDE = f"""
import fastopt, torch
import {dispatch.__name__} as dispatch, {torch_abi.__name__} as torch_abi
"""


def run_python(code, prelude=PRELUDE):
    """In a process of its own, without an error: the lines that it prints."""
    command = [sys.executable, "-c", prelude + code]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, (found.returncode, found.stderr[-2000:])
    return found.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_threads():
    """As many as torch's, of one OpenMP runtime: two would each start their own."""
    lines = run_python("""
import os, re
for threads in (1, 3):
    torch.set_num_threads(threads)
    p = torch.nn.Parameter(torch.empty(1 << 20))
    p.grad = torch.ones(1).expand(1 << 20)  # which takes torch no thread
    before = len(os.listdir('/proc/self/task'))
    fastopt.AdamW([p], max_norm=1.0).step()
    print(len(os.listdir('/proc/self/task')) - before)
maps = open('/proc/self/maps').read()
assert '_C.' in maps
print(len({*re.findall(r'\\S*lib(?:gomp|omp|iomp5)\\S*', maps)}))
""")
    assert lines == ["0", "2", "1"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("steps", [0, 1])
def test_step_after_fork(steps):
    """libgomp would hang in a child of a process that has used it; the parent's may be torch's."""
    run_python(f"""
import os, signal
torch.set_num_threads(2)
p = torch.zeros(1 << 18).requires_grad_()
p.grad = torch.ones(1 << 18)
torch.zeros(1 << 20).add_(1).exp_()
if {steps}:
    o = fastopt.SGD([p], lr=1.0, max_norm=1e9)
    o.step()
child = os.fork()
signal.alarm(30)
if not {steps}:
    o = fastopt.SGD([p], lr=1.0, max_norm=1e9)
o.step()
assert p.tolist() == [-1 - {steps}] * (1 << 18)
if not child:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""")


@pytest.mark.parametrize("flushes", [True, False])
def test_the_callers_floating_point_mode(flushes):
    """Denormal numbers are flushed in all threads or in none, and no worker's mode is changed."""
    param, *grads = (torch.full((300_000,), x) for x in (1e-39, 3e-40, 2e-39))  # several tasks

    def workers_flush():
        return bool((param * 1.0 == 0).any())

    def stepped(threads):
        torch.set_num_threads(threads)
        assert not workers_flush()  # who are there now: new ones inherit the caller's mode
        if not torch.set_flush_denormal(flushes) and flushes:
            pytest.skip("this processor cannot flush denormal numbers")
        p = param.clone().requires_grad_()
        optimizer = fastopt.SGD([p], lr=0.5, momentum=0.9, max_norm=1.0, backend="cpp")
        for p.grad in grads:
            optimizer.step()
        torch.set_flush_denormal(False)
        assert not workers_flush()
        return [p.detach(), optimizer.state[p]["momentum_buffer"], optimizer.grad_norm]

    before = torch.get_num_threads()
    try:
        wanted, *others = map(stepped, (1, 2, 3, 8))
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert bool((wanted[0] == 0).all()) == flushes
    for found in others:
        assert_same_bits(found, wanted)


def test_forced_instruction_set():
    *found, wrong = run_python(f"""
import os
for isa in {[*ISAS, "mmx"]}:
    os.environ["FASTOPT_ISA"] = isa
    dispatch._load.cache_clear()
    print(fastopt.backends()["cpp"])
""")
    for isa, line in zip(ISAS, found, strict=True):
        assert f"available=True, detail='CPU tensors; {isa}, " in line
    assert "available=False" in wrong
    assert "FASTOPT_ISA=mmx: instruction set mmx is not one of those that work here: bas" in wrong


def test_report(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastopt"])
    runpy.run_module("fastopt", run_name="__main__")
    first, triton, cpp, reference = capsys.readouterr().out.splitlines()
    assert first.startswith(f"fastopt {fastopt.__version__}, torch {torch.__version__}, Python ")
    assert triton.split()[0] == "triton"
    assert cpp.split()[:2] == ["cpp", "yes"]
    assert f"{torch.get_num_threads()} threads" in cpp
    assert reference.split()[:2] == ["reference", "yes"]


def test_table_and_extension_agree():
    compiled = _C.rules()
    assert compiled.pop("assign") == ()
    assert compiled == {rule.name: (*rule.scalar_names, *rule.states) for rule in RULES.values()}
    for cls, variant in CASES:  # every set of states has a kernel
        names = cls.rule.states_of({**cls([torch.zeros(1)]).defaults, **variant})
        assert _C.rule_index(cls.rule.name, " ".join(names)) >= 0
    assert (tuple(_C.head()), tuple(_C.storages())) == (HEAD, STORAGES)


def test_an_extension_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(_C, "head", lambda: ["coef", "max_norm"])
    module, reason = dispatch._load.__wrapped__()
    assert module is None
    assert "another version of fastopt" in reason


def test_without_the_extension():
    """The reference steps, and warns once."""
    detail, error, warning, param = run_python(
        """
import warnings
p = torch.nn.Parameter(torch.zeros(1))
p.grad = torch.ones(1)
print(fastopt.backends()["cpp"])
try:
    fastopt.SGD([p], backend="cpp")
except RuntimeError as error:
    print(error)
optimizer = fastopt.SGD([p], lr=1.0)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    optimizer.step()
    optimizer.step()
print(*(w.message for w in warned))
print(p.item())
""",
        prelude="import sys; sys.modules['fastopt._C'] = None; import fastopt, torch",
    )
    reason = "the compiled extension cannot be"
    assert detail.startswith(f"Backend(available=False, detail='{reason}")
    assert error.startswith(f"backend='cpp' does not work here: {reason}")
    assert f"slow reference backend: {reason}" in warning
    assert warning.count("slow") == 1
    assert param == "-2.0"


def test_fields_of_torch_that_are_wrong_or_not_found():
    """Of another torch: steps are planned anew, to the same effect, and the report says so."""
    lines = run_python("""
def steps():
    for cls in fastopt.OPTIMIZERS:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((100,), (), (0,), (2, 2))]
        o = cls(params, max_norm=1.0)
        plans = []
        for step in range(5):  # with fresh gradients, and not everywhere
            for i, p in enumerate(params):
                p.grad = None if (step, i) == (3, 1) else torch.randn(p.shape)
            o.step()
            plans.append(o._plan)
        kept = o._plan is not None and all(plan is o._plan for plan in plans)
        print(kept, *(p.double().sum().item() for p in params))
find, dispatch.torch_abi.find = torch_abi.find, lambda: None
steps()
dispatch.torch_abi.find = find
search = torch_abi._search
optional = sum(torch_abi.OPTIONAL, ())
needed = [name for name in torch_abi.Fields._fields if name not in optional]
for names in (*((name,) for name in needed), *torch_abi.OPTIONAL, ()):
    torch_abi._search = lambda t: (f := search(t))._replace(
        **{name: getattr(f, name) + 8 for name in names}
    )
    dispatch._load.cache_clear()
    print(dispatch.extension().unknown_torch_fields(), fastopt.backends()["cpp"].detail)
steps()
""")
    n = len(fastopt.OPTIMIZERS)
    slow, (*wrong, no_grads, no_versions, no_objects, right), fast = (
        lines[:n],
        lines[n:-n],
        lines[-n:],
    )
    assert all(line.startswith("True") for line in fast)
    assert slow == [line.replace("True", "False") for line in fast]
    assert len(wrong) == 11
    assert all(line.startswith("['tensors'] CPU tensors") for line in wrong)
    assert all("; slow on many tensors: this torch keeps its tensors" in line for line in wrong)
    assert no_grads.startswith("['gradients'] CPU tensors")
    assert "; slower on many tensors: this torch keeps its gradients in" in no_grads
    assert no_versions.startswith("['versions'] CPU tensors")
    assert no_objects.startswith("['objects'] CPU tensors")
    assert right.startswith("[] CPU tensors")
    assert "on many tensors" not in right
