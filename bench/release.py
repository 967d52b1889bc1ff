"""`python -m bench.release`: memory in an iteration of a small GPT whose optimizer makes its steps
in backward, and the ordinary way.

torch's profiler tells each allocation. The batch is small, as where memory is short: in larger ones
activations, which are the same both ways, have a larger part.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

import fastopt

from . import machine, modes, tables
from .footprints import state_tensors, stored_bytes
from .gpt import GPT, GPTConfig
from .modes import Mode
from .plots import OURS, Picture, entitle, line_style, new_figure
from .records import Results

BATCH, CONFIG = 1, GPTConfig(layers=12)
MODES = (modes.FP32, modes.SPLIT_8BIT)
ORDINARY, IN_BACKWARD = "step after backward", "step_in_backward"
#: As torch's optimizer is drawn elsewhere: what ours is compared with.
STYLES = {ORDINARY: line_style("torch fused"), IN_BACKWARD: line_style(OURS)}
MB = 1e6


@dataclass
class Iteration:
    """Bytes in use over one iteration.

    Args:
        kept: those of parameters and states.
        used: after each allocation or release, in order.
    """

    kept: int
    used: list[int]

    @property
    def peak(self) -> int:
        return max(self.used)


def iteration(mode: Mode, in_backward: bool) -> Iteration:
    """The third, in which all states and plans are there."""
    torch.manual_seed(0)
    model = GPT(CONFIG).to(mode.dtype)
    optimizer = fastopt.AdamW(model.parameters(), **mode.settings)
    if in_backward:
        fastopt.step_in_backward(optimizer)
    tokens = torch.randint(CONFIG.vocabulary, (BATCH, CONFIG.context + 1))

    def iterate() -> None:
        logits = model(tokens[:, :-1])
        cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        iterate()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        iterate()
    states = [t for group in state_tensors(optimizer).values() for t in group]
    kept = stored_bytes([*model.parameters(), *states])
    events: Any = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return Iteration(kept, [*accumulate((change for _, change in changes), initial=kept)])


def draw(results: Results, found: dict[Mode, dict[str, Iteration]]) -> Picture:
    figure, panels = new_figure(results, 4.4, columns=len(found))
    for axes, (mode, ways) in zip(panels, found.items(), strict=True):
        for way, each in ways.items():
            style = {**STYLES[way], "marker": "", "linestyle": "--" if way == ORDINARY else "-"}
            label = f"{way}: at most {each.peak / MB:.0f} MB"
            axes.plot([used / MB for used in each.used], label=label, **style)
        kept = next(iter(ways.values())).kept / MB
        axes.axhspan(0, kept, color="#dddddd", label=f"parameters and states: {kept:.0f} MB")
        axes.set_title(mode.name, fontsize=10)
        axes.set(xlabel="allocations and releases of one iteration, in order", ylabel="MB in use")
        axes.margins(x=0)
        axes.set_ylim(bottom=0, top=1.35 * axes.get_ylim()[1])  # room for the legend
        axes.legend(loc="upper left", fontsize=9)
    size = f"{CONFIG.layers} layers of {CONFIG.width}, {BATCH} x {CONFIG.context} tokens"
    entitle(figure, f"Memory in an iteration of AdamW on a GPT of {size} | lower is better")
    sentence = "Forward, backward, step; the gradients that wait for the step make the difference."
    return Picture("release", "Memory with steps in backward", sentence, figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.release", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="a folder")
    args = parser.parse_args()
    about = {"commit": machine.commit(), "machine": machine.describe()}
    results = Results(run={**about, "versions": machine.versions()})
    found = {
        mode: {way: iteration(mode, way == IN_BACKWARD) for way in (ORDINARY, IN_BACKWARD)}
        for mode in MODES
    }
    console = tables.terminal()
    for mode, ways in found.items():
        for way, each in ways.items():
            console.print(f"{mode.name}, {way}: {each.kept / MB:.1f} MB kept, {each.peak / MB:.1f}")
    console.print(str(draw(results, found).save(args.out)))


if __name__ == "__main__":
    main()
