"""The benchmarks: what they count, and what they do when something goes wrong. Nothing is timed."""

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from invented import BYTES, bench, moved, results, saved, timing
from torch import nn

from bench import compare, goals, machine, measure, modes, run, tables, workloads
from bench.contenders import ClipsApart, UnavailableError, rules
from bench.footprints import footprint, required
from bench.isolate import Child
from bench.measure import Group
from bench.modes import MODES, Case, ours
from bench.peers import MastersByHand, TorchForeach, TorchFused
from bench.records import BOUND, OURS, Footprint, Results, Skip, counterpart, ratio
from bench.turns import CLIP, OPERATIONS, STEP, UNSCALE, Bound, Local
from bench.workloads import Workload

CPU = torch.device("cpu")
ADAMW = next(rule for rule in rules() if rule.title == "AdamW")
TINY = Workload("tiny", "synthetic", ((1, ((100, 30), (1000,), (7,), (1,))),))
#: Too many elements to be small: its gradients stay in the same memory.
MEDIUM = Workload("medium", "synthetic", ((1, ((2**20 + 1,), (3, 5), ())),))
WHOLE_BLOCKS = Workload("", "", ((1, ((300, 256), (16, 256))),))  # of 256 elements
FUSED = Case(TorchFused, torch.float32)
BY_HAND = Case(MastersByHand, torch.bfloat16)
ALL_MODES = ours(*MODES.values())

each_workload = pytest.mark.parametrize("workload", [TINY, MEDIUM], ids=lambda each: each.name)


class Nothing:
    """As an optimizer, but without torch's compiler, which takes seconds to import."""

    def __init__(self, params):
        self.param_groups, self.state = [{"params": params}], {}

    def step(self):
        pass


class Apart(ClipsApart):
    name = "apart"
    own_process = True

    def build(self, rule):
        return Nothing(self.params)


class Crashing(Apart):
    """It works for so many steps."""

    name = "crashing"
    own_process = False
    steps = 4

    def run(self):
        self.steps -= 1
        if self.steps < 0:
            self.crash()
        self.optimizer.step()

    def crash(self):
        raise ZeroDivisionError("what a peer\nmay raise")


class CrashingAtOnce(Crashing):
    name = "crashing at once"
    steps = 0


class CrashingApart(Crashing):
    name = "crashing apart"
    own_process = True


class Dying(CrashingApart):
    name = "dying"

    def crash(self):
        os._exit(3)


class Interrupting(Apart):
    """The user has had enough when AdamW is done."""

    name = "interrupting"
    own_process = False

    def build(self, rule):
        if rule.title != "AdamW":
            signal.raise_signal(signal.SIGINT)
        return super().build(rule)


def small_model():
    return nn.Linear(3, 4)


def broken_model():
    raise ZeroDivisionError("no model")


def no_model():
    return 7


def measured(*cases, operations=(STEP,)):
    return results(*measure.measure(Group(ADAMW, TINY, cases, operations, rounds=3)))


@pytest.mark.parametrize("name", MODES)
def test_bytes_of_every_mode(name):
    (case,) = ours(MODES[name])
    turn = Local(case, ADAMW, WHOLE_BLOCKS.parameters(CPU, case.dtype), None, [])
    clipped = moved(name) + case.dtype.itemsize
    found = [turn.needed(operation) / WHOLE_BLOCKS.elements for operation in (STEP, CLIP, UNSCALE)]
    assert found == [moved(name), clipped, clipped]


@pytest.mark.parametrize("name", MODES)
@each_workload
def test_the_bound_goes_through_all_arrays_and_leaves_them(name, workload):
    (case,) = ours(MODES[name])
    turn = Local(case, ADAMW, workload.parameters(CPU, case.dtype), None, [])
    try:
        bound = Bound(turn)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    counts = [count for i, count in enumerate(bound.loop.chunks) if i % 28 % 3 == 2]
    assert sum(counts) == turn.working_set
    before = [tensor.clone() for tensors in turn.moved for tensor in tensors]
    for clips in (False, True):
        bound.loop.run(clips)
    after = [tensor for tensors in turn.moved for tensor in tensors]
    assert all(map(torch.equal, before, after))


@each_workload
def test_gradients_lie_elsewhere_each_round(workload):
    params = workload.parameters()
    gradients = workloads.Gradients(workload, params)
    before = [param.grad for param in params]
    gradients.renew(params, 1)
    for param, old in zip(params, before, strict=True):
        assert param.grad.shape == param.shape
        assert param.grad.isfinite().all()
        assert param.grad.data_ptr() != old.data_ptr()


def test_all_operations_of_all_modes():
    found = measured(*ALL_MODES, FUSED, BY_HAND, operations=OPERATIONS)
    done = {(t.contender, t.precision, t.operation) for t in found.timings}
    assert done >= {(OURS, mode, operation) for mode in MODES for operation in OPERATIONS}
    assert done >= {(TorchFused.name, "fp32", operation) for operation in OPERATIONS}
    (skip,) = (skip for skip in found.skipped if skip.contender != BOUND)
    assert (skip.contender, skip.crashed) == (MastersByHand.name, False)
    for group in found.groups():
        assert len({len(timing.samples_ns) for timing in group}) == 1
        assert ratio(group[0], group[0]) == 1


