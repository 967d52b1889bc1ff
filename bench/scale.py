"""``python -m bench plan``: what a model costs on many devices, on paper, from measured figures.

The bytes per parameter are those of fastopt: an optimizer of the mode makes a step on one tensor,
and its storages are counted. The speed is fastopt's, too: time per byte of the mode's own step in
the results of `bench run`, whatever it is that limits the mode. Only what comes from other devices
is a model, of the link and the latency that the command line tells.

``--check`` holds the same arithmetic against real steps at the sizes that fit here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from rich.table import Table

from . import bound, clocks, contenders, machine, workloads
from .arguments import at_least, one_of, saved
from .clocks import DEVICE, HOST, WALL, Clock, DeviceClock
from .contenders import Contender, Fastopt, Rule, UnavailableError
from .footprints import held, stored_bytes
from .measure import interleave, release
from .modes import MODES, Case, Mode
from .plots import described
from .records import OURS, Results, Slope, Timing, bound_of
from .tables import QUIET, digits, terminal
from .turns import CLIP, STEP
from .workloads import CPU, Workload, many_small

HELP = "memory and optimizer time on many devices, from measured figures"

ZERO1, FSDP, NONE = "zero1", "fsdp", "none"
#: What each device has only its part of.
SHARDED = {
    ZERO1: {"masters", "states"},
    FSDP: {"parameters", "gradients", "masters", "states"},
    NONE: set[str](),
}
GRADIENTS = {"bf16": 2, "fp32": 4}  # bytes
RESULTS = Path(__file__).with_name("results")
SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}

ALLOWED = {"MB": 0.01, "ms": 0.15}  # how far a prediction may be off
CHECKED = ("fp32", "split", "split+8bit")
ROUNDS = 11
MOST_STEPS = 10  # in a turn
SMALL = many_small(1000)  # shows the overhead of a tensor
LEFT_OUT = (
    "Left out: activations, buffers of the communication, what the allocators round up and keep, "
    "temporary memory within a step, a few bytes per tensor; stragglers, and whatever else uses "
    "the memory or the links meanwhile. Of the communication only what the optimizer adds is here: "
    "not the reduction of the gradients, and not FSDP's gathering for forward and backward passes."
)


def workload(name: str, shapes: Sequence[tuple[int, ...]]) -> Workload:
    return Workload(name, "synthetic", ((1, tuple(shapes)),))


COUNTED = workload("one tensor", [(2**10, 2**10)])  # its step number is 4 bytes more


class PlanError(Exception):
    """There is no plan; the message is the reason, in one sentence."""


@dataclass(frozen=True)
class Cost:
    """Bytes for each parameter: that are there after a step, and that a step has to move."""

    parameters: float
    gradients: float
    masters: float
    states: float
    moved: float

    def with_gradients(self, size: int, passes: int) -> Cost:
        """With gradients of another size, which a step reads so many times."""
        moved = self.moved + passes * (size - self.gradients)
        return replace(self, gradients=size, moved=moved)


@dataclass(frozen=True)
class Speed:
    """A step of ``b`` bytes takes ``b / gb_per_s`` nanoseconds, and the overhead of its tensors.

    Args:
        overlaps: the overhead is a host's, while the device works.
    """

    gb_per_s: float
    fixed_ns: float = 0.0
    tensor_ns: float = 0.0
    overlaps: bool = False

    @classmethod
    def measured(
        cls,
        moved: float,
        tensors: int,
        ns: float,
        fixed_ns: float = 0.0,
        tensor_ns: float = 0.0,
        overlaps: bool = False,
    ) -> Speed:
        """From a step that moved so many bytes.

        Raises:
            PlanError: the step was nothing but overhead.
        """
        speed = cls(math.inf, fixed_ns, tensor_ns, overlaps)
        rest = ns if overlaps else ns - speed.overhead_ns(tensors)
        if rest <= 0:
            raise PlanError(
                f"A step over {tensors} tensors was all overhead: measure a larger workload."
            )
        return replace(speed, gb_per_s=moved / rest)

    def overhead_ns(self, tensors: int) -> float:
        """A line fitted to many tensors may be below 0 for few; a step cannot."""
        return max(0.0, self.fixed_ns + self.tensor_ns * tensors)

    def step_ns(self, moved: float, tensors: int) -> float:
        parts = moved / self.gb_per_s, self.overhead_ns(tensors)
        return max(parts) if self.overlaps else sum(parts)


@dataclass(frozen=True)
class Asked:
    """What the plan is for."""

    params: int
    gpus: int
    sharding: str
    tensors: int
    link: float | None  # GB/s
    latency_us: float

    @property
    def shard(self) -> int:
        """The parameters that a device updates: the largest part, where they do not divide."""
        return self.params if self.sharding == NONE else -(-self.params // self.gpus)

    def held(self, part: str) -> int:
        """Of how many parameters a device has the gradients, or the states, ..."""
        return self.shard if part in SHARDED[self.sharding] else self.params


@dataclass(frozen=True)
class Plan:
    """For one device. Times are milliseconds per step."""

    memory_bytes: dict[str, float]
    moved_bytes: float
    update_ms: float
    overhead_ms: float
    step_ms: float  # both, which may overlap
    norm_ms: float
    pass_ms: float  # over the gradients, for their norm, where the update has none
    optimizer_ms: float  # all of these
    gather_bytes: float
    gather_ms: float | None  # None: the link's speed is not known


def planned(asked: Asked, cost: Cost, speed: Speed, pass_gb_per_s: float | None = None) -> Plan:
    """The formula.

    Args:
        pass_gb_per_s: where the speed and the cost are those of a step without clipping, how fast
            the norm reads the gradients.
    """
    memory = {
        part: getattr(cost, part) * asked.held(part)
        for part in ("parameters", "gradients", "masters", "states")
    }
    moved = cost.moved * asked.shard
    step_ms = speed.step_ns(moved, asked.tensors) / 1e6
    norm_ms = hops(asked) * asked.latency_us / 1e3
    pass_ms = 0.0
    if pass_gb_per_s:
        pass_ms = cost.gradients * asked.shard / pass_gb_per_s / 1e6
    gathered = 0.0
    if asked.sharding == ZERO1:
        gathered = cost.parameters * (asked.params - asked.shard)
    return Plan(
        memory_bytes={**memory, "all": sum(memory.values())},
        moved_bytes=moved,
        update_ms=moved / speed.gb_per_s / 1e6,
        overhead_ms=speed.overhead_ns(asked.tensors) / 1e6,
        step_ms=step_ms,
        norm_ms=norm_ms,
        pass_ms=pass_ms,
        optimizer_ms=step_ms + pass_ms + norm_ms,
        gather_bytes=gathered,
        gather_ms=gathered / asked.link / 1e6 if asked.link else None,
    )


def hops(asked: Asked) -> int:
    """Of one number up a binary tree of devices and down again; none where each has all of it."""
    return 0 if asked.sharding == NONE else 2 * math.ceil(math.log2(asked.gpus))


def counted(mode: Mode, rule: Rule, clips: bool = False) -> Cost:
    """By a step on one large tensor.

    Args:
        clips: whether the step reads the gradients once more, for their norm.

    Raises:
        PlanError: the rule has no such mode.
    """
    try:
        contender = stepped(mode, rule, COUNTED, CPU)
    except UnavailableError as error:
        raise PlanError(f"{rule.title}: {error}") from None
    kept = {part: size / COUNTED.elements for part, size in storages(contender).items()}
    moved = bound.bytes_moved(bound.traffic(contender), clips)
    return Cost(**kept, moved=moved / COUNTED.elements)


def stepped(mode: Mode, rule: Rule, workload: Workload, device: torch.device) -> Contender:
    """fastopt in a mode, after a step."""
    params = workload.parameters(device, mode.dtype)
    contender = Case(Fastopt, mode.dtype, mode).make(rule, params)
    contender.run()
    return contender


def storages(contender: Contender) -> dict[str, int]:
    """Bytes of memory by part."""
    params, masters, states, grads = map(stored_bytes, held(contender))
    return {"parameters": params, "gradients": grads, "masters": masters, "states": states}


@dataclass(frozen=True)
class Source:
    """The measurement that a plan is made from."""

    path: Path
    results: Results
    timing: Timing
    slopes: dict[str, Slope]  # by the gradients: "kept" or "fresh"

    @property
    def limit(self) -> Timing | None:
        """What moved bytes beside the step, where that did not clip: the norm reads as fast."""
        timing = self.timing
        if timing.operation == CLIP:
            return None
        near = [
            t for t in self.results.timings if (t.group, t.clock) == (timing.group, timing.clock)
        ]
        return bound_of(timing, near) or timing

    def speed(self) -> Speed:
        """Measured on gradients that stay; for training, where they are new each time."""
        timing = self.timing
        line = {
            gradients: (1e3 * s.fixed_us, 1e3 * s.us_per_tensor)
            for gradients, s in self.slopes.items()
        }
        any_line = next(iter(line.values()), (0.0, 0.0))
        overlaps = timing.clock == DEVICE
        measured = Speed.measured(
            timing.needed_bytes,
            timing.tensors,
            timing.median_ns,
            *line.get("kept", any_line),
            overlaps=overlaps,
        )
        return Speed(measured.gb_per_s, *line.get("fresh", any_line), overlaps=overlaps)


def find(given: Sequence[tuple[Results, Path]], mode: str, rule: Rule) -> Source:
    """In what is most like a large model's step, and in the newest file that has it.

    Args:
        given: empty for those in ``bench/results``.

    Raises:
        PlanError: none has.
    """
    found = list(given) or list(committed())
    found.sort(key=lambda entry: str(entry[0].run.get("date", "")), reverse=True)
    command = f"python -m bench run --rule {rule.title} --mode {mode} --workload gpt2"
    if not found:
        raise PlanError(
            f"There are no results in bench/{RESULTS.name}/ to plan from: `{command}` makes some, "
            "and --results names the file."
        )
    sources = [
        Source(path, results, timing, slopes(results, mode, rule))
        for results, path in found
        for timing in results.timings
        if (timing.contender, timing.precision, timing.rule) == (OURS, mode, rule.name)
        and timing.operation in (STEP, CLIP)
        and timing.clock != HOST
    ]
    if sources:
        return max(sources, key=lambda source: suitable(source.timing))  # of equals, the newest
    names = ", ".join(path.name for _, path in found)
    raise PlanError(f"No {rule.title} in mode {mode} in {names}: `{command}` measures it.")


def committed() -> Iterator[tuple[Results, Path]]:
    """Those in the project, but for files of other kinds."""
    for path in sorted(RESULTS.glob("*.json")):
        with suppress(ArgumentTypeError):
            yield saved(str(path))


def suitable(timing: Timing) -> tuple[bool, bool, bool, int]:
    """Greatest for what is most like a large model's step."""
    return (
        timing.regime == "memory",
        timing.clock == DEVICE,
        timing.operation == CLIP,
        timing.elements,
    )


