"""``python -m bench plan``: its arithmetic, and its bytes against real storages."""

import argparse
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich")

from invented import BYTES, SUMS, bench, moved, saved, timing

import fastopt
from bench import arguments, scale
from bench.contenders import Rule
from bench.records import Slope
from bench.scale import Asked, Cost, PlanError, Speed

ADAMW = Rule(fastopt.AdamW, {})
COST = Cost(parameters=2, gradients=2, masters=2, states=8, moved=28)
ASKED = Asked(params=1000, gpus=8, sharding="fsdp", tensors=10, link=None, latency_us=5)
SPEED = Speed(gb_per_s=2, fixed_ns=100, tensor_ns=30)
HOPS_MS = 0.03  # 2 x 3 hops of 5 us, for the norm
OVERHEAD_MS = 400e-6  # 100 + 10 x 30 ns

# An update moves 28 bytes of each parameter at 2 bytes a nanosecond, of 125 or of all.


@pytest.mark.parametrize(
    ("asked", "memory", "update_ms", "norm_ms", "gather"),
    [
        ({}, (250, 250, 250, 1000), 1750e-6, HOPS_MS, (0, None)),
        # The 875 parameters of the others, 2 bytes each, at half a byte a nanosecond.
        (
            {"sharding": "zero1", "link": 0.5},
            *((2000, 2000, 250, 1000), 1750e-6, HOPS_MS, (1750, 3500e-6)),
        ),
        ({"sharding": "none"}, (2000, 2000, 2000, 8000), 14_000e-6, 0, (0, None)),
        ({"sharding": "zero1", "gpus": 1}, (2000, 2000, 2000, 8000), 14_000e-6, 0, (0, None)),
    ],
    ids=str,
)
def test_what_sharding_takes(asked, memory, update_ms, norm_ms, gather):
    plan = scale.planned(replace(ASKED, **asked), COST, SPEED)
    names = ("parameters", "gradients", "masters", "states", "all")
    assert plan.memory_bytes == dict(zip(names, (*memory, sum(memory)), strict=True))
    assert plan.update_ms == pytest.approx(update_ms)
    assert plan.overhead_ms == pytest.approx(OVERHEAD_MS)
    assert plan.norm_ms == pytest.approx(norm_ms)
    assert (plan.gather_bytes, plan.gather_ms) == (gather[0], pytest.approx(gather[1]))
    # Without the gathering.
    assert plan.optimizer_ms == pytest.approx(update_ms + OVERHEAD_MS + norm_ms)


@pytest.mark.parametrize(("gpus", "shard", "hops"), [(3, 334, 4), (256, 4, 16), (5000, 1, 26)])
def test_the_largest_part_and_the_hops(gpus, shard, hops):
    asked = replace(ASKED, gpus=gpus)
    assert (asked.shard, scale.hops(asked)) == (shard, hops)


def test_the_norm_of_a_step_that_was_measured_without_clipping():
    plan = scale.planned(ASKED, COST, SPEED, pass_gb_per_s=5)
    assert plan.pass_ms == pytest.approx(50e-6)  # 125 gradients of 2 bytes
    assert plan.optimizer_ms == pytest.approx(0.0322)


@pytest.mark.parametrize(("tensors", "ms"), [(10, 1750e-6), (1000, 30_100e-6)])
def test_a_host_works_while_the_device_does(tensors, ms):
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


@pytest.mark.parametrize("mode", sorted({*BYTES, *scale.MODES}))
def test_bytes_per_parameter_are_those_of_real_storages(mode):
    """Of a tensor whose last 8-bit block is full; its step number is 4 bytes more."""
    cost = scale.counted(scale.MODES[mode], ADAMW)
    found = (cost.parameters, cost.gradients, cost.masters, cost.states)
    assert found == pytest.approx(BYTES[mode], abs=1e-5)
    assert cost.moved == pytest.approx(moved(mode))
    clipped = scale.counted(scale.MODES[mode], ADAMW, clips=True)
    assert clipped.moved == pytest.approx(cost.moved + cost.gradients)


def test_a_shard_is_what_fsdp_gives_the_first_device():
    model = scale.workload("model", [(10, 3), (7,), (1, 5)])
    assert scale.Share(model, 4).here.shapes == ((3, 3), (2,), (1, 5))


