"""The process around the kernels: OpenMP, fork, instruction sets, what is reported."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from helpers import CASES, assert_same_bits

import fastopt
from fastopt.packing import STORAGES
from fastopt.rule import HEAD
from fastopt.rules import RULES
from fastopt.step import dispatch, torch_abi
from fastopt.step.backends import Reference

_C = dispatch.extension()


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime():
    """Two in one process would each start their own threads."""
    found = run_python(
        "import fastopt, re, torch\n"
        "p = torch.nn.Parameter(torch.zeros(1 << 20)); p.grad = torch.ones(1 << 20)\n"
        "fastopt.AdamW([p], max_norm=1.0).step()\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(sorted(set(re.findall(r'\\S*lib(?:gomp|omp|iomp5)\\S*', maps))))\n"
        "print('_C.' in maps)"
    )
    runtimes, loaded = found.stdout.splitlines()
    assert len(eval(runtimes)) == 1, runtimes
    assert loaded == "True"


def test_threads_of_torch_are_honoured():
    """With one thread of torch, none is started here; with three, three."""
    code = (
        "import os, fastopt, torch; torch.set_num_threads({})\n"
        "p = torch.nn.Parameter(torch.zeros(1 << 20)); p.grad = torch.ones_like(p)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "fastopt.AdamW([p]).step()\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    # p.grad is made in one thread where torch has one, and in all of them otherwise.
    assert run_python(code.format(1)).stdout.strip() == "0"
    small = code.replace("torch.ones_like(p)", "torch.ones(1).expand(1 << 20)").replace(
        "torch.zeros(1 << 20)", "torch.empty(1 << 20)"
    )
    assert run_python(small.format(3)).stdout.strip() == "2"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_step_after_fork():
    """libgomp would hang in a child of a process that has used it."""
    code = (
        "import os, fastopt, torch; torch.set_num_threads(2)\n"
        "p = torch.nn.Parameter(torch.zeros(1 << 18)); p.grad = torch.ones(1 << 18)\n"
        "o = fastopt.SGD([p], lr=1.0, max_norm=1e9); o.step()\n"
        "child = os.fork()\n"
        "o.step()\n"
        "ok = bool((p.detach() == -2).all().item()) if child else p.detach()[-1].item() == -2\n"
        "if not child: os._exit(0 if ok else 1)\n"
        "print(ok, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert run_python(code).stdout.split() == ["True", "0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_first_step_after_fork():
    """The parent's workers are torch's, and it has made no optimizer yet."""
    code = (
        "import os, signal, fastopt, torch; torch.set_num_threads(2)\n"
        "p, grad = torch.zeros(1 << 18).requires_grad_(), torch.ones(1 << 18)\n"
        "torch.zeros(1 << 20).add_(1).exp_()\n"
        "if child := os.fork():\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "else:\n"
        "    signal.alarm(30)\n"
        "    p.grad = grad; fastopt.SGD([p], lr=1.0, max_norm=1e9).step()\n"
        "    os._exit(0 if p.detach()[-1].item() == -1 else 1)\n"
    )
    assert run_python(code).stdout.split() == ["0"]


@pytest.mark.parametrize("flushes", [True, False])
def test_the_callers_floating_point_mode(flushes):
    """Denormal numbers are flushed in all threads or in none, and no worker's mode is changed."""
    n = 300_000  # several tasks
    param, *grads = (torch.full((n,), x) for x in (1e-39, 3e-40, 2e-39))

    def whether_workers_flush():
        return bool((param * 1.0 == 0).any())

    def stepped(threads):
        torch.set_num_threads(threads)
        assert not whether_workers_flush()  # who are there now: new ones inherit the caller's mode
        if not torch.set_flush_denormal(flushes) and flushes:
            pytest.skip("this processor cannot flush denormal numbers")
        p = param.clone().requires_grad_()
        optimizer = fastopt.SGD([p], lr=0.5, momentum=0.9, max_norm=1.0, backend="cpp")
        for p.grad in grads:
            optimizer.step()
        torch.set_flush_denormal(False)
        assert not whether_workers_flush()
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
    for isa in _C.supported_isas():
        found = run_python("import fastopt; print(fastopt.backends()['cpp'])", FASTOPT_ISA=isa)
        assert f"{isa}, " in found.stdout
    found = run_python("import fastopt; print(fastopt.backends()['cpp'])", FASTOPT_ISA="mmx")
    assert "available=False" in found.stdout
    assert "FASTOPT_ISA=mmx: instruction set mmx is not one of those that work here: baseline" in (
        found.stdout
    )