def slopes(results: Results, mode: str, rule: Rule) -> dict[str, Slope]:
    """The overhead of the mode, or of fp32, by the gradients."""
    found = {}
    for precision in ("fp32", mode):
        for slope in results.overhead:
            if (slope.contender, slope.precision, slope.rule) == (OURS, precision, rule.name):
                found[slope.gradients] = slope
    return found


def memory_table(asked: Asked, cost: Cost, plan: Plan) -> Table:
    table = Table(title="Memory per device", title_justify="left")
    for column in ("", "bytes per parameter", "parameters held", "GB"):
        table.add_column(column, justify="right" if column else "left")
    for part, size in plan.memory_bytes.items():
        if part == "all":
            table.add_section()
            table.add_row(part, "", "", digits(size / 1e9), style="bold")
        else:
            each = f"{getattr(cost, part):.2f}"
            table.add_row(part, each, f"{asked.held(part):,}", digits(size / 1e9))
    return table


def time_table(asked: Asked, cost: Cost, speed: Speed, plan: Plan, limit: Timing | None) -> Table:
    table = Table(title="Optimizer time per step and device", title_justify="left")
    for column in ("", "formula", "ms"):
        table.add_column(column, justify="right" if column == "ms" else "left")
    table.add_row(
        "update" if limit else "update with clipping",
        f"{asked.shard:,} parameters x {cost.moved:.2f} bytes / {digits(speed.gb_per_s)} GB/s",
        digits(plan.update_ms),
    )
    table.add_row(
        "overhead" + (", overlaps" if speed.overlaps else ""),
        f"{speed.fixed_ns / 1e3:.1f} us + {asked.tensors:,} tensors x "
        f"{speed.tensor_ns / 1e3:.2f} us, at least 0",
        digits(plan.overhead_ms),
    )
    if limit:
        formula = f"{asked.shard:,} parameters x {cost.gradients:.0f} bytes / "
        formula += f"{digits(limit.gb_per_s)} GB/s"
        table.add_row("norm of the gradients", formula, digits(plan.pass_ms))
    formula = f"{hops(asked)} hops x {asked.latency_us:g} us"
    if hops(asked):
        formula = f"2 x ceil(log2 {asked.gpus}) = {formula}"
    table.add_row("all-reduce of the norm", formula, digits(plan.norm_ms))
    table.add_section()
    together = "max(update, overhead)" if speed.overlaps else "update + overhead"
    formula = f"{together}{' + norm' if limit else ''} + all-reduce"
    table.add_row("optimizer", formula, digits(plan.optimizer_ms), style="bold")
    if asked.sharding == ZERO1:
        table.add_section()
        sent = f"{asked.params - asked.shard:,} parameters x {cost.parameters:.0f} bytes"
        formula = f"{sent} / {asked.link:g} GB/s" if asked.link else f"{sent}; --link tells GB/s"
        gather = "-" if plan.gather_ms is None else digits(plan.gather_ms)
        table.add_row("besides: all-gather of parameters", formula, gather)
    return table


