"""A run that is killed and resumed, by another process, gives the bits of one that is not.

This file is also the script of those processes; see `main`.
"""

from __future__ import annotations

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
from helpers import assert_same_bits
from torch.distributed.checkpoint import state_dict as dcp_state_dict

import fastopt

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STATE_DTYPES = [FP32, BF16, "8bit"]

#: Of parameters, of masters and of states.
MODES = [
    *((BF16, master, states) for master in ("split", "fp32", "stochastic", None, "auto")
      for states in STATE_DTYPES),
    *((FP16, master, states) for master in ("fp32", None) for states in STATE_DTYPES),
    *((FP32, "auto", states) for states in STATE_DTYPES),
]  # fmt: skip

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


class Training:
    """A tiny model in one mode, and all that a checkpoint has to hold."""

    def __init__(self, index: int, untrained: bool = False) -> None:
        self.dtype, master, states = MODES[index]
        cls, settings = OPTIMIZERS[index % len(OPTIMIZERS)]
        # A process that resumes begins with other weights and random numbers.
        generator = torch.Generator().manual_seed(1000 * untrained + index)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(20, 30), torch.nn.LayerNorm(30), torch.nn.GELU(), torch.nn.Linear(30, 5)
        ).to(self.dtype)
        with torch.no_grad():
            for param in self.model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) / 4)
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
        self.generator = generator

    def step(self) -> None:
        x = torch.randn(16, 20, generator=self.generator).to(self.dtype)
        loss = (self.model(x) - x[:, :5]).square().mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def others(self) -> dict:
        """What is in a checkpoint beside the model and the optimizer."""
        return {"scaler": self.scaler.state_dict(), "generator": self.generator.get_state()}

    def load_others(self, checkpoint: dict) -> None:
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.generator.set_state(checkpoint["generator"])

    def prepare_state(self) -> None:
        """Gives the optimizer the states that dcp.load wants to write to."""
        for param in self.model.parameters():
            param.grad = torch.zeros_like(param)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.zero_grad()

    def result(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **self.others(),
        }


class ByTorchSave:
    """One file."""

    @staticmethod
    def save(trainings: list[Training], step: int, path: Path) -> None:
        torch.save({"step": step, "runs": [training.result() for training in trainings]}, path)

    @staticmethod
    def load(trainings: list[Training], path: Path) -> int:
        checkpoint = torch.load(path, weights_only=True)
        for i, (training, saved) in enumerate(zip(trainings, checkpoint["runs"], strict=True)):
            if i % 2:
                training.model.load_state_dict(saved["model"])
            training.optimizer.load_state_dict(saved["optimizer"])
            if not i % 2:
                training.model.load_state_dict(saved["model"])
            training.load_others(saved)
        return checkpoint["step"]


class Counter:
    """torch.distributed.checkpoint's notion of a Stateful: it has these two methods."""

    def __init__(self, step: int = 0) -> None:
        self.step = step

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict) -> None:
        self.step = state_dict["step"]


class Others:
    def __init__(self, training: Training) -> None:
        self.state_dict = training.others
        self.load_state_dict = training.load_others


class ByStateful:
    """torch.distributed.checkpoint of models and optimizers as they are."""

    @staticmethod
    def states(trainings: list[Training], counter: Counter) -> dict:
        states: dict = {"counter": counter}
        for i, training in enumerate(trainings):
            names = ("model", "optimizer", "others") if i % 2 else ("others", "optimizer", "model")
            each = {
                "model": training.model,
                "optimizer": training.optimizer,
                "others": Others(training),
            }
            states |= {f"{name}{i}": each[name] for name in names}
        return states

    @classmethod
    def save(cls, trainings: list[Training], step: int, path: Path) -> None:
        dcp.save(cls.states(trainings, Counter(step)), checkpoint_id=path, no_dist=True)

    @classmethod
    def load(cls, trainings: list[Training], path: Path) -> int:
        for training in trainings:
            training.prepare_state()
        counter = Counter()
        dcp.load(cls.states(trainings, counter), checkpoint_id=path, no_dist=True)
        return counter.step


class ByFunctions:
    """torch.distributed.checkpoint of what its functions make of them: states by name."""

    @staticmethod
    def states(trainings: list[Training], step: int) -> dict:
        states: dict = {"step": step}
        for i, training in enumerate(trainings):
            model, optimizer = dcp_state_dict.get_state_dict(training.model, training.optimizer)
            states[str(i)] = {"model": model, "optimizer": optimizer, **training.others()}
        return states

    @classmethod
    def save(cls, trainings: list[Training], step: int, path: Path) -> None:
        dcp.save(cls.states(trainings, step), checkpoint_id=path, no_dist=True)

    @classmethod
    def load(cls, trainings: list[Training], path: Path) -> int:
        states = cls.states(trainings, 0)
        dcp.load(states, checkpoint_id=path, no_dist=True)
        for i, training in enumerate(trainings):
            saved = states[str(i)]
            dcp_state_dict.set_state_dict(
                training.model,
                training.optimizer,
                model_state_dict=saved["model"],
                optim_state_dict=saved["optimizer"],
            )
            training.load_others(saved)
        return states["step"]


WAYS = {way.__name__: way for way in (ByTorchSave, ByStateful, ByFunctions)}


def main(way_name: str, folder: Path) -> None:
    """Trains, from the last checkpoint if there is one, with a line of output for each step."""
    way = WAYS[way_name]
    checkpoints = sorted(folder.glob("checkpoint*"))
    trainings = [Training(i, untrained=bool(checkpoints)) for i in range(len(MODES))]
    begin = way.load(trainings, checkpoints[-1]) if checkpoints else 0
    print("from", begin, flush=True)
    for step in range(begin, STEPS):
        for training in trainings:
            training.step()
            print(step, flush=True)
        if (step + 1) % EVERY == 0:
            way.save(trainings, step + 1, folder / "unfinished")
            os.replace(folder / "unfinished", folder / f"checkpoint{step + 1:03}")
    if not checkpoints:
        signal.pause()  # to be killed
    torch.save([training.result() for training in trainings], folder / "result")


@pytest.fixture(scope="module")
def uninterrupted():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainings = [Training(i) for i in range(len(MODES))]
    for training in trainings:
        for _ in range(STEPS):
            training.step()
    torch.set_num_threads(threads)
    return trainings


def assert_same(found, wanted):
    """Nested dicts and lists, with the same bits in their tensors."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)
    elif isinstance(wanted, torch.Tensor):
        assert_same_bits([found], [wanted])
    else:
        assert found == wanted


def test_all_that_should_happen_in_a_run_happens(uninterrupted):
    for (dtype, *_), training in zip(MODES, uninterrupted, strict=True):
        assert all(param.isfinite().all() for param in training.model.parameters())
        if dtype == FP16:
            scaler = training.scaler.state_dict()
            assert math.log2(scaler["scale"]) < 12 + STEPS // 3  # a step was skipped


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
    for mode, found, training in zip(
        MODES, torch.load(tmp_path / "result", weights_only=True), uninterrupted, strict=True
    ):
        try:
            assert_same(found, training.result())
        except AssertionError as error:
            raise AssertionError(f"{mode}, {told}: {error}") from None


if __name__ == "__main__":
    warnings.simplefilter("error", RuntimeWarning)
    torch.set_num_threads(1)  # as in the other run: it matters to torch's matrix products
    main(sys.argv[1], Path(sys.argv[2]))
