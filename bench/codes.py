"""``python -m bench.codes``: why fastopt's 8-bit states have the codes that they have.

Trains the demo's GPT with AdamW in plain torch operators. First once, with fp32 moments, while
other moments that see the same gradients are rounded after each step in some way: how far are the
updates that they would make from the true ones? Then once for each way with its own updates: how
far do the losses part from those of fp32 moments? Writes a picture and a Markdown table.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from fastopt.packing import CODE_BLOCK, PACKINGS, WHOLE, Stored, random_bits

from .demo import Batch, batch_loss, batches, standard_library_text
from .gpt import GPT, GPTConfig

BETA1, BETA2, EPS, LR = 0.9, 0.999, 1e-8, 1e-3
EVERY = 25  # steps between measurements

Round = Callable[[Tensor, int], Tensor]  # numbers and the step's number to what is kept of them


def as_they_are(x: Tensor, step: int) -> Tensor:
    return x


def as_bf16(x: Tensor, step: int) -> Tensor:
    return x.bfloat16().float()


def packed(packing: str, nearest: bool, x: Tensor, step: int) -> Tensor:
    """As fastopt keeps it."""

    def random(like: Tensor) -> Tensor:
        if nearest:
            return torch.full_like(like, 0x80008000, dtype=torch.int64)
        return random_bits(0, step, 0, WHOLE, like)

    blocks, kind = in_blocks(x), PACKINGS[packing]
    stored = Stored(torch.empty_like(blocks, dtype=kind.a), packing, kind.new_b(blocks, CODE_BLOCK))
    stored.pack_(blocks, random)
    return stored.unpack(torch.float32).flatten()[: x.numel()].view_as(x)


def in_blocks(x: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % CODE_BLOCK))
    return padded.view(-1, CODE_BLOCK)


def by_table(levels: Tensor, floor: bool, x: Tensor, step: int) -> Tensor:
    """The nearest of 256 levels from -1 to 1 times the largest of a block."""
    blocks = in_blocks(x)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    y = blocks / scale
    above = torch.searchsorted(levels, y.contiguous()).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    nearest = torch.where(y - low > high - y, high, low)
    if floor:
        nearest = nearest.clamp(min=float(levels[levels > 0].min()))
    return (nearest * scale).flatten()[: x.numel()].view_as(x)


@cache
def dynamic_tree(signed: bool) -> Tensor:
    """Dettmers et al. 2022: decades, each with twice as many levels as the one below."""
    found = [0.0, 1.0]
    for decade in range(7):
        steps = 2 ** (decade + (0 if signed else 1))
        bounds = torch.linspace(0.1, 1, steps + 1)
        means = (10.0 ** (decade - 6) * (bounds[:-1] + bounds[1:]) / 2).tolist()
        found += means + ([-x for x in means] if signed else [])
    return torch.tensor(sorted(found))


LINEAR = torch.arange(-127, 128) / 127
ROOT = (torch.arange(256) / 255) ** 2

#: The moments' names in the table, and how each is rounded.
WAYS: dict[str, tuple[Round, Round]] = {
    "fp32": (as_they_are, as_they_are),
    "bf16, to nearest": (as_bf16, as_bf16),
    "bf16, stochastic (fastopt)": (partial(packed, "stochastic", False),) * 2,
    "8 bit, fastopt": (partial(packed, "codes", False), partial(packed, "unsigned_codes", False)),
    "the same, to nearest": (
        partial(packed, "codes", True),
        partial(packed, "unsigned_codes", True),
    ),
    "dynamic tree": (
        partial(by_table, dynamic_tree(True), False),
        partial(by_table, dynamic_tree(False), False),
    ),
    "linear, and its root": (partial(by_table, LINEAR, False), partial(by_table, ROOT, False)),
    "the same, never 0": (partial(by_table, LINEAR, False), partial(by_table, ROOT, True)),
}


class Moments:
    """Adam's, of one parameter, rounded after each step."""

    def __init__(self, param: Tensor, way: tuple[Round, Round]) -> None:
        self.exp_avg = self.exp_avg_sq = torch.zeros_like(param)
        self.round, self.round_sq = way

    def update(self, grad: Tensor, step: int) -> Tensor:
        """What AdamW subtracts, for a learning rate of 1."""
        exp_avg = self.exp_avg.lerp(grad, 1 - BETA1)
        exp_avg_sq = self.exp_avg_sq.lerp(grad.square(), 1 - BETA2)
        self.exp_avg = self.round(exp_avg, step)
        self.exp_avg_sq = self.round_sq(exp_avg_sq, step)
        root = (exp_avg_sq / (1 - BETA2**step)).sqrt()
        return exp_avg / (1 - BETA1**step) / (root + EPS)