def test_the_check_finds_the_predicted_memory():
    """And says how far the times are off, which nobody asserts here."""
    tiny = [
        scale.Share(scale.workload(str(n), [(64, 256)] * n), gpus) for n, gpus in ((4, 1), (8, 2))
    ]
    small = scale.workload("small", [(64,)] * 4)
    rows = list(scale.checked("split+8bit", ADAMW, tiny, small, 2, torch.device("cpu")))
    memory = [row for row in rows if row.what == "MB"]
    assert len(memory) == 2
    assert not any(row.bad for row in memory)
    assert [row.case for row in rows if row.what == "ms"] == ["8 on 1 of 2 devices"]


# From saved results


def clip_and_step(mode="split", ns=1e6, **others):
    return timing(precision=mode, operation="clip + step", ns=ns, **others)


def test_a_plan_from_results(tmp_path, capsys):
    slope = Slope("AdamW", "fastopt", "fp32", "fresh", "wall", 1.0, 0.0, {"500": 500.0})
    path = saved(tmp_path / "run.json", clip_and_step(ns=1.5e6), slope)
    words = ["plan", "--params", "70B", "--gpus", 256, "--mode", "split", "--results", path]
    assert bench(*words, "--json", "--tensors", 300) == 0
    made = json.loads(capsys.readouterr().out)
    # 1.5 ms without 100 tensors of 1 us: 28 MB in 1.4 ms.
    assert made["speed"]["gb_per_s"] == pytest.approx(20)
    assert made["plan"]["overhead_ms"] == pytest.approx(0.3)
    assert made["plan"]["update_ms"] == pytest.approx(273_437_500 * (28 + 2 * SUMS) / 20 / 1e6)
    assert made["plan"]["memory_bytes"]["all"] == pytest.approx(273_437_500 * (14 + SUMS), rel=1e-5)
    assert made["measured"]["file"] == "run.json"
    assert bench(*words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "273,437,500 parameters x 28.03 bytes / 20.0 GB/s" in said
    assert "2 x ceil(log2 256) = 16 hops x 10 us" in said
    assert "run.json" in said
    assert "These devices are CPUs" in said


def found(*paths):
    return scale.find([arguments.saved(str(path)) for path in paths], "split", ADAMW)


def test_the_newest_results_that_were_named_are_used(tmp_path):
    days = ("03", "05", "04")
    paths = [
        saved(tmp_path / f"{day}.json", clip_and_step(), date=f"2026-01-{day}") for day in days
    ]
    assert found(*paths).path.name == "05.json"


def test_the_largest_workload_in_memory_is_used():
    step = timing(precision="split", elements=10**9)
    cached = clip_and_step(regime="cache", elements=10**9)
    assert max([step, clip_and_step(), cached], key=scale.suitable) == clip_and_step()


def test_the_norm_reads_as_fast_as_the_bound_beside_the_step(tmp_path):
    step, bound = timing(precision="split"), timing("bound", "split", ns=5e5)
    assert found(saved(tmp_path / "run.json", step, bound)).limit == bound
    assert found(saved(tmp_path / "run.json", step, clip_and_step())).limit is None


def test_a_mode_that_was_not_measured_says_what_measures_it(tmp_path, monkeypatch, capsys):
    path = saved(tmp_path / "run.json", clip_and_step("fp32"))
    words = ["plan", "--params", "1b", "--mode", "split"]
    assert bench(*words, "--results", path) == 2
    said = capsys.readouterr().err
    assert "No AdamW in mode split in run.json" in said
    assert "python -m bench run --rule AdamW --mode split" in said
    assert said.count("\n") == 1
    monkeypatch.setattr(scale, "RESULTS", tmp_path / "nothing")
    assert bench(*words) == 2
    assert "python -m bench run" in capsys.readouterr().err


# What a user may get wrong


def test_a_rule_without_the_mode_is_one_sentence():
    with pytest.raises(PlanError, match="Adagrad"):
        scale.counted(scale.MODES["fp32+8bit"], Rule(fastopt.Adagrad, {}))


def test_numbers_of_parameters():
    counts = {"70e9": 70 * 10**9, "70B": 70 * 10**9, "1.1b": 11 * 10**8, "124M": 124 * 10**6}
    assert {text: scale.quantity(text) for text in counts} == counts
    for text in ("0", "-1", "0.5", "nan", "inf", "many", "", "B", "1bb"):
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
        (["--params", "1b"], "for --params and a --mode"),
        (["--mode", "split"], "for --params and a --mode"),
    ],
)
def test_wrong_arguments(words, said, capsys):
    assert bench("plan", *words) == 2
    assert said in capsys.readouterr().err
