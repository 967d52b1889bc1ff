"""``python -m bench plan``: its arithmetic, and its bytes against real storages."""

import argparse
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich")

import fastopt
from bench import arguments, scale
from bench.contenders import Rule
from bench.records import Results, Slope, Timing
from bench.scale import Asked, Cost, PlanError, Speed

ADAMW = Rule(fastopt.AdamW, {})
COST = Cost(parameters=2, gradients=2, masters=2, states=8, moved=28)
ASKED = Asked(params=1000, gpus=8, sharding="fsdp", tensors=10, link=None, latency_us=5)
SPEED = Speed(gb_per_s=2, fixed_ns=100, tensor_ns=30)

#: Bytes per parameter with AdamW's two states; 8-bit states have 4 bytes more for 256 of them.
EIGHT = 2 * (1 + 4 / 256)
SUMS = 4 / 256  # of remainders
BYTES = {
    "fp32": (4, 4, 0, 8),
    "fp32+8bit": (4, 4, 0, EIGHT),
    "split": (2, 2, 2 + SUMS, 8),
    "split+bf16": (2, 2, 2 + SUMS, 4),
    "split+8bit": (2, 2, 2 + SUMS, EIGHT),
    "master": (2, 2, 4, 8),
    "stochastic": (2, 2, 0, 8),
    "stochastic+8bit": (2, 2, 0, EIGHT),
    "none": (2, 2, 0, 8),
    "none+bf16": (2, 2, 0, 4),
    "fp16-master": (2, 2, 4, 8),
}


def timing(mode="split", operation="clip + step", contender="fastopt", ns=1e6, **others):
    return Timing(
        **{
            "group": 0,
            "rule": "AdamW",
            "workload": "gpt2",
            "tensors": 100,
            "elements": 1_000_000,
            "operation": operation,
            "clock": "wall",
            "contender": contender,
            "precision": mode,
            "samples_ns": [round(ns)] * 3,
            "needed_bytes": 28_000_000,
            "working_set_bytes": 14_000_000,
            "regime": "memory",
            **others,
        }
    )


def saved(path, *records, date="2026-01-02", gpu=None):
    results = Results({"date": date, "machine": {"cpu": "invented"}, "gpu": gpu or {}})
    for record in records:
        results.add(record)
    results.save(path)
    return path


def run(*words):
    parser = argparse.ArgumentParser()
    scale.add_arguments(parser)
    try:
        return scale.main(parser.parse_args([str(word) for word in words]))
    except SystemExit as exit:
        return exit.code


def test_fsdp_shards_everything():
    plan = scale.planned(ASKED, COST, SPEED)
    assert plan.memory_bytes == {
        **{"parameters": 250, "gradients": 250, "masters": 250, "states": 1000},
        "all": 1750,
    }
    # 125 parameters x 28 bytes at 2 bytes a nanosecond; 100 + 10 x 30 ns; 2 x 3 hops of 5 us.
    assert plan.update_ms == pytest.approx(1750e-6)
    assert plan.overhead_ms == pytest.approx(400e-6)
    assert plan.norm_ms == pytest.approx(0.03)
    assert plan.optimizer_ms == pytest.approx(0.03215)
    assert plan.gather_bytes == 0


def test_zero1_shards_states_and_gathers_parameters():
    plan = scale.planned(replace(ASKED, sharding="zero1", link=0.5), COST, SPEED)
    assert plan.memory_bytes == {
        **{"parameters": 2000, "gradients": 2000, "masters": 250, "states": 1000},
        "all": 5250,
    }
    assert plan.update_ms == pytest.approx(1750e-6)
    # The 875 parameters of the others, 2 bytes each, at half a byte a nanosecond.
    assert plan.gather_bytes == 1750
    assert plan.gather_ms == pytest.approx(3500e-6)
    assert plan.optimizer_ms == pytest.approx(0.03215)  # without that


def test_without_sharding_every_device_does_everything():
    plan = scale.planned(replace(ASKED, sharding="none"), COST, SPEED)
    assert plan.memory_bytes["all"] == 14_000
    assert plan.update_ms == pytest.approx(14_000e-6)
    assert plan.norm_ms == 0


