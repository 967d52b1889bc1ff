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
from torch import nn

from bench import compare, goals, machine, measure, modes, run, tables, workloads
from bench.__main__ import main
from bench.contenders import ClipsApart, UnavailableError, rules
from bench.footprints import footprint, required
from bench.isolate import Child
from bench.measure import Group
from bench.modes import MODES, Case, ours
from bench.peers import MastersByHand, TorchForeach, TorchFused
from bench.records import BOUND, OURS, Footprint, Results, Skip, Timing, counterpart, ratio
from bench.turns import CLIP, OPERATIONS, STEP, UNSCALE, Bound, Local
from bench.workloads import Workload

CPU = torch.device("cpu")
ADAMW = next(rule for rule in rules() if rule.title == "AdamW")
TINY = Workload("tiny", "synthetic", ((1, ((100, 30), (1000,), (7,), (1,))),))
#: Too many elements to be small: its gradients stay in the same memory.
MEDIUM = Workload("medium", "synthetic", ((1, ((2**20 + 1,), (3, 5), ())),))
FUSED = Case(TorchFused, torch.float32)
#: Bytes of an AdamW step per element; 8-bit states have a scale of four bytes for 256 elements.
SCALES = 2 * 2 * 4 / 256
SUMS = 2 * 4 / 256
BYTES = {
    "fp32": 4 + 2 * (4 + 8),
    "fp32+8bit": 4 + 2 * (4 + 2) + SCALES,
    "split": 2 + 2 * (2 + 2 + 8) + SUMS,
    "split+bf16": 2 + 2 * (2 + 2 + 4) + SUMS,
    "split+8bit": 2 + 2 * (2 + 2 + 2) + SUMS + SCALES,
    "master": 2 + 2 * (2 + 4 + 8),
    "stochastic": 2 + 2 * (2 + 8),
    "stochastic+8bit": 2 + 2 * (2 + 2) + SCALES,
    "none": 2 + 2 * (2 + 8),
    "none+bf16": 2 + 2 * (2 + 4),
    "fp16-master": 2 + 2 * (2 + 4 + 8),
}


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


class Dying(Crashing):
    name = "dying"
    own_process = True

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


def results_of(found):
    results = Results(run={})
    for record in found:
        results.add(record)
    return results


def measured(*cases, workload=TINY, operations=(STEP,)):
    return results_of(measure.measure(Group(ADAMW, workload, cases, operations, rounds=3)))


@pytest.mark.parametrize("name", MODES)
def test_bytes_of_every_mode(name):
    workload = Workload("", "", ((1, ((256, 300), (512,))),))
    (case,) = ours(MODES[name])
    params = workload.parameters(CPU, case.dtype)
    turn = Local(case, ADAMW, params, None, [])
    elements = workload.elements
    assert turn.needed(STEP) == BYTES[name] * elements
    assert (
        turn.needed(CLIP) == turn.needed(UNSCALE) == (BYTES[name] + case.dtype.itemsize) * elements
    )


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("workload", [TINY, MEDIUM], ids=lambda workload: workload.name)
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


@pytest.mark.parametrize("workload", [TINY, MEDIUM], ids=lambda workload: workload.name)
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
    cases = [*ours(*MODES.values()), FUSED, Case(MastersByHand, torch.bfloat16)]
    results = measured(*cases, operations=OPERATIONS)
    found = {(t.contender, t.precision, t.operation) for t in results.timings}
    assert found >= {(OURS, mode, operation) for mode in MODES for operation in OPERATIONS}
    assert found >= {(TorchFused.name, "fp32", operation) for operation in OPERATIONS}
    (skip,) = (skip for skip in results.skipped if skip.contender != BOUND)
    assert (skip.contender, skip.crashed) == (MastersByHand.name, False)
    for group in results.groups():
        assert len({len(timing.samples_ns) for timing in group}) == 1
        assert ratio(group[0], group[0]) == 1


