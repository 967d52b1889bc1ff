"""``python -m bench.trajectories``: does the precision of weights and states change the training?

Trains the demo's GPT with fastopt.AdamW in seven precisions, from the same weights, which all of
them can represent exactly, on the same batches, with the demo's clipping, warm-up and cosine. It
shows the losses, how far each is from fp32's, and what the optimizer's state costs. After every
step the masters and the parameters of the split mode must be those of the fp32 masters, bit for
bit; the first difference ends the program with an error.

Forward and backward passes compute in fp32 from weights of 16 bits, and the gradients arrive in 16
bits: a CPU without matrix units for bf16 runs torch's 16-bit matrix products many times slower. So
what differs between the runs is what the optimizer gets and keeps; under the GradScaler gradients
do overflow where fp16 cannot hold them.

Besides it decays weights of 1 that have zero gradients, each step by less than bf16 can express.
"""

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

import fastopt
from bench import machine, modes, tables
from bench.arguments import at_least
from bench.demo import (
    MAX_NORM,
    Run,
    add_training_arguments,
    evaluate,
    scheduled,
    standard_library_text,
    train,
)
from bench.gpt import GPT, GPTConfig
from bench.modes import Mode
from bench.tables import Cell, Line

MODES = (
    *(modes.FP32, modes.MASTER, modes.SPLIT, modes.FP16_MASTER),
    *(modes.STOCHASTIC, modes.SPLIT_8BIT, modes.NONE),
)
DECAYED = (modes.FP32, modes.MASTER, modes.SPLIT, modes.STOCHASTIC, modes.NONE)
DECAY_STEPS, LR, WEIGHT_DECAY = 2000, 1e-4, 0.1
# Curves that lie on each other: thin dashed ones over thick pale ones show all.
STYLES = {
    modes.FP32: {"color": "black", "linewidth": 5, "alpha": 0.25},
    modes.MASTER: {"color": "tab:orange", "linewidth": 3.5, "alpha": 0.5},
    modes.SPLIT: {"color": "tab:blue", "linewidth": 1.5, "linestyle": "--"},
    modes.FP16_MASTER: {"color": "tab:purple"},
    modes.STOCHASTIC: {"color": "tab:green"},
    modes.SPLIT_8BIT: {"color": "tab:cyan"},
    modes.NONE: {"color": "tab:red"},
}
RUN_COLUMNS = ("precision", "state bytes/param", "final loss", "- fp32's", "held-out", "- fp32's")
DECAY_COLUMNS = ("precision", f"weight after {DECAY_STEPS} steps", "of the exact decay")
NOTE = "forward and backward in fp32 on weights of 16 bits, gradients of 16 bits"