def test_report():
    found = run_python("import runpy; runpy.run_module('fastopt', run_name='__main__')")
    first, triton, cpp, reference = found.stdout.splitlines()
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


def test_without_the_extension():
    code = "import sys; sys.modules['fastopt._C'] = None; import fastopt; print(fastopt.backends())"
    found = run_python(code).stdout
    assert "'cpp': Backend(available=False, detail='the compiled extension cannot be" in found


def test_an_extension_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(_C, "head", lambda: ["coef", "max_norm"])
    module, reason = dispatch._load.__wrapped__()
    assert module is None
    assert "another version of fastopt" in reason


def test_where_torchs_fields_are_not_found():
    """Another torch: every step is planned anew, to the same effect."""
    code = (
        "import fastopt, torch\n"
        "from fastopt.step import dispatch, table\n"
        "{}\n"
        "for cls in fastopt.OPTIMIZERS:\n"
        "    torch.manual_seed(0)\n"
        "    p = torch.nn.Parameter(torch.randn(100)); o = cls([p], max_norm=1.0)\n"
        "    for _ in range(3):\n"
        "        p.grad = torch.randn(100); o.step()\n"
        "    held = o._plan.holds(o.param_groups, o.state, o._table, o.backend, False)\n"
        "    print(held, p.double().sum().item())"
    )
    fast = run_python(code.format("")).stdout
    slow = run_python(code.format("dispatch.torch_abi.find = lambda: None")).stdout
    assert len(fast.splitlines()) == len(fastopt.OPTIMIZERS)
    assert "False" not in fast
    assert slow == fast.replace("True", "False")


def test_wrong_fields_of_torch_are_not_used():
    """Each wrong in turn: steps are planned anew, and the report says so."""
    code = (
        "import fastopt\n"
        "from fastopt.step import dispatch, torch_abi\n"
        "search = torch_abi._search\n"
        "for name in (*torch_abi.Fields._fields, None):\n"
        "    wrong = lambda t: (f := search(t))._replace(**{name: getattr(f, name) + 8})\n"
        "    torch_abi._search = wrong if name else search\n"
        "    dispatch._load.cache_clear()\n"
        "    print(dispatch.extension().knows_torch_fields(), fastopt.backends()['cpp'].detail)"
    )
    *wrong, right = run_python(code).stdout.splitlines()
    assert len(wrong) == len(torch_abi.Fields._fields)
    assert all(line.startswith("False CPU tensors") for line in wrong)
    assert all("slow on many tensors" in line for line in wrong)
    assert right.startswith("True CPU tensors")
    assert "slow on many tensors" not in right


def test_gradients_are_measured_once(monkeypatch):
    passes = []
    measure = Reference.power_sum
    monkeypatch.setattr(
        Reference, "power_sum", lambda self, order: passes.append(1) or measure(self, order)
    )
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = fastopt.SGD([param], max_norm=1.0, backend="reference")
    for _ in range(2):
        optimizer.step()
    assert len(passes) == 2


def test_a_plan_is_kept_while_it_holds():
    params = [torch.nn.Parameter(torch.zeros(s)) for s in ((3,), (), (0,), (2, 2))]
    optimizer = fastopt.AdamW(params)
    plans = []
    for step in range(6):
        for i, param in enumerate(params):  # fresh gradients, and not everywhere
            param.grad = None if step == 3 and i == 1 else torch.ones(param.shape)
        optimizer.step()
        plans.append(optimizer._plan)
    assert len(set(map(id, plans))) == 1
    assert [float(optimizer.state[p]["step"]) for p in params] == [6, 5, 6, 6]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_memory_is_given_back(backend):
    """A step keeps no gradient alive, and nothing keeps the states of a deleted optimizer."""
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = fastopt.AdamW([param], backend=backend)
    param.grad = torch.ones(3)
    optimizer.step()
    grad, state = weakref.ref(param.grad), weakref.ref(optimizer.state[param]["exp_avg"])
    param.grad = None
    assert grad() is None
    optimizer = None
    gc.collect()
    assert state() is None
