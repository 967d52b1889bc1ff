"""`make demo`: train one small GPT twice, with torch's fused AdamW and with fastopt's.

Both runs start from the same weights and see the same batches. They take turns within one loop, so
that whatever else the machine is doing slows both alike.
"""

import argparse
import copy
import math
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

import fastopt
from bench.arguments import at_least
from bench.footprints import state_tensors, stored_bytes
from bench.gpt import GPT, GPTConfig

MAX_NORM = 1.0
TEXT_BYTES = 4_000_000
TOLERANCE = 0.01  # how far the two final losses may be apart

Batch = tuple[Tensor, Tensor]


@dataclass
class Run:
    """One model in training with one optimizer, and what was measured on the way."""

    name: str
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    iteration_ms: list[float] = field(default_factory=list)
    held_out: float = math.nan

    def update(self) -> None:
        """Clip the gradients and step, as a user of this optimizer writes it."""
        if not isinstance(self.optimizer, fastopt.AdamW):  # fastopt clips within its step
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def iterate(self, batch: Batch) -> None:
        """One training iteration, timed."""
        device = batch[0].device
        start = now(device)
        self.optimizer.zero_grad()
        loss = batch_loss(self.model, batch)
        self.backward(loss)
        before = now(device)
        self.update()
        after = now(device)
        self.scheduler.step()

        self.losses.append(loss.item())
        self.step_ms.append(1e3 * (after - before))
        self.iteration_ms.append(1e3 * (now(device) - start))
        if not math.isfinite(self.losses[-1]):
            sys.exit(f"{self.name}: the loss is {self.losses[-1]} at iteration {len(self.losses)}.")

    @property
    def final_loss(self) -> float:
        """Mean loss over the last tenth of the iterations."""
        return mean(self.losses[-max(1, len(self.losses) // 10) :])

    @property
    def state_bytes(self) -> int:
        """Bytes of memory under the optimizer's state."""
        return stored_bytes(chain.from_iterable(state_tensors(self.optimizer).values()))


def now(device: torch.device) -> float:
    """Seconds on a clock that has waited for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    inputs, targets = batch
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def standard_library_text(context: int) -> tuple[Tensor, Tensor]:
    """Source text of this Python's standard library as bytes: to train on, and a tenth held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    text = bytearray()
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            text += path.read_text(encoding="utf-8", errors="ignore").encode()
        if len(text) >= TEXT_BYTES:
            break
    del text[TEXT_BYTES:]
    if len(text) // 10 <= context:
        sys.exit(f"{len(text):,} bytes of source in {root} are too few for a context of {context}.")
    data = torch.frombuffer(text, dtype=torch.uint8).long()
    return data[: -(len(data) // 10)], data[-(len(data) // 10) :]


def batches(text: Tensor, args: argparse.Namespace, count: int) -> Iterator[Batch]:
    """`count` batches of random windows, each with the same windows one byte later."""
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(count):
        starts = torch.randint(len(text) - args.context, (args.batch_size, 1), generator=generator)
        windows = text[starts + torch.arange(args.context + 1)].to(args.device)
        yield windows[:, :-1], windows[:, 1:]


def make_runs(args: argparse.Namespace) -> list[Run]:
    """The same model twice, under torch's optimizer and under ours."""
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(context=args.context)).to(args.device)

    def run(name: str, make_optimizer: Callable[..., Optimizer], **extra: Any) -> Run:
        own = copy.deepcopy(model)
        return Run(name, own, *scheduled(own, make_optimizer, args.iterations, **extra))

    return [
        run("torch.optim", torch.optim.AdamW, fused=True),
        run("fastopt", fastopt.AdamW, max_norm=MAX_NORM),
    ]


def scheduled(
    model: nn.Module, make_optimizer: Callable[..., Optimizer], iterations: int, **extra: Any
) -> tuple[Optimizer, LRScheduler]:
    """An AdamW for the model, which decays matrices only, and its learning rate's schedule."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = make_optimizer(groups, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1, **extra)
    return optimizer, warmup_cosine(optimizer, iterations)


def warmup_cosine(optimizer: Optimizer, iterations: int) -> LRScheduler:
    """Linear warm-up over the first tenth, then a cosine down to a tenth of the learning rate."""
    warmup = max(1, iterations // 10)
    up = LinearLR(optimizer, start_factor=0.1, total_iters=warmup)
    lr = optimizer.defaults["lr"]
    down = CosineAnnealingLR(optimizer, T_max=max(1, iterations - warmup), eta_min=lr / 10)
    return SequentialLR(optimizer, [up, down], milestones=[warmup])


def train(
    runs: Sequence[Run],
    text: Tensor,
    args: argparse.Namespace,
    console: Console,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Let the runs take turns at the same batches, under a progress bar, a check after each."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[losses]}"),
    )
    start = perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=args.iterations, losses="")
        for i, batch in enumerate(batches(text, args, args.iterations)):
            for run in runs if i % 2 == 0 else reversed(runs):
                run.iterate(batch)
            check()
            losses = " | ".join(f"{run.losses[-1]:.3f}" for run in runs)
            progress.update(task, advance=1, losses=losses)
            if perf_counter() - start > args.time_limit:
                progress.print(f"Stopped after {i + 1} iterations: {args.time_limit} s are over.")
                break


@torch.no_grad()
def evaluate(runs: Sequence[Run], text: Tensor, args: argparse.Namespace) -> None:
    """Measure the loss on text that no run has seen."""
    for run in runs:
        run.held_out = mean(batch_loss(run.model, b).item() for b in batches(text, args, 20))


def paired_ratio(a: list[float], b: list[float]) -> float:
    """Median of a[i] / b[i]: taken turn by turn, it is spared the swings of the machine."""
    return median(x / y for x, y in zip(a, b, strict=True))


def table(a: Run, b: Run) -> Table:
    """What was measured, a column for each run."""
    result = Table(
        title="torch.optim: AdamW(fused=True) + clip_grad_norm_; fastopt: AdamW(max_norm=)",
        caption="loss: mean of the last tenth; times: medians, clip included, ratio by turns",
    )
    result.add_column()
    for header in (a.name, b.name, f"{a.name} / {b.name}"):
        result.add_column(header, justify="right")

    def row(label: str, x: float, y: float, form: str, ratio: float) -> None:
        result.add_row(label, f"{x:{form}}", f"{y:{form}}", f"{ratio:.3f}")

    def time_row(label: str, x: list[float], y: list[float]) -> None:
        row(label, median(x), median(y), ".2f", paired_ratio(x, y))

    row("final loss", a.final_loss, b.final_loss, ".4f", a.final_loss / b.final_loss)
    row("held-out loss", a.held_out, b.held_out, ".4f", a.held_out / b.held_out)
    time_row("ms per optimizer step", a.step_ms, b.step_ms)
    time_row("ms per iteration", a.iteration_ms, b.iteration_ms)
    row("optimizer state, bytes", a.state_bytes, b.state_bytes, ",d", a.state_bytes / b.state_bytes)
    return result


def plot(runs: list[Run], caption: str, out: Path) -> None:
    """Draw both loss curves and both optimizers' step times."""
    # The curves lie on each other: a thin dashed one over a thick pale one shows both.
    styles = (
        {"color": "tab:orange", "linewidth": 5, "alpha": 0.45},
        {"color": "tab:blue", "linewidth": 1.3, "linestyle": "--"},
    )
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    losses, times = figure.subplots(1, 2)
    figure.suptitle(caption)
    for run, style in zip(runs, styles, strict=True):
        middle = median(run.step_ms)
        losses.plot(run.losses, label=run.name, **style)
        times.plot(run.step_ms, ".", color=style["color"], alpha=0.45)
        times.axhline(middle, label=f"{run.name}: median {middle:.1f} ms", color=style["color"])
    losses.set(title="Training loss", xlabel="iteration", ylabel="cross-entropy (nats per byte)")
    # Steps that the machine interrupted must not squash the others.
    top = 2.5 * max(median(run.step_ms) for run in runs)
    beyond = sum(ms > top for run in runs for ms in run.step_ms)
    xlabel = f"iteration ({beyond} slower steps lie above)" if beyond else "iteration"
    times.set(xlabel=xlabel, ylabel="time (ms)", ylim=(0, top))
    times.set(title="Optimizer step, gradient clipping included")
    for axes in (losses, times):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    figure.savefig(out, dpi=130)


def add_training_arguments(parser: argparse.ArgumentParser, iterations: int) -> None:
    """Add what a command line says about every training run."""
    count = at_least(1)
    parser.add_argument("--iterations", type=count, default=iterations)
    parser.add_argument("--batch-size", type=count, default=8, help="sequences in a batch")
    parser.add_argument("--context", type=count, default=64, help="bytes in a sequence")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--threads", type=count, help="CPU threads (default: torch's choice)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=device)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    add_training_arguments(parser, iterations=200)
    parser.add_argument(
        "--time-limit", type=at_least(1), default=240, help="seconds after which to stop training"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/demo.png"))
    return parser.parse_args()


def main() -> None:
    """Train, report, and fail if the two losses differ."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    console = Console()

    training_text, held_out_text = standard_library_text(args.context)
    runs = make_runs(args)
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    caption = (
        f"AdamW on a GPT of {parameters / 1e6:.1f}M parameters, Python's standard library as text, "
        f"{args.batch_size} x {args.context} bytes a batch, {args.device}, "
        f"{torch.get_num_threads()} threads"
    )
    console.print(caption)
    train(runs, training_text, args, console)
    evaluate(runs, held_out_text, args)

    torch_run, fastopt_run = runs
    console.print(table(torch_run, fastopt_run))
    plot(runs, caption, args.out)
    console.print(f"Picture: {args.out}")
    difference = abs(fastopt_run.final_loss / torch_run.final_loss - 1)
    speed = paired_ratio(torch_run.step_ms, fastopt_run.step_ms)
    console.print(
        f"The final losses differ by a relative {difference:.1e} (allowed: {TOLERANCE}). "
        f"Clip and step together run at {speed:.2f} times torch's speed."
    )
    if difference > TOLERANCE:
        sys.exit(f"The final losses differ by more than {TOLERANCE:.0%}: something is wrong.")


if __name__ == "__main__":
    main()