class InFP32(nn.Module):
    """A model that computes in fp32, whatever the dtype of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        parameters = {name: param.float() for name, param in self.model.named_parameters()}
        output: Tensor = torch.func.functional_call(self.model, parameters, inputs)
        return output


@dataclass
class ScaledRun(Run):
    """Training under a GradScaler."""

    scaler: fastopt.GradScaler = field(kw_only=True)
    skipped: int = 0

    def backward(self, loss: Tensor) -> None:
        super().backward(self.scaler.scale(loss))

    def update(self) -> None:
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < scale


def make_runs(args: argparse.Namespace) -> dict[Mode, Run]:
    """The same model in every precision."""
    torch.manual_seed(args.seed)
    config = GPTConfig(context=args.context, layers=args.layers, heads=args.heads, width=args.width)
    model = GPT(config).to(args.device)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.bfloat16().half())  # what both hold exactly

    def run(mode: Mode) -> Run:
        own = InFP32(copy.deepcopy(model).to(mode.dtype))
        settings = {"max_norm": MAX_NORM, **mode.settings}
        made = mode.name, own, *scheduled(own, fastopt.AdamW, args.iterations, **settings)
        if mode.dtype != torch.float16:
            return Run(*made)
        # It grows often enough to overflow now and then.
        interval = max(1, args.iterations // 10)
        return ScaledRun(
            *made, scaler=fastopt.GradScaler(args.device.type, growth_interval=interval)
        )

    return {mode: run(mode) for mode in MODES}


def weights(run: Run) -> Iterator[Tensor]:
    return chain(run.model.parameters(), run.optimizer.master_params())


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def check_split(split: Run, full: Run) -> None:
    """End the program where parameters or masters of the two modes differ."""
    for number, (ours, theirs) in enumerate(zip(weights(split), weights(full), strict=True)):
        if not torch.equal(bits(ours), bits(theirs)):
            sys.exit(
                f"Iteration {len(split.losses)}: tensor {number} of the parameters and masters, of "
                f"shape {tuple(ours.shape)}, differs between {split.name} and {full.name} in "
                f"{(bits(ours) != bits(theirs)).sum()} elements."
            )


def decay(mode: Mode) -> list[float]:
    """The mean weight after each step, of the masters where there are any."""
    weight = torch.ones(4096, dtype=mode.dtype, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    optimizer = fastopt.AdamW([weight], lr=LR, weight_decay=WEIGHT_DECAY, **mode.settings)
    masters = mode.settings.get("master_weights") in ("split", "fp32")
    means = []
    for _ in range(DECAY_STEPS):
        optimizer.step()
        kept = next(iter(optimizer.master_params())) if masters else weight
        means.append(kept.detach().double().mean().item())
    return means


def exact_decay(steps: int) -> float:
    return (1 - LR * WEIGHT_DECAY) ** steps


def run_lines(runs: dict[Mode, Run]) -> Iterator[Line]:
    fp32 = runs[modes.FP32]
    parameters = sum(param.numel() for param in fp32.model.parameters())
    for run in runs.values():
        skipped = f" ({run.skipped} steps skipped)" if isinstance(run, ScaledRun) else ""
        yield (
            Cell(run.name + skipped),
            Cell(f"{run.state_bytes / parameters:.2f}"),
            Cell(f"{run.final_loss:.4f}"),
            Cell(f"{run.final_loss - fp32.final_loss:+.4f}"),
            Cell(f"{run.held_out:.4f}"),
            Cell(f"{run.held_out - fp32.held_out:+.4f}"),
        )


def decay_lines(means: dict[Mode, list[float]]) -> Iterator[Line]:
    exact = exact_decay(DECAY_STEPS)
    yield Cell("exact"), Cell(f"{exact:.6f}"), Cell("100.0%")
    for mode, curve in means.items():
        part = (1 - curve[-1]) / (1 - exact)
        yield Cell(mode.name), Cell(f"{curve[-1]:.6f}"), Cell(f"{part:.1%}")


def smoothed(losses: list[float]) -> Tensor:
    """Running mean."""
    window = max(1, len(losses) // 40)
    return torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(-1)


def plot(runs: dict[Mode, Run], means: dict[Mode, list[float]], caption: str, out: Path) -> None:
    """Draw the losses, their distances from fp32's, and the decay."""
    figure = Figure(figsize=(17, 5.6), layout="constrained")
    figure.suptitle(caption, fontsize="medium")
    losses, differences, decays = figure.subplots(1, 3)
    fp32 = smoothed(runs[modes.FP32].losses)
    first = len(runs[modes.FP32].losses) - len(fp32)
    iterations = range(first, first + len(fp32))
    for mode, run in runs.items():
        curve = smoothed(run.losses)
        losses.plot(iterations, curve, label=mode.name, **STYLES[mode])
        differences.plot(iterations, curve - fp32, label=mode.name, **STYLES[mode])
    losses.set(title="Training loss, running mean", ylabel="cross-entropy (nats per byte)")
    differences.set(title="The same, minus fp32's", ylabel="nats per byte")
    for mode, curve in means.items():
        decays.plot(curve, label=mode.name, **STYLES[mode])
    exact = [exact_decay(step + 1) for step in range(DECAY_STEPS)]
    decays.plot(exact, label="exact", color="black", linewidth=1, linestyle=":")
    decays.set(title=f"Weight decay of {LR * WEIGHT_DECAY:.0e} a step", ylabel="mean weight")
    for axes in (losses, differences, decays):
        finish(axes)
    figure.savefig(out, dpi=130)


def finish(axes: Axes) -> None:
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.trajectories", description=__doc__)
    add_training_arguments(parser, iterations=2000)
    parser.set_defaults(time_limit=math.inf)  # curves that end early would not compare
    parser.add_argument("--width", type=at_least(1), default=128)
    parser.add_argument("--layers", type=at_least(1), default=4)
    parser.add_argument("--heads", type=at_least(1), default=4)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="a folder")
    return parser.parse_args()


def main() -> None:
    """Train, and write the picture and the tables when all is done."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    console = tables.terminal()
    training_text, held_out_text = standard_library_text(args.context)
    runs = make_runs(args)
    parameters = sum(param.numel() for param in runs[modes.FP32].model.parameters())
    caption = (
        f"fastopt.AdamW on a GPT of {parameters / 1e6:.2f}M parameters, {args.iterations} "
        f"iterations of {args.batch_size} x {args.context} bytes, {args.device}\n{NOTE}"
    )
    console.print(caption)
    try:
        results = measure(runs, training_text, held_out_text, args, console)
    except KeyboardInterrupt:
        sys.exit("Interrupted: nothing was written.")
    made = (RUN_COLUMNS, list(run_lines(runs))), (DECAY_COLUMNS, list(decay_lines(results)))
    for columns, lines in made:
        console.print(tables.table(columns, iter(lines)))
    args.out.mkdir(parents=True, exist_ok=True)
    picture, markdown = args.out / "trajectories.png", args.out / "trajectories.md"
    plot(runs, results, caption, picture)
    heading = (
        f"`python -m bench.trajectories`, {machine.cpu()}, torch {torch.__version__}: {caption}"
    )
    markdown.write_text("\n\n".join([heading, *(tables.pipes(*table) for table in tables)]) + "\n")
    console.print(f"{picture}, {markdown}")


def measure(
    runs: dict[Mode, Run],
    training_text: Tensor,
    held_out_text: Tensor,
    args: argparse.Namespace,
    console: Console,
) -> dict[Mode, list[float]]:
    """Train and evaluate the runs; the curves of the decay."""
    split, full = runs[modes.SPLIT], runs[modes.MASTER]
    everyone = list(runs.values())
    train(everyone, training_text, args, console, partial(check_split, split, full))
    console.print(f"{split.name} and {full.name}: equal in every bit after every step.")
    evaluate(everyone, held_out_text, args)
    return {mode: decay(mode) for mode in DECAYED}


if __name__ == "__main__":
    main()