def test_a_peer_that_crashes_has_its_row():
    kinds = (Crashing, CrashingAtOnce, CrashingApart, Dying, Apart)
    found = measured(*ours(modes.FP32), *(Case(kind, torch.float32) for kind in kinds))
    by_name = {timing.contender: timing for timing in found.timings if timing.contender != BOUND}
    assert by_name.keys() == {OURS, Apart.name}
    assert by_name[Apart.name].own_process
    assert not by_name[OURS].own_process
    assert ratio(by_name[Apart.name], by_name[OURS]) > 0
    reasons = {skip.contender: skip.reason for skip in found.skipped if skip.crashed}
    assert reasons.keys() == {kind.name for kind in kinds} - {Apart.name}
    assert reasons.pop(Dying.name) == "its process died, exit code 3"
    assert set(reasons.values()) == {"ZeroDivisionError: what a peer"}
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    options = parser.parse_args(["--quick"])
    options.device = CPU
    found.run = run.about(options, [])
    told = tables.markdown(found)
    assert "its process died" in told
    assert "ZeroDivisionError" in told


def test_a_process_ends_with_its_pipe():
    child = Child(dict, {"a": 1})
    assert list(child.call("copy")) == ["a"]
    child.close()
    assert child.process.exitcode == 0


def test_footprints():
    found = {}
    for case in [*ALL_MODES, FUSED, BY_HAND, Case(Apart, torch.float32)]:
        (found[case.name, case.precision],) = footprint(case, ADAMW, WHOLE_BLOCKS, CPU)
    for mode, expected in BYTES.items():
        each = found[OURS, mode]
        held = (each.parameter, each.gradient, each.master, each.states)
        assert held == pytest.approx(expected, abs=0.001)  # and the number of steps
    by_hand = found[MastersByHand.name, "bf16+fp32 master"]
    assert (by_hand.parameter, by_hand.master, by_hand.gradient) == (2, 4, 6)
    assert found[Apart.name, "fp32"] == Footprint("", "apart", "fp32", 4, 0, 0, 4, 4)


def test_memory_that_a_group_needs():
    group = Group(ADAMW, MEDIUM, [*ours(modes.FP32), FUSED])
    # Parameter, gradient, what restores it after unscaling, two states, which torch's shares; and
    # eight bytes that come and go.
    assert required(group) / MEDIUM.elements == pytest.approx(20 + 8, abs=0.01)


def test_regimes():
    found = [measure.regime(size, 100) for size in (50, 51, 399, 400)]
    assert found == ["cache", "between", "between", "memory"]


def test_workloads_are_scaled():
    found = workloads.load()["llama3-8b"]
    part = found.scaled(32)
    assert part.name == "llama3-8b 1/32"
    assert len(part.shapes) == 9 + 3
    assert part.shapes[0] == (128256 // 32, 4096)
    assert found.scaled(1) is found
    assert workloads.load()["resnet50"].scaled(1000).shapes[-1] == (1000,)


# What a user may get wrong: nothing is measured then

FLAGS_FOR_LESS = ("--scale 4", "--workload", "--mode", "--peer")


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        (["--rule", "adamww"], ["did you mean AdamW?"]),
        (["--workload", "gtp2"], ["did you mean gpt2?"]),
        (["--mode", "split8bit"], ["did you mean split+8bit?"]),
        (["--peer", "deepspeed"], ["did you mean DeepSpeed CPUAdam?"]),
        (["--operation", "clip+step"], ["did you mean clip + step?"]),
        (
            ["--device", "cpu", "--workload", "gpt2", "--rule", "SGD"],
            ["SGD(momentum=0.9) on gpt2 needs 2.3 GiB", "1.0 GiB are free", *FLAGS_FOR_LESS],
        ),
    ],
)
def test_what_cannot_be_run(capsys, monkeypatch, words, reasons):
    monkeypatch.setattr(machine, "free_memory", lambda device: 2**30)
    assert bench("run", *words) == 2
    told = capsys.readouterr().err
    assert all(reason in told for reason in reasons)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("nothing", "write module:factory"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("test_bench:no_such_factory", "has no attribute"),
        ("test_bench:broken_model", "ZeroDivisionError: no model"),
        ("test_bench:no_model", "returned a int"),
    ],
)
def test_a_model_that_is_none(capsys, where, reason):
    assert bench("run", "--model", where) == 2
    told = capsys.readouterr().err
    assert reason in told
    assert told.count("\n") == 1


# Whole runs

QUICK = ["run", "--model", "test_bench:small_model", "--quick", "--device", "cpu"]


