"""Processes that make up a world of gloo, kept for all tests: each test's function runs in them."""

import atexit
import importlib
import io
import os
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 120  # seconds, for a test in all ranks
HERE = Path(__file__).parent


@cache
def _pipes(count):
    """To so many processes."""
    context = mp.get_context("spawn")
    pipes = []
    for _ in range(count):
        ours, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs,), daemon=True).start()
        pipes.append(ours)
    atexit.register(lambda: [pipe.close() for pipe in pipes])
    return pipes


def run(world, function, *args):
    """Calls ``function(*args)``, of a module of this folder, in each of ``world`` ranks.

    Returns:
        what each returns, by rank.
    """
    pipes = _pipes(4)[:world]
    with tempfile.TemporaryDirectory() as folder:
        job = function.__module__, function.__name__, args, world, f"file://{folder}/store"
        for rank, pipe in enumerate(pipes):
            pipe.send((rank, *job))
        answers = [pipe.recv_bytes() if pipe.poll(TIMEOUT) else None for pipe in pipes]
    found = [None if a is None else torch.load(io.BytesIO(a), weights_only=False) for a in answers]
    failed = [
        f"rank {rank}: {text}"
        for rank, (text, _) in enumerate(f or ("no answer", 0) for f in found)
        if text
    ]
    assert not failed, "\n".join(failed)
    return [result for _, result in found]


def _serve(pipe):
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    torch.set_num_threads(1)
    while True:
        try:
            rank, module, name, args, world, store = pipe.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        error, result = "", None
        try:
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            result = getattr(importlib.import_module(module), name)(*args)
        except BaseException:
            error = traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        answer = io.BytesIO()
        torch.save((error, result), answer)
        pipe.send_bytes(answer.getvalue())