def origin(source: Source) -> Iterator[str]:
    """What was measured where, and what that means for the plan."""
    timing, results = source.timing, source.results
    yield (
        f"Measured: fastopt {timing.precision}, {timing.rule}, {timing.operation} on "
        f"{timing.workload} ({timing.elements:,} parameters in {timing.tensors:,} tensors): "
        f"{digits(timing.median_ns / 1e6)} ms of {timing.clock} time, {timing.gb_per_s:.1f} GB/s "
        f"with its overhead, working set in {timing.regime}; {described(results)}: "
        f"{source.path.name}."
    )
    if not results.run.get("gpu"):
        yield "These devices are CPUs: for GPUs, name results of one with --results."
    if timing.regime != "memory":
        yield "That working set is not in memory alone: a larger one will be slower."
    if source.limit:
        yield (
            "Clipping was not measured for this mode: the norm's pass over the gradients is taken "
            f"to be as fast as {source.limit.contender} beside this step."
        )
    modes = {slope.precision for slope in source.slopes.values()}
    if not modes:
        yield "The overhead of tensors was not measured: it counts as none."
    elif timing.precision not in modes:
        yield f"The overhead of tensors is that of {', '.join(modes)}."


def show(options: argparse.Namespace) -> None:
    """Raises:
    PlanError: there is no plan.
    """
    rule = rules()[options.rule]
    source = find(options.results, options.mode, rule)
    limit = source.limit
    clips = limit is None
    cost = counted(MODES[options.mode], rule, clips)
    if options.grad_dtype:
        cost = cost.with_gradients(GRADIENTS[options.grad_dtype], 1 + clips)
    asked = Asked(
        params=options.params,
        gpus=options.gpus,
        sharding=options.sharding,
        tensors=options.tensors,
        link=options.link,
        latency_us=options.latency_us,
    )
    speed = source.speed()
    plan = planned(asked, cost, speed, limit.gb_per_s if limit else None)
    if options.json:
        timing = {key: value for key, value in asdict(source.timing).items() if key != "samples_ns"}
        made = {
            "asked": {**asdict(asked), "mode": options.mode, "rule": rule.name},
            "plan": asdict(plan),
            "bytes_per_parameter": asdict(cost),
            "speed": asdict(speed),
            "measured": {"file": source.path.name, "run": source.results.run, "timing": timing},
        }
        print(json.dumps(made, indent=1))
        return
    console = terminal()
    console.print(
        f"{asked.params:,} parameters, {asked.gpus} devices, {rule.name}, mode {options.mode}, "
        f"sharding: {asked.sharding}",
        memory_table(asked, cost, plan),
        time_table(asked, cost, speed, plan, limit),
        *origin(source),
        LEFT_OUT,
        sep="\n",
    )