def test_a_model_of_ones_own(capsys, tmp_path):
    path = tmp_path / "results.json"
    words = ["--rule", "SGD", "--mode", "fp32", "--mode", "split", "--json", path]
    assert bench(*QUICK, *words) == 0
    found = Results.load(path)
    assert {(t.workload, t.elements) for t in found.timings} == {("test_bench:small_model", 16)}
    assert {t.precision for t in found.timings if t.contender == OURS} == {"fp32", "split"}
    assert not found.failed
    assert "test_bench:small_model" in capsys.readouterr().out
    assert bench("tables", path, "--markdown") == 0
    assert "| fastopt | split |" in capsys.readouterr().out
    assert bench("compare", path, path) == 0
    assert "0 of 4 are slower" in capsys.readouterr().out


def test_ctrl_c_keeps_the_finished_rows(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PEERS", [Interrupting])
    # A job in the background ignores the signal, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    path = tmp_path / "results.json"
    status = bench(*QUICK, "--peer", Interrupting.name, "--json", path)
    signal.signal(signal.SIGINT, before)
    assert status == run.INTERRUPTED
    told = capsys.readouterr().out
    assert "Interrupted" in told
    assert "AdamW" in told
    found = {(t.rule, t.operation) for t in Results.load(path).timings}
    assert found == {("AdamW", STEP), ("AdamW", CLIP)}


def test_list(capsys):
    assert bench("list") == 0
    told = capsys.readouterr().out
    for name in (*MODES, *workloads.load(), TorchForeach.name, "AdamW", "apex"):
        assert name in told


# Comparison of runs, with times that are made up


def made_up(ours, bound=(100, 100, 100, 100)):
    return [timing(OURS, samples_ns=list(ours)), timing(BOUND, samples_ns=list(bound))]


@pytest.mark.parametrize(
    ("ours", "bound", "verdict"),
    [
        ((110, 111, 112, 113), (100,) * 4, compare.SAME),
        ((220, 222, 224, 226), (200,) * 4, compare.SAME),  # a slower machine
        ((150, 151, 152, 153), (100,) * 4, compare.SLOWER),
        ((80, 81, 82, 83), (100,) * 4, compare.FASTER),
        ((100, 110, 170, 180), (100,) * 4, compare.SAME),  # who knows
    ],
)
def test_verdicts(ours, bound, verdict):
    before, after = results(*made_up((110, 111, 112, 113))), results(*made_up(ours, bound))
    (row,) = compare.compared(before, after)
    assert row.verdict(1.05) == verdict


def test_compare_exits_with_1_where_something_is_slower(tmp_path, capsys):
    paths = [
        saved(tmp_path / "a.json", *made_up((110, 111, 112, 112)), threads=2),
        saved(tmp_path / "b.json", *made_up((150, 151, 152, 152)), threads=3),
    ]
    assert bench("compare", *paths) == 1
    told = capsys.readouterr().out
    assert "1 of 1 are slower" in told
    assert "threads is 2 in A and 3 in B" in told
    assert bench("compare", *paths, "--threshold", "1.5") == 0
    assert bench("compare", *paths, "--base", "nobody") == 2
    assert bench("compare", *reversed(paths)) == 0


def test_a_peer_is_compared_with_the_same_precision():
    first, eight = timing(OURS, "fp32"), timing(OURS, "split+8bit")
    peer, other = timing("peer", "bf16+8bit"), timing("other", "bf16")
    group = [first, eight, peer, other]
    assert counterpart(peer, group) is eight
    assert counterpart(other, group) is first


def test_goals_are_of_whole_workloads():
    found = results(timing(OURS, ns=110), timing(BOUND, ns=100))
    reached = {goal.what: goal.found for goal in goals.of(found) if goal.found is not None}
    assert reached["step: of the bound"] == pytest.approx(100 / 110)
    found.timings = [replace(each, workload="part of gpt2") for each in found.timings]
    assert not [goal for goal in goals.of(found) if goal.found is not None]


def test_results_are_saved_and_loaded(tmp_path):
    made = results(timing(), Skip("peer", "AdamW, gpt2, fp32", "why", crashed=True))
    made.save(tmp_path / "a.json")
    assert Results.load(tmp_path / "a.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text())["schema"] == 2


@pytest.mark.parametrize("words", [["tables"], ["plot"], ["report"], ["plan", "--results"]])
@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"schema": 1}'])
def test_files_that_are_no_results(capsys, tmp_path, words, text):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    assert bench(*words, path) == 2
    said = capsys.readouterr()
    assert said.out == ""
    last = said.err.splitlines()[-1]
    assert "results.json" in last
    assert ("there is no file" if text is None else "measure again") in last


def test_the_regression_suite_runs():
    """Its times are for whoever asks; here it only has to work."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/regression"]
    chosen = ["--benchmark-disable", "-k", "AdamW and cached and split+8bit or state_dict"]
    done = subprocess.run([*command, *chosen], cwd=machine.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