def test_one_device_needs_no_other():
    plan = scale.planned(replace(ASKED, gpus=1, sharding="zero1"), COST, SPEED)
    assert (plan.norm_ms, plan.gather_bytes, plan.gather_ms) == (0, 0, None)


@pytest.mark.parametrize(("gpus", "shard", "hops"), [(3, 334, 4), (256, 4, 16), (5000, 1, 26)])
def test_the_largest_part_and_the_hops(gpus, shard, hops):
    asked = replace(ASKED, gpus=gpus)
    assert (asked.shard, scale.hops(asked)) == (shard, hops)


def test_the_norm_of_a_step_that_was_measured_without_clipping():
    plan = scale.planned(ASKED, COST, SPEED, pass_gb_per_s=5)
    assert plan.pass_ms == pytest.approx(50e-6)  # 125 gradients of 2 bytes
    assert plan.optimizer_ms == pytest.approx(0.0322)


def test_a_host_works_while_the_device_does():
    for tensors, ms in ((10, 1750e-6), (1000, 30_100e-6)):
        plan = scale.planned(replace(ASKED, tensors=tensors), COST, replace(SPEED, overlaps=True))
        assert plan.step_ms == pytest.approx(ms)


def test_speed_leaves_the_overhead_out():
    speed = Speed.measured(moved=2800, tensors=10, ns=1800, fixed_ns=100, tensor_ns=30)
    assert speed.gb_per_s == pytest.approx(2)
    assert speed.step_ns(2800, 10) == pytest.approx(1800)
    below = Speed.measured(moved=2800, tensors=1, ns=1400, fixed_ns=-377, tensor_ns=30)
    assert below.gb_per_s == pytest.approx(2)
    with pytest.raises(PlanError, match="all overhead"):
        Speed.measured(moved=2800, tensors=10, ns=400, fixed_ns=100, tensor_ns=30)


def test_gradients_of_another_size_are_read_by_every_pass():
    cost = COST.with_gradients(4, passes=2)
    assert (cost.gradients, cost.moved) == (4, 32)


@pytest.mark.parametrize("mode", BYTES)
def test_bytes_per_parameter_are_those_of_real_storages(mode):
    """Of a tensor whose last 8-bit block is full; its step number is 4 bytes more."""
    cost = scale.counted(scale.MODES[mode], ADAMW)
    found = (cost.parameters, cost.gradients, cost.masters, cost.states)
    assert found == pytest.approx(BYTES[mode], abs=1e-5)
    parameters, gradients, masters, states = BYTES[mode]
    assert cost.moved == pytest.approx(gradients + 2 * (parameters + masters + states))
    clipped = scale.counted(scale.MODES[mode], ADAMW, clips=True)
    assert clipped.moved == pytest.approx(cost.moved + gradients)


def test_all_modes_are_here():
    assert set(scale.MODES) == set(BYTES)


def test_a_shard_is_what_fsdp_gives_the_first_device():
    model = scale.workload("model", [(10, 3), (7,), (1, 5)])
    assert scale.Share(model, 4).here.shapes == ((3, 3), (2,), (1, 5))


def test_the_check_finds_the_predicted_memory():
    """And says how far the times are off, which nobody asserts here."""
    tiny = [
        scale.Share(scale.workload(str(n), [(256, 4)] * n), gpus) for n, gpus in ((4, 1), (8, 2))
    ]
    small = scale.workload("small", [(64,)] * 4)
    rows = list(scale.checked("split+8bit", ADAMW, tiny, small, 2, torch.device("cpu")))
    memory = [row for row in rows if row.what == "MB"]
    assert len(memory) == 2
    assert not any(row.bad for row in memory)
    assert [row.case for row in rows if row.what == "ms"] == ["8 on 1 of 2 devices"]