def test_a_peer_that_crashes_has_its_row():
    kinds = (Crashing, CrashingAtOnce, CrashingApart, Dying, Apart)
    results = measured(*ours(modes.FP32), *(Case(kind, torch.float32) for kind in kinds))
    assert {timing.contender for timing in results.timings} - {BOUND} == {OURS, Apart.name}
    reasons = {skip.contender: skip.reason for skip in results.skipped if skip.crashed}
    assert reasons.keys() == {kind.name for kind in kinds} - {Apart.name}
    assert reasons.pop(Dying.name) == "its process died, exit code 3"
    assert set(reasons.values()) == {"ZeroDivisionError: what a peer"}
    apart, fastopt = (
        next(t for t in results.timings if t.contender == name) for name in (Apart.name, OURS)
    )
    assert apart.own_process
    assert not fastopt.own_process
    assert ratio(apart, fastopt) > 0
    results.run = run.about(options_of("--quick"), [])
    told = tables.markdown(results)
    assert "its process died" in told
    assert "ZeroDivisionError" in told


def test_a_process_ends_with_its_pipe():
    child = Child(dict, {"a": 1})
    assert list(child.call("copy")) == ["a"]
    child.close()
    assert child.process.exitcode == 0


def test_footprints():
    workload = Workload("", "", ((1, ((256, 300),)),))
    found = {}
    for case in [*ours(*MODES.values()), FUSED, Case(MastersByHand, torch.bfloat16)]:
        (found[case.name, case.precision],) = footprint(case, ADAMW, workload, CPU)
    split = found[OURS, "split"]
    assert (split.parameter, split.master, split.gradient) == (2, 2 + SUMS / 2, 2)
    assert split.states == pytest.approx(8, abs=0.001)  # and the number of steps
    by_hand = found[MastersByHand.name, "bf16+fp32 master"]
    assert (by_hand.parameter, by_hand.master, by_hand.gradient) == (2, 4, 6)
    (apart,) = footprint(Case(Apart, torch.float32), ADAMW, workload, CPU)
    assert apart == Footprint("", "apart", "fp32", 4, 0, 0, 4, 4)


def test_memory_that_a_group_needs():
    group = Group(ADAMW, MEDIUM, [*ours(modes.FP32), FUSED])
    # Parameter, gradient, what restores it after unscaling, two states, which torch's shares; and
    # eight bytes that come and go.
    assert required(group) / MEDIUM.elements == pytest.approx(20 + 8, abs=0.01)


def test_regimes():
    assert [measure.regime(size, 100) for size in (50, 51, 399, 400)] == [
        *("cache", "between", "between", "memory")
    ]