@dataclass(frozen=True)
class Row:
    """Of a check: what was predicted and what was found."""

    mode: str
    case: str
    what: str
    predicted: float
    found: float
    off: float  # found / predicted - 1

    @property
    def bad(self) -> bool:
        return abs(self.off) > ALLOWED[self.what]


@dataclass(frozen=True)
class Share:
    """A model on some devices, of whom the first is here: it has FSDP's part of each tensor."""

    model: Workload
    gpus: int

    @property
    def name(self) -> str:
        devices = "1 device" if self.gpus == 1 else f"1 of {self.gpus} devices"
        return f"{self.model.name} on {devices}"

    @property
    def here(self) -> Workload:
        shapes = [(-(-first // self.gpus), *rest) for first, *rest in self.model.shapes]
        return workload(self.name, shapes)

    @property
    def asked(self) -> Asked:
        tensors = len(self.model.shapes)
        return Asked(self.model.elements, self.gpus, FSDP, tensors, link=None, latency_us=0)


def shares() -> list[Share]:
    """That which shows the speed comes first."""
    gpt2 = workloads.load()["gpt2"]
    return [Share(millions(50), 1), Share(millions(10), 1), Share(gpt2, 1), Share(gpt2, 4)]


def millions(count: int) -> Workload:
    return workload(f"{count}M", [(1000, 1024)] * count)


@dataclass(frozen=True, eq=False)
class Turn:
    """Some steps of a contender, under another name."""

    name: str
    contender: Contender
    steps: int
    clock: Clock
    precision = ""
    own_process = False

    def take(self, clock: int, number: int) -> dict[str, int]:
        return self.clock(self.run)

    def run(self) -> None:
        for _ in range(self.steps):
            self.contender.run()


def checked(
    mode: str,
    rule: Rule,
    found: Sequence[Share],
    small: Workload,
    rounds: int,
    device: torch.device,
) -> Iterator[Row]:
    """The rows of one mode: the memory of all cases, and the time of all but the first.

    That and the small tensors take turns with the others, and each round is predicted from what
    they took in it, so that a swing of the machine is in both. Turns are about equally long: small
    models make several steps in one, or else a moment's interruption would be a large part of it.
    """
    release(device)
    clock = DeviceClock() if device.type == "cuda" else clocks.wall
    cost = counted(MODES[mode], rule, clips=True)
    first, *others = found
    turns = []
    for here in [*(case.here for case in found), small]:
        contender = stepped(MODES[mode], rule, here, device)
        contender.set_clip(True)
        steps = max(1, min(MOST_STEPS, round(first.asked.shard / here.elements)))
        turns.append(Turn(here.name, contender, steps, clock))
    what = DEVICE if device.type == "cuda" else WALL
    times, _ = interleave(turns, rounds, clock=0)
    samples = {turn.name: [ns / turn.steps for ns in times[turn][what]] for turn in turns}
    tensor_ns = [ns / len(small.shapes) for ns in samples[small.name]]
    calibration = planned(first.asked, cost, Speed(1.0)).moved_bytes
    speeds = [
        Speed.measured(calibration, first.asked.tensors, ns, tensor_ns=each)
        for ns, each in zip(samples[first.name], tensor_ns, strict=True)
    ]
    for case, turn in zip(found, turns, strict=False):
        memory = planned(case.asked, cost, speeds[0]).memory_bytes["all"]
        stored = sum(storages(turn.contender).values())
        yield Row(mode, case.name, "MB", memory / 1e6, stored / 1e6, stored / memory - 1)
    for case in others:
        predicted = [planned(case.asked, cost, speed).optimizer_ms for speed in speeds]
        ms = [ns / 1e6 for ns in samples[case.name]]
        off = median(a / b for a, b in zip(ms, predicted, strict=True)) - 1
        yield Row(mode, case.name, "ms", median(predicted), median(ms), off)


def check(options: argparse.Namespace) -> int:
    """The exit status: whether a prediction was off."""
    rule = rules()[options.rule]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = shares()
    rows = []
    begin = machine.cpu_seconds()
    for mode in [options.mode] if options.mode else CHECKED:
        rows += checked(mode, rule, found, SMALL, ROUNDS, device)
    table = Table(title=f"{rule.name}, clip + step: predicted and found", title_justify="left")
    for column in ("mode", "case", "", "predicted", "found", "off by", ""):
        table.add_column(column, justify="left" if column in ("mode", "case", "") else "right")
    for row in rows:
        off = "no" if row.bad else "yes"
        table.add_row(
            *(row.mode, row.case, row.what, digits(row.predicted), digits(row.found)),
            f"{row.off:+.1%}",
            f"within {ALLOWED[row.what]:.0%}: {off}",
            style="red" if row.bad else "",
        )
    terminal().print(
        table,
        f"Times: from {found[0].name} and {SMALL.name} elements, which took turns with the others; "
        f"medians of {ROUNDS} rounds, the ratio taken within each. Parts are those that FSDP gives "
        "a device of each tensor.",
        sep="\n",
    )
    used = machine.used_by_others(begin)
    if used > QUIET:
        terminal().print(
            f"Other work took {used:.0%} of the machine's CPU time meanwhile, which delays short "
            "steps most: check again when it is quiet."
        )
    return int(any(row.bad for row in rows))


def rules() -> dict[str, Rule]:
    return {rule.title: rule for rule in contenders.rules()}


def quantity(text: str) -> int:
    """An argument type: how many parameters, as 70e9, 70B or 1.1b."""
    scale = SUFFIXES.get(text[-1:].lower(), 1.0)
    try:
        number = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        number = math.nan
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of parameters, as 70e9 or 1.1B")
    return round(number)


def positive(text: str) -> float:
    """An argument type: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--params", type=quantity, help="of the model: 70e9, 70B, 1.1b")
    add("--gpus", type=at_least(1), default=1, help="devices that share the work (default: 1)")
    add("--mode", type=one_of(list(MODES)), metavar="MODE", help=f"fastopt's: {', '.join(MODES)}")
    titles = list(rules())
    add("--rule", type=one_of(titles), default="AdamW", metavar="RULE", help=", ".join(titles))
    add(
        "--sharding",
        type=one_of(list(SHARDED)),
        default=FSDP,
        metavar="SHARDING",
        help="zero1: masters, states and the update; fsdp (default): all; none: nothing",
    )
    add(
        "--grad-dtype",
        type=one_of(list(GRADIENTS)),
        metavar="DTYPE",
        help="of the gradients: bf16 or fp32 (default: as the parameters)",
    )
    add(
        "--tensors",
        type=at_least(1),
        default=723,
        help="that a device has parts of (default: 723, which a Llama of 70B has)",
    )
    add("--link", type=positive, metavar="GB/s", help="what a device receives, for the all-gather")
    add(
        "--latency-us",
        type=positive,
        default=10.0,
        metavar="US",
        help="from device to device, for the norm's all-reduce (default: 10, which is assumed)",
    )
    add(
        "--results",
        type=saved,
        action="append",
        default=[],
        metavar="RESULTS.json",
        help="to plan from; may be repeated (default: the newest in bench/results/)",
    )
    add("--json", action="store_true", help="print JSON")
    add("--check", action="store_true", help="measure some sizes here, and compare")


def main(options: argparse.Namespace) -> int:
    try:
        if options.check:
            return check(options)
        if options.params is None or options.mode is None:
            raise PlanError("A plan is for --params and a --mode; --check needs neither.")
        show(options)
    except PlanError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
