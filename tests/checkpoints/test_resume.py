"""A run that is killed and resumed, by another process, gives the bits of one that is not.

This file is also the script of those processes; see `main`.
"""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import BF16, FP16, MODES, STATE_DTYPES
from saved_runs import assert_same
from torch.distributed.checkpoint import state_dict as dcp_state_dict

import fastopt

MODES = [*MODES, *((BF16, "auto", states) for states in STATE_DTYPES)]
#: They take the modes in turn; five, so that none meets always the same of the three states.
OPTIMIZERS = [
    (fastopt.AdamW, {"lr": 3e-3, "amsgrad": True, "weight_decay": 0.1}),
    (fastopt.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    (fastopt.RMSprop, {"lr": 1e-3, "momentum": 0.9}),
    (fastopt.Adam, {"lr": 3e-3, "max_norm": 1.0}),
    (fastopt.SGD, {"lr": 1e-2, "max_norm": 1.0}),
]
STEPS = 24
EVERY = 4  # steps between checkpoints
#: By one file; by torch.distributed.checkpoint, of state dicts as they are, and by its functions.
WAYS = ["torch.save", "dcp", "dcp by name"]


class Training:
    """A tiny model in one mode, and all that a checkpoint has to hold."""

    def __init__(self, index, way="", untrained=False):
        self.index, self.by_name, self.steps = index, way == "dcp by name", 0
        self.dtype, master, states = MODES[index]
        cls, settings = OPTIMIZERS[index % len(OPTIMIZERS)]
        # A process that resumes begins with other weights and random numbers.
        self.generator = torch.Generator().manual_seed(1000 * untrained + index)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(20, 30), torch.nn.LayerNorm(30), torch.nn.GELU(), torch.nn.Linear(30, 5)
        ).to(self.dtype)
        with torch.no_grad():
            for param in self.model.parameters():
                param.copy_(torch.randn(param.shape, generator=self.generator) / 4)
        weights = [param for param in self.model.parameters() if param.ndim > 1]
        others = [param for param in self.model.parameters() if param.ndim <= 1]
        self.optimizer = cls(
            [{"params": weights}, {"params": others, "weight_decay": 0.0, "seed": 7}],
            **settings,
            master_weights=master,
            state_dtype=states,
        )
        # Grows every third step, soon into an overflow, whose step is skipped.
        self.scaler = fastopt.GradScaler(
            "cpu", init_scale=2.0**12, growth_interval=3, enabled=self.dtype == FP16
        )

    def step(self):
        x = torch.randn(16, 20, generator=self.generator).to(self.dtype)
        loss = (self.model(x) - x[:, :5]).square().mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps += 1

    def state_dict(self):
        if self.by_name:
            model, optimizer = dcp_state_dict.get_state_dict(self.model, self.optimizer)
        else:
            model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        others = {"scaler": self.scaler.state_dict(), "generator": self.generator.get_state()}
        return {"model": model, "optimizer": optimizer, "steps": self.steps, **others}

    def load_state_dict(self, saved):
        if self.by_name:
            dcp_state_dict.set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=saved["model"],
                optim_state_dict=saved["optimizer"],
            )
        else:
            for name in ("model", "optimizer")[:: 1 if self.index % 2 else -1]:
                getattr(self, name).load_state_dict(saved[name])
        self.scaler.load_state_dict(saved["scaler"])
        self.generator.set_state(saved["generator"])
        self.steps = saved["steps"]


def save(way, trainings, path):
    if way == "torch.save":
        torch.save([training.state_dict() for training in trainings], path)
    else:
        states = {str(training.index): training for training in trainings}
        dcp.save(states, checkpoint_id=path, no_dist=True)


def load(way, trainings, path):
    if way == "torch.save":
        for training, saved in zip(trainings, torch.load(path, weights_only=True), strict=True):
            training.load_state_dict(saved)
    else:
        for training in trainings:  # makes the states that dcp.load wants to write to
            dcp_state_dict.get_optimizer_state_dict(training.model, training.optimizer)
        states = {str(training.index): training for training in trainings}
        dcp.load(states, checkpoint_id=path, no_dist=True)


def main(way, folder):
    """Trains, from the last checkpoint if there is one, with a line of output for each step."""
    checkpoints = sorted(folder.glob("checkpoint*"))
    trainings = [Training(i, way, untrained=bool(checkpoints)) for i in range(len(MODES))]
    if checkpoints:
        load(way, trainings, checkpoints[-1])
    begin = trainings[0].steps
    print("from", begin, flush=True)
    for step in range(begin, STEPS):
        for training in trainings:
            training.step()
            print(step, flush=True)
        if (step + 1) % EVERY == 0:
            save(way, trainings, folder / "unfinished")
            os.replace(folder / "unfinished", folder / f"checkpoint{step + 1:03}")
    if not checkpoints:
        signal.pause()  # to be killed
    for training in trainings:
        training.by_name = False
    save("torch.save", trainings, folder / "result")


@pytest.fixture(scope="module")
def uninterrupted():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainings = [Training(i) for i in range(len(MODES))]
    for training in trainings * STEPS:
        training.step()
    torch.set_num_threads(threads)
    for training in trainings:
        assert all(param.isfinite().all() for param in training.model.parameters())
        if training.dtype == FP16:  # a step was skipped
            assert math.log2(training.scaler.get_scale()) < 12 + STEPS // 3
    return [training.state_dict() for training in trainings]


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_resumed(way, tmp_path, uninterrupted):
    def start():
        return subprocess.Popen(
            [sys.executable, __file__, way, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    # After the first checkpoint and before the last step.
    lines = random.randrange(EVERY * len(MODES) + 1, (STEPS - 1) * len(MODES))
    with start() as process:
        seen = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        seen += process.stdout.readlines()
    told = f"killed after {lines} lines, the last of which were {seen[-5:]}"
    assert process.returncode == -signal.SIGKILL, told
    # A checkpoint may have been on its way, and the last one may not have been finished.
    if (tmp_path / "unfinished").is_dir():
        shutil.rmtree(tmp_path / "unfinished")

    with start() as process:
        output = process.stdout.read()
    assert process.returncode == 0, f"{told}; {output}"
    assert "from 0" not in output.splitlines(), told
    result = torch.load(tmp_path / "result", weights_only=True)
    for mode, found, wanted in zip(MODES, result, uninterrupted, strict=True):
        try:
            assert_same(found, wanted)
        except AssertionError as error:
            raise AssertionError(f"{mode}, {told}: {error}") from None


if __name__ == "__main__":
    warnings.simplefilter("error", RuntimeWarning)
    torch.set_num_threads(1)  # as in the other run: it matters to torch's matrix products
    main(sys.argv[1], Path(sys.argv[2]))
