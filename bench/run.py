"""What to measure, by what was asked for, and doing it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import jobs, machine, tables, workloads
from .arguments import at_least, one_of
from .contenders import Contender, Fastopt, FastoptPlain, FastoptTorchScaler, Rule, rules
from .footprints import compiles, footprint, required
from .jobs import Job
from .measure import Group, measure
from .modes import FP32, MODES, NONE_BF16, SPLIT_8BIT, Case, Mode, ours
from .overhead import sweep
from .peers import (
    PEERS,
    BitsAndBytes8Bit,
    FlashOptim,
    MastersByHand,
    TorchAO,
    TorchForeach,
    TorchFused,
)
from .records import Results
from .startup import first_steps
from .turns import CLIP, OPERATIONS, STEP, UNSCALE
from .workloads import Workload

HELP = "measure, and save the results"
RESULTS = Path(__file__).with_name("results")
MAIN_RULE = "AdamW"
GPT2, BILLION, HUGE = "gpt2", "tinyllama-1.1b", "llama3-8b"
OVERHEAD, MEMORY, STARTUP = "overhead", "memory", "startup"  # workloads of their own kind
SPECIAL = (OVERHEAD, MEMORY, STARTUP)
ROUNDS, QUICK_ROUNDS = 11, 3
QUICK_ELEMENTS = 4_000_000
COPY, QUICK_COPY = 4 << 30, 64 << 20  # bytes: the one is far more than any cache holds
HUGE_ELEMENTS = 300_000_000  # of the largest model's part: a step takes less than a second
USUAL = (TorchFused, TorchForeach, MastersByHand)
WEIGHED = (TorchFused, MastersByHand, FlashOptim, BitsAndBytes8Bit, TorchAO)  # beside fastopt
INTERRUPTED = 130  # as shells have it
PLENTY = 256  # bytes per parameter, more than any group needs
SPARE = 0.9  # of the free memory, what a group may take


class TooLittleMemoryError(Exception):
    """The message says how much is needed, and what makes it less."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    titles = list({rule.title: None for rule in rules()})
    names = [*workloads.load(), *SPECIAL]

    def some(flag: str, choices: Sequence[str], default: str) -> None:
        parser.add_argument(
            flag,
            action="append",
            type=one_of(choices),
            metavar=flag.strip("-").upper(),
            help=f"{', '.join(choices)}; may be repeated (default: {default})",
        )

    some("--rule", titles, "all")
    some("--workload", names, "all but the largest")
    some("--mode", list(MODES), "fp32; all of them with AdamW on gpt2")
    some("--peer", [kind.name for kind in PEERS], "torch's; all of them with AdamW on gpt2")
    some("--operation", OPERATIONS, "the first two; all of them with AdamW on gpt2")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODULE:FACTORY",
        help="a workload of your own: what a function without arguments returns, a torch.nn.Module "
        "or a list of tensors or shapes; may be repeated",
    )
    parser.add_argument(
        "--scale",
        type=at_least(1),
        metavar="K",
        help="about one in K of the repeated layers and of the rows of embeddings",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--threads", type=at_least(1), help="default: torch's choice")
    parser.add_argument(
        "--rounds", type=at_least(2), help=f"timed rounds (default: {ROUNDS}; small tensors: more)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_ROUNDS} rounds on the first tensors of the models: for a look",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to save the results")


def main(options: argparse.Namespace) -> int:
    console = tables.terminal()
    options.device = torch.device(
        options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    if options.device.type == "cuda" and not torch.cuda.is_available():
        return refused("There is no GPU that torch can use: leave out --device cuda.")
    if options.threads:
        torch.set_num_threads(options.threads)
    begin = machine.cpu_seconds()
    try:
        chosen = list(groups(options))
        check_memory(chosen, options.device)
    except (ValueError, TooLittleMemoryError) as error:
        return refused(str(error))
    results = Results(run=about(options, chosen))
    time = results.run["date"][:16].replace(":", "")
    path = options.json or RESULTS / f"{results.run['name']}-{time}.json"
    try:
        results.save(path)
    except OSError as error:
        return refused(f"The results cannot be saved: {error}.")
    finished = jobs.run(list(work(options, chosen)), results, path, console)
    results.run["used_by_others"] = round(machine.used_by_others(begin), 3)
    results.save(path)
    tables.show(results, console)
    console.print(f"Saved as {path}")
    if not finished:
        return INTERRUPTED
    crashed = [s for s in results.skipped if s.crashed and s.contender.startswith(Fastopt.name)]
    return int(bool(results.failed or crashed))


def refused(reason: str) -> int:
    print(f"python -m bench run: {reason}", file=sys.stderr)
    return 2


def about(options: argparse.Namespace, chosen: Iterable[Group]) -> dict[str, Any]:
    """What is measured, on and with what."""
    gpu = machine.gpu(options.device) if options.device.type == "cuda" else {}
    used = {group.workload.name: group.workload for group in chosen}
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "name": machine.dashed(gpu["name"]) if gpu else machine.slug(),
        "machine": machine.describe(),
        "gpu": gpu,
        "versions": machine.versions(),
        "rounds": rounds(options),
        "threads": torch.get_num_threads(),
        "used_by_others": None,  # until the end
        "workloads": {
            name: {
                "source": found.source,
                "tensors": len(found.shapes),
                "parameters": found.elements,
            }
            for name, found in used.items()
        },
    }


def rounds(options: argparse.Namespace) -> int:
    return options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)


def work(options: argparse.Namespace, chosen: Sequence[Group]) -> Iterator[Job]:
    """The jobs, the most important first, in case that time runs out."""
    for group in chosen:
        title = f"{group.rule.name}, {group.workload.name}"
        yield title, partial(measure, group)
        if group is chosen[0]:
            yield from special(options)
    if not chosen:
        yield from special(options)


def special(options: argparse.Namespace) -> Iterator[Job]:
    """What is measured besides steps on workloads."""
    wanted = special_wanted(options)
    device = options.device
    if OVERHEAD in wanted:
        for rule in chosen_rules(options):
            cases = [*ours(FP32), Case(TorchFused, torch.float32)]
            group = Group(rule, workloads.many_small(1), cases, (STEP,), rounds(options), device)
            for fresh in (False, True):
                title = f"overhead, {rule.name}, {'fresh' if fresh else 'kept'} gradients"
                yield title, partial(sweep, group, fresh)
    if MEMORY in wanted:
        rule = next(rule for rule in rules() if rule.title == MAIN_RULE)
        (workload,) = sized([workloads.load()[GPT2]], options)
        kinds = peers_of(options, WEIGHED)
        cases = [*ours(*modes_of(options, MODES)), *peer_cases(kinds, MODES.values())]
        for case in cases:
            title = f"memory, {case.name}, {case.precision}"
            yield title, partial(footprint, case, rule, workload, device)
    if STARTUP in wanted and device.type == "cuda":
        for rule in chosen_rules(options):
            yield f"first step, {rule.name}", partial(first_steps, rule, device)


def special_wanted(options: argparse.Namespace) -> set[str]:
    if options.workload or options.model:
        return set(SPECIAL) & set(options.workload or [])
    return set(SPECIAL)


def groups(options: argparse.Namespace) -> Iterator[Group]:
    """Who is to take turns on what, the most important first, and what takes long at last.

    Raises:
        ValueError: a user's model cannot be made.
    """
    found = [
        group
        for workload in chosen_workloads(options)
        for rule in chosen_rules(options)
        for group in groups_of(rule, workload, options)
    ]
    yield from sorted(found, key=lambda group: any(map(compiles, group.cases)))


def groups_of(rule: Rule, workload: Workload, options: argparse.Namespace) -> Iterator[Group]:
    """On one workload: those in this process, and apart from them those that compile."""
    name = workload.name.removeprefix("part of ").partition(" 1/")[0]
    every = rule.title == MAIN_RULE and name in main_workloads(options)
    modes = modes_of(options, MODES if every else [FP32.name])
    kinds = peers_of(options, PEERS if every else USUAL)
    make = partial(
        Group,
        rounds=rounds(options),
        device=options.device,
        copied=QUICK_COPY if options.quick else COPY,
    )
    if workload.ranks:
        cases = [*ours(FP32), *ours(FP32, kind=FastoptPlain), Case(TorchFused, torch.float32)]
        yield make(rule, workload, cases, [STEP, CLIP], with_bound=False)
        return
    peers = peer_cases(kinds, modes)
    compiled = [case for case in peers if compiles(case) or case.kind.own_process]
    operations = options.operation or [STEP, CLIP]
    others = [case for case in peers if case not in compiled]
    if UNSCALE in operations:
        others += ours(*modes, kind=FastoptTorchScaler)
    yield make(rule, workload, [*ours(*modes), *others], operations)
    if every and not options.operation:
        cases = [*ours(FP32), *ours(FP32, kind=FastoptTorchScaler), Case(TorchFused, torch.float32)]
        yield make(rule, workload, cases, [UNSCALE])
    wanted = options.peer or (not options.quick and not workload.large)
    if compiled and wanted:
        # torch's fused one takes part as what everybody knows.
        base = [Case(TorchFused, torch.float32)]
        some = (options.mode and modes) or [FP32, NONE_BF16, SPLIT_8BIT]
        yield make(rule, workload, [*ours(*some), *base, *compiled], operations)


def main_workloads(options: argparse.Namespace) -> tuple[str, ...]:
    return (BILLION, GPT2) if options.device.type == "cuda" else (GPT2,)


def modes_of(options: argparse.Namespace, default: Iterable[str]) -> list[Mode]:
    return [MODES[name] for name in options.mode or default]


def peers_of(
    options: argparse.Namespace, default: Iterable[type[Contender]]
) -> list[type[Contender]]:
    by_name = {kind.name: kind for kind in PEERS}
    return [by_name[name] for name in options.peer] if options.peer else list(default)


def peer_cases(kinds: Iterable[type[Contender]], modes: Iterable[Mode]) -> list[Case]:
    """Peers on parameters of the modes' dtypes, of which fp16 counts if there is no other."""
    dtypes = list(dict.fromkeys(mode.dtype for mode in modes))
    usual = [dtype for dtype in dtypes if dtype != torch.float16] or dtypes
    return [
        Case(kind, dtype)
        for kind in kinds
        for dtype in usual
        if dtype in getattr(kind, "dtypes", usual)
    ]


def chosen_rules(options: argparse.Namespace) -> list[Rule]:
    """The one that matters most first."""
    found = [rule for rule in rules() if not options.rule or rule.title in options.rule]
    return sorted(found, key=lambda rule: rule.title != MAIN_RULE)


def chosen_workloads(options: argparse.Namespace) -> list[Workload]:
    """Small ones come early: large ones leave a fragmented heap behind, which would slow the small
    ones' gradients."""
    available = workloads.load()
    own = [workloads.of_model(where) for where in options.model]
    if options.workload or options.model:
        named = [available[name] for name in options.workload or [] if name in available]
        return sized([*named, *own], options)
    first = [available.pop(name) for name in main_workloads(options)]
    rest = [found for found in available.values() if not (found.large or found.ranks)]
    huge = available[HUGE]
    if options.quick:
        rest.append(huge)
    elif divisor := options.scale or divisor_that_fits(huge, options):
        rest.append(huge.scaled(divisor))
    return sized([*first, *rest], options)


def sized(found: Iterable[Workload], options: argparse.Namespace) -> list[Workload]:
    """The parts of workloads that the options ask for."""
    if options.scale:
        found = [f if "1/" in f.name else f.scaled(options.scale) for f in found]
    if options.quick:
        found = [workload.head(QUICK_ELEMENTS) for workload in found]
    return list(found)


def divisor_that_fits(workload: Workload, options: argparse.Namespace) -> int | None:
    """By which the largest model is divided where nobody asked for it: a power of two, None where
    not even its smallest part fits."""
    cases = [*ours(FP32), *peer_cases(USUAL, [FP32])]
    free = machine.free_memory(options.device)
    for divisor in divisors(workload):
        part = workload.scaled(divisor)
        groups = [Group(rule, part, cases, device=options.device) for rule in chosen_rules(options)]
        too_slow = options.device.type == "cpu" and part.elements > HUGE_ELEMENTS
        if not too_slow and max(map(required, groups)) <= SPARE * free:
            return divisor
    return None


def divisors(workload: Workload) -> Iterator[int]:
    """Powers of two, as long as they make it smaller."""
    divisor, elements = 2, workload.elements
    while (smaller := workload.scaled(divisor).elements) < elements:
        yield divisor
        divisor, elements = 2 * divisor, smaller


def check_memory(chosen: Iterable[Group], device: torch.device) -> None:
    """Raises:
    TooLittleMemoryError: a group needs more than there is.
    """
    free = machine.free_memory(device)
    for group in chosen:
        if PLENTY * group.workload.elements <= free:
            continue
        needed = required(group)
        if needed <= SPARE * free:
            continue
        parts = (
            f"a part of the model with --scale {divisor}, "
            for divisor in divisors(group.workload)
            if required(replace(group, workload=group.workload.scaled(divisor))) <= SPARE * free
        )
        raise TooLittleMemoryError(
            f"{group.rule.name} on {group.workload.name} needs {needed / 2**30:.1f} GiB of memory "
            f"for {len(group.cases)} contenders, and {free / 2**30:.1f} GiB are free: use "
            f"{next(parts, '')}a smaller --workload, or fewer contenders with --mode and --peer."
        )
