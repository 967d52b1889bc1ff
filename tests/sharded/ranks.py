"""Processes that make up a world of gloo, kept for all tests: each test's function runs in them."""

import importlib
import io
import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 120  # seconds, for a test in all ranks
HERE = Path(__file__).parent


_ranks = []  # processes, and pipes to them


def run(world, function, *args):
    """Calls ``function(*args)``, of a module of this folder, in each of ``world`` ranks.

    Returns:
        what each returns, by rank.
    """
    while len(_ranks) < world:
        _ranks.append(_start())
    found = _ask(_ranks[:world], TIMEOUT, function, args, lambda found: any(e for e, _ in found))
    failed = [f"rank {rank}: {error}" for rank, (error, _) in found.items() if error]
    if failed:  # the others may wait for it
        _end(_ranks)
        _ranks.clear()
    assert not failed, "\n".join(failed)
    return [found[rank][1] for rank in range(world)]


def run_apart(world, function, *args, timeout):
    """The same in new processes, which may die or wait for each other.

    Args:
        timeout: seconds, of their collectives.

    Returns:
        for each rank what it raised, "" if nothing, and what it returned; or `DIED`.
    """
    ranks = [_start() for _ in range(world)]
    try:
        found = _ask(ranks, timeout, function, args, lambda found: False)
    finally:
        _end(ranks)
    return [found[rank] for rank in range(world)]


DIED = "the process is gone", None


def _start():
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that ours ends with the process
    return process, ours


def _end(ranks):
    for process, _ in ranks:
        process.kill()
        process.join()


def _ask(ranks, timeout, function, args, is_enough):
    """The answers of ranks, until they suffice: what each raised and returned."""
    with tempfile.TemporaryDirectory() as folder:
        job = function.__module__, function.__name__, args, len(ranks), f"file://{folder}/store"
        for rank, (_, pipe) in enumerate(ranks):
            pipe.send((rank, *job, timeout))
        end = time.monotonic() + TIMEOUT
        found, left = {}, {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
        while left and not is_enough(found.values()):
            ready = wait(left, end - time.monotonic())
            for pipe in ready:
                try:
                    answer = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
                except EOFError:
                    answer = DIED
                found[left.pop(pipe)] = answer
            if not ready:
                found |= dict.fromkeys(left.values(), ("no answer in time", None))
                break
    return found


def _serve(pipe):
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    torch.set_num_threads(1)
    while True:
        try:
            rank, module, name, args, world, store, timeout = pipe.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        error, result = "", None
        try:
            dist.init_process_group(
                "gloo",
                init_method=store,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout),
            )
            result = getattr(importlib.import_module(module), name)(*args)
        except BaseException:
            error = traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        answer = io.BytesIO()
        torch.save((error, result), answer)
        pipe.send_bytes(answer.getvalue())