@torch.no_grad()
def errors(model: GPT, data: Iterator[Batch], steps: int) -> dict[str, list[tuple[float, float]]]:
    """Every EVERY steps of a training with fp32 moments: the error of each way's update, relative,
    and how long it is along the true one."""
    params = list(model.parameters())
    moments = {name: [Moments(p, way) for p in params] for name, way in WAYS.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for step, batch in enumerate(track(data, "errors", steps), start=1):
        grads = gradients(model, batch)
        updates = {
            name: [m.update(grad, step) for m, grad in zip(each, grads, strict=True)]
            for name, each in moments.items()
        }
        if step % EVERY == 0:
            true = torch.cat([update.flatten() for update in updates["fp32"]])
            for name, each in updates.items():
                flat = torch.cat([update.flatten() for update in each])
                along = float(flat @ true / (true @ true))
                found[name].append((float((flat - true).norm() / true.norm()), along))
        for param, update in zip(params, updates["fp32"], strict=True):
            param -= rate(step) * update
    return found


@torch.no_grad()
def losses(model: GPT, way: str, data: Iterator[Batch], steps: int) -> list[float]:
    """Of a training in which that way's own updates are made."""
    params = list(model.parameters())
    moments = [Moments(param, WAYS[way]) for param in params]
    found = []
    for step, batch in enumerate(track(data, way, steps), start=1):
        grads = gradients(model, batch, found)
        for param, moment, grad in zip(params, moments, grads, strict=True):
            param -= rate(step) * moment.update(grad, step)
    return found


def rate(step: int) -> float:
    """The learning rate: warms up over 50 steps."""
    return LR * min(1, step / 50)


@torch.enable_grad()
def gradients(model: GPT, batch: Batch, losses: list[float] | None = None) -> list[Tensor]:
    loss = batch_loss(model, batch)
    if losses is not None:
        losses.append(loss.item())
    return list(torch.autograd.grad(loss, list(model.parameters())))


def smoothed(losses: list[float], window: int = 50) -> list[float]:
    return [mean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]


def plot(
    of_updates: dict[str, list[tuple[float, float]]], of_losses: dict[str, list[float]], out: Path
) -> None:
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    error, along, loss = figure.subplots(1, 3)
    names = [name for name in WAYS if name != "fp32"]
    for i, name in enumerate(names):
        style = {"color": f"C{i}", "label": name}
        steps = [EVERY * (k + 1) for k in range(len(of_updates[name]))]
        error.plot(steps, [e for e, _ in of_updates[name]], **style)
        along.plot(steps, [a for _, a in of_updates[name]], **style)
        true = smoothed(of_losses["fp32"])
        loss.plot([a - b for a, b in zip(smoothed(of_losses[name]), true, strict=True)], **style)
    error.set(title="Error of the update, relative", xlabel="step", yscale="log")
    along.set(title="Its length along the true one", xlabel="step", ylim=(0.9, 1.15))
    loss.set(title="Loss over that of fp32 moments", xlabel="step", ylim=(-0.03, 0.1))
    for axes in (error, along, loss):
        axes.grid(alpha=0.3)
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(out, dpi=130)


def markdown(
    of_updates: dict[str, list[tuple[float, float]]], of_losses: dict[str, list[float]]
) -> str:
    """The last measurements, and the mean loss of the last tenth."""
    lines = ["| moments | error of the update | along the true one | loss |", "| --- " * 4 + "|"]
    for name in WAYS:
        error, along = of_updates[name][-1]
        last = mean(of_losses[name][-len(of_losses[name]) // 10 :])
        lines.append(f"| {name} | {error:.3f} | {along:.3f} | {last:.4f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.codes", description=__doc__)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--context", type=int, default=64, help="bytes in a sequence")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    text, _ = standard_library_text(args.context)
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(context=args.context, layers=3, heads=4, width=128)).to(args.device)

    def data() -> Iterator[Batch]:
        return batches(text, args, args.iterations)

    of_updates = errors(copy.deepcopy(model), data(), args.iterations)
    of_losses = {way: losses(copy.deepcopy(model), way, data(), args.iterations) for way in WAYS}
    plot(of_updates, of_losses, args.out / "codes.png")
    (args.out / "codes.md").write_text(markdown(of_updates, of_losses))
    print(markdown(of_updates, of_losses))


if __name__ == "__main__":
    main()