def test_a_plan_from_results(tmp_path, capsys):
    slope = Slope("AdamW", "fastopt", "fp32", "fresh", "wall", 1.0, 0.0, {"500": 500.0})
    path = saved(tmp_path / "run.json", timing(ns=1.5e6), slope)
    words = ["--params", "70B", "--gpus", 256, "--mode", "split", "--results", path]
    assert run(*words, "--json", "--tensors", 300) == 0
    made = json.loads(capsys.readouterr().out)
    # 1.5 ms without 100 tensors of 1 us: 28 MB in 1.4 ms.
    assert made["speed"]["gb_per_s"] == pytest.approx(20)
    assert made["plan"]["overhead_ms"] == pytest.approx(0.3)
    assert made["plan"]["update_ms"] == pytest.approx(273_437_500 * (28 + 2 * SUMS) / 20 / 1e6)
    assert made["plan"]["memory_bytes"]["all"] == pytest.approx(273_437_500 * (14 + SUMS), rel=1e-5)
    assert made["measured"]["file"] == "run.json"
    assert run(*words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "273,437,500 parameters x 28.03 bytes / 20.0 GB/s" in said
    assert "2 x ceil(log2 256) = 16 hops x 10 us" in said
    assert "run.json" in said
    assert "These devices are CPUs" in said


def test_the_newest_results_that_were_named_are_used(tmp_path):
    paths = [
        saved(tmp_path / f"{day}.json", timing(), date=f"2026-01-{day}")
        for day in ("03", "05", "04")
    ]
    given = [arguments.saved(str(path)) for path in paths]
    assert scale.find(given, "split", ADAMW).path.name == "05.json"


def test_the_largest_workload_in_memory_is_used():
    step = timing(operation="step", elements=10**9)
    cached = timing(regime="cache", elements=10**9)
    assert max([step, timing(), cached], key=scale.suitable) == timing()


def test_the_norm_reads_as_fast_as_the_bound_beside_the_step(tmp_path):
    bound = timing(operation="step", contender="bound", ns=5e5)
    path = saved(tmp_path / "run.json", timing(operation="step"), bound)
    source = scale.find([arguments.saved(str(path))], "split", ADAMW)
    assert source.limit == bound
    path = saved(tmp_path / "run.json", timing(operation="step"), timing())
    assert scale.find([arguments.saved(str(path))], "split", ADAMW).limit is None


def test_a_mode_that_was_not_measured_says_what_measures_it(tmp_path, capsys):
    path = saved(tmp_path / "run.json", timing("fp32"))
    assert run("--params", "1b", "--mode", "split", "--results", path) == 2
    said = capsys.readouterr().err
    assert "No AdamW in mode split in run.json" in said
    assert "python -m bench run --rule AdamW --mode split" in said
    assert said.count("\n") == 1


def test_no_results_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "RESULTS", tmp_path)
    assert run("--params", "1b", "--mode", "split") == 2
    assert "python -m bench run" in capsys.readouterr().err


def test_a_file_that_is_named_must_have_results(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        assert run("--params", "1b", "--mode", "split", "--results", tmp_path / name) == 2
        assert name in capsys.readouterr().err


def test_a_rule_without_the_mode_is_one_sentence():
    with pytest.raises(PlanError, match="Adagrad"):
        scale.counted(scale.MODES["fp32+8bit"], Rule(fastopt.Adagrad, {}))


@pytest.mark.parametrize(
    ("text", "count"),
    [("70e9", 70 * 10**9), ("70B", 70 * 10**9), ("1.1b", 11 * 10**8), ("124M", 124 * 10**6)],
)
def test_numbers_of_parameters(text, count):
    assert scale.quantity(text) == count


@pytest.mark.parametrize("text", ["0", "-1", "0.5", "nan", "inf", "many", "", "B", "1bb"])
def test_what_is_no_number_of_parameters(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number of parameters"):
        scale.quantity(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0"], "whole number from 1"),
        (["--mode", "spilt"], "did you mean split?"),
        (["--sharding", "zero3"], "did you mean zero1?"),
        (["--link", "-1"], "not a number above 0"),
        (["--latency-us", "fast"], "not a number above 0"),
    ],
)
def test_wrong_arguments(words, said, capsys):
    assert run(*words) == 2
    assert said in capsys.readouterr().err


def test_a_plan_needs_parameters_and_a_mode(capsys):
    assert run("--params", "1b") == 2
    assert run("--mode", "split") == 2
    assert capsys.readouterr().err.count("--params") == 2
