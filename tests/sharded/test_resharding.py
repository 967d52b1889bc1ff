"""Checkpoints of shards: to other numbers of ranks, from torch.optim and back, written in the
background, cut off."""

import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import BF16, FP16, FP32, assert_same_bits
from ranks import DIED, run, run_apart
from test_shards import whole
from test_training import new_model, sharded_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

import fastopt


def save(folder, kind, dtype, settings):
    model = sharded_model(kind, dist.get_world_size(), dtype) if kind else new_model(dtype)
    optimizer = fastopt.AdamW(model.parameters(), **settings)
    steps(model, optimizer, range(3), dtype)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)


def state_of(model, optimizer):
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def steps(model, optimizer, numbers, dtype):
    """With the same gradients on any number of ranks."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator).to(dtype)
            if isinstance(param, DTensor):
                grad = distribute_tensor(
                    grad, param.device_mesh, param.placements, src_data_rank=None
                )
            param.grad = grad
        optimizer.step()


def load(folder, kind, dtype, settings):
    world = dist.get_world_size()
    model = sharded_model(kind, world, dtype) if kind else new_model(dtype)
    optimizer = fastopt.AdamW(model.parameters(), **settings)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    steps(model, optimizer, range(3, 5), dtype)
    other = new_model(dtype)
    twin = fastopt.AdamW(other.parameters(), **settings)
    steps(other, twin, range(5), dtype)
    for param, its in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits([whole(param)], [its])
        for name, value in twin.state[its].items():
            assert_same_bits([whole(optimizer.state[param][name])], [value])


RESHARDED = [
    (FP32, {}),
    *((BF16, {"master_weights": master}) for master in ("split", "fp32", "stochastic")),
    (BF16, {"state_dtype": BF16}),
    (BF16, {"state_dtype": "8bit"}),
    (FP16, {}),
    *((FP32, {"state_dtype": states}) for states in (BF16, "8bit")),
]


@pytest.mark.parametrize(("dtype", "settings"), RESHARDED, ids=str)
def test_saved_on_two_ranks_loaded_on_others(tmp_path, dtype, settings):
    settings = {**settings, "max_norm": 1.0}
    run(2, save, tmp_path, "fsdp", dtype, settings)
    for world, kind in ((3, "fsdp"), (4, "fsdp x tp"), (1, "fsdp"), (1, "")):
        run(world, load, tmp_path, kind, dtype, settings)
    run(1, save, tmp_path / "whole", "", dtype, settings)
    run(2, load, tmp_path / "whole", "fsdp", dtype, settings)


def from_one_to_the_other(folder, source, target, options):
    """Nothing that the other lacks is missed, and the script's own settings are left alone."""
    options = StateDictOptions(**options)
    models = [sharded_model("fsdp", 2) for _ in range(2)]
    made = []
    for (cls, settings), model in zip((source, target), models, strict=True):
        made.append(cls(model.parameters(), **settings))
    old, new = made
    old.param_groups[0]["lr"] = 0.125
    steps(models[0], old, range(3), FP32)
    state = get_optimizer_state_dict(models[0], old, options=options)
    dcp.save({"optimizer": state}, checkpoint_id=folder)
    own = new.state_dict()["param_groups"][0].keys()
    others = {key: value for key, value in new.param_groups[0].items() if key not in own}
    state = {"optimizer": get_optimizer_state_dict(models[1], new, options=options)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(models[1], new, state["optimizer"], options=options)
    assert new.param_groups[0]["lr"] == 0.125
    assert {key: new.param_groups[0][key] for key in others} == others
    for param, other in zip(*(model.parameters() for model in models), strict=True):
        found = new.state[other]
        assert found.keys() == old.state[param].keys()
        for name, value in old.state[param].items():
            assert_same_bits([whole(found[name])], [whole(value)])
    steps(models[1], new, range(3, 5), FP32)


@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}], ids=str)
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        ("SGD", {"momentum": 0.9}),
        ("SGD", {}),
        ("Adagrad", {}),
        ("RMSprop", {"centered": True}),
        ("Adam", {"amsgrad": True}),
        ("AdamW", {}),
    ],
    ids=str,
)
def test_from_torch_and_back_through_dcp(tmp_path, cls, settings, options):
    theirs = getattr(torch.optim, cls), settings
    ours = getattr(fastopt, cls), {**settings, "max_norm": 1.0, "clip_value": 2.0, "seed": 3}
    for number, (source, target) in enumerate([(theirs, ours), (ours, theirs), (ours, ours)]):
        run(2, from_one_to_the_other, tmp_path / str(number), source, target, options)


def from_torch_to_masters():
    """In memory, where torch.distributed.checkpoint would miss the masters."""
    models = [sharded_model("fsdp", 2, BF16) for _ in range(2)]
    theirs = torch.optim.AdamW(models[0].parameters())
    steps(models[0], theirs, range(3), BF16)
    models[1].load_state_dict(models[0].state_dict())
    ours = fastopt.AdamW(models[1].parameters())
    ours.load_state_dict(theirs.state_dict())
    for param, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            state = ours.state[other][name]
            assert state.placements == other.placements
            assert_same_bits([whole(state)], [whole(theirs.state[param][name]).float()])
    steps(models[1], ours, range(3, 5), BF16)
    assert all("param_remainder" in ours.state[param] for param in models[1].parameters())


def test_from_torch_to_masters():
    run(2, from_torch_to_masters)


class SlowWriter(dcp.FileSystemWriter):
    """Writes nothing before it may."""

    def __init__(self, *args):
        super().__init__(*args)
        self.may_write = threading.Event()

    def write_data(self, *args):
        assert self.may_write.wait(60)
        return super().write_data(*args)


def saved_meanwhile(folder, dtype, settings):
    model = sharded_model("fsdp", 2, dtype)
    optimizer = fastopt.AdamW(model.parameters(), **settings)
    steps(model, optimizer, range(3), dtype)
    writer = SlowWriter(folder)
    future = dcp.async_save(state_of(model, optimizer), storage_writer=writer)
    steps(model, optimizer, range(3, 6), dtype)
    assert not future.done()
    writer.may_write.set()
    future.result()


@pytest.mark.parametrize(("dtype", "settings"), RESHARDED, ids=str)
def test_saved_while_training_goes_on(tmp_path, dtype, settings):
    """What is saved is what there was at the call."""
    run(2, saved_meanwhile, tmp_path, dtype, settings)
    run(2, load, tmp_path, "fsdp", dtype, settings)


class Killed(dcp.FileSystemWriter):
    """Dies when its file has been written, before the others know of it."""

    def write_data(self, *args):
        super().write_data(*args).wait()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_data(*args)


def killed_in_a_save(folder):
    model = sharded_model("fsdp", 2, BF16)
    optimizer = fastopt.AdamW(model.parameters())
    steps(model, optimizer, range(3), BF16)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / "3")
    steps(model, optimizer, range(3, 6), BF16)
    dcp.save(state_of(model, optimizer), storage_writer=Killed(folder / "6"))


def test_killed_in_a_save(tmp_path):
    """The checkpoint before it is as good as ever, and the new one is not taken for one."""
    survivor, died = run_apart(2, killed_in_a_save, tmp_path, timeout=5)
    assert died == DIED
    assert survivor[0]
    assert list((tmp_path / "6").iterdir())
    with pytest.raises(dcp.api.CheckpointException):
        dcp.load({"x": torch.zeros(1)}, checkpoint_id=tmp_path / "6", no_dist=True)
    run(2, load, tmp_path / "3", "fsdp", BF16, {})