def test_workloads_are_scaled():
    found = workloads.load()["llama3-8b"]
    part = found.scaled(32)
    assert part.name == "llama3-8b 1/32"
    assert len(part.shapes) == 9 + 3
    assert part.shapes[0] == (128256 // 32, 4096)
    assert found.scaled(1) is found
    assert workloads.load()["resnet50"].scaled(1000).shapes[-1] == (1000,)


# What a user may get wrong


def refusal(capsys, *arguments):
    """What is said, and that nothing is measured."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    return capsys.readouterr().err


def options_of(*arguments):
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.device = CPU
    return options


@pytest.mark.parametrize(
    ("flag", "given", "meant"),
    [
        ("--rule", "adamww", "AdamW"),
        ("--workload", "gtp2", "gpt2"),
        ("--mode", "split8bit", "split+8bit"),
        ("--peer", "deepspeed", "DeepSpeed CPUAdam"),
        ("--operation", "clip+step", "clip + step"),
    ],
)
def test_unknown_names(capsys, flag, given, meant):
    assert f"did you mean {meant}?" in refusal(capsys, "run", flag, given)


def test_too_little_memory(capsys, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 2**30)
    told = refusal(capsys, "run", "--device", "cpu", "--workload", "gpt2", "--rule", "SGD")
    assert "SGD(momentum=0.9) on gpt2 needs 2.3 GiB" in told
    assert "1.0 GiB are free" in told
    assert all(flag in told for flag in ("--scale 4", "--workload", "--mode", "--peer"))


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
    told = refusal(capsys, "run", "--model", where)
    assert reason in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 1}'])
def test_files_that_are_no_results(capsys, tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert "measure again" in refusal(capsys, "tables", str(path))
    assert "there is no file" in refusal(capsys, "tables", str(tmp_path / "b.json"))


# Whole runs


def test_a_model_of_ones_own(capsys, tmp_path):
    path = tmp_path / "results.json"
    arguments = ["run", "--model", "test_bench:small_model", "--rule", "SGD", "--mode", "fp32"]
    status = main(
        [*arguments, "--mode", "split", "--quick", "--device", "cpu", "--json", str(path)]
    )
    assert status == 0
    results = Results.load(path)
    assert {t.workload for t in results.timings} == {"test_bench:small_model"}
    assert {t.elements for t in results.timings} == {16}
    assert {t.precision for t in results.timings if t.contender == OURS} == {"fp32", "split"}
    assert not results.failed
    assert "test_bench:small_model" in capsys.readouterr().out
    assert main(["tables", str(path), "--markdown"]) == 0
    assert "| fastopt | split |" in capsys.readouterr().out
    assert main(["compare", str(path), str(path)]) == 0
    assert "0 of 4 are slower" in capsys.readouterr().out


def test_ctrl_c_keeps_the_finished_rows(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PEERS", [Interrupting])
    path = tmp_path / "results.json"
    arguments = ["run", "--model", "test_bench:small_model", "--peer", Interrupting.name]
    status = main([*arguments, "--quick", "--device", "cpu", "--json", str(path)])
    assert status == run.INTERRUPTED
    told = capsys.readouterr().out
    assert "Interrupted" in told
    assert "AdamW" in told
    results = Results.load(path)
    assert {(t.rule, t.operation) for t in results.timings} == {("AdamW", STEP), ("AdamW", CLIP)}


def test_list(capsys):
    assert main(["list"]) == 0
    told = capsys.readouterr().out
    for name in (*MODES, *workloads.load(), TorchForeach.name, "AdamW", "apex"):
        assert name in told


# Comparison of runs, with times that are made up


def timing(contender, samples, precision="fp32", **others):
    made = Timing(
        group=0,
        rule="AdamW",
        workload="gpt2",
        tensors=1,
        elements=100,
        operation=STEP,
        clock="wall",
        contender=contender,
        precision=precision,
        samples_ns=samples,
        needed_bytes=2800,
        working_set_bytes=1600,
        regime="memory",
    )
    return replace(made, **others)


def results(ours, bound=(100, 100, 100, 100)):
    timings = [timing(OURS, list(ours)), timing(BOUND, list(bound))]
    return Results({"gpu": {}, "threads": 2}, timings)


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
    before = results((110, 111, 112, 113))
    (row,) = compare.compared(before, results(ours, bound))
    assert row.verdict(1.05) == verdict


def test_compare_exits_with_1_where_something_is_slower(tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, times in zip(paths, ((110, 111, 112), (150, 151, 152)), strict=True):
        made = results(times, (100,) * 3)
        made.run["threads"] = times[0]
        made.save(path)
    given = list(map(str, paths))
    assert main(["compare", *given]) == 1
    told = capsys.readouterr().out
    assert "1 of 1 are slower" in told
    assert "threads is 110 in A and 150 in B" in told
    assert main(["compare", *given, "--threshold", "1.5"]) == 0
    assert main(["compare", *given, "--base", "nobody"]) == 2
    assert main(["compare", *reversed(given)]) == 0


def test_a_peer_is_compared_with_the_same_precision():
    group = [
        timing(OURS, [1], "fp32"),
        timing(OURS, [2], "split+8bit"),
        timing("peer", [4], "bf16+8bit"),
        timing("other", [4], "bf16"),
    ]
    assert counterpart(group[2], group) is group[1]
    assert counterpart(group[3], group) is group[0]


def test_goals_are_of_whole_workloads():
    found = Results({"gpu": {}}, [timing(OURS, [110]), timing(BOUND, [100])])
    reached = {goal.what: goal for goal in goals.of(found) if goal.found is not None}
    assert reached["step: of the bound"].found == pytest.approx(100 / 110)
    found.timings = [replace(each, workload="part of gpt2") for each in found.timings]
    assert not [goal for goal in goals.of(found) if goal.found is not None]


def test_results_are_saved_and_loaded(tmp_path):
    made = results((1, 2, 3))
    made.add(Skip("peer", "AdamW, gpt2, fp32", "why", crashed=True))
    made.save(tmp_path / "a.json")
    assert Results.load(tmp_path / "a.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text())["schema"] == 2


def test_the_regression_suite_runs():
    """Its times are for whoever asks; here it only has to work."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/regression"]
    chosen = ["--benchmark-disable", "-k", "AdamW and cached and split+8bit or state_dict"]
    done = subprocess.run([*command, *chosen], cwd=machine.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
