"""Processes that make up a world of gloo, kept for all tests: each test's function runs in them."""

import importlib
import io
import os
import sys
import tempfile
import time
import traceback
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
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        _ranks.append((process, ours))
    with tempfile.TemporaryDirectory() as folder:
        job = function.__module__, function.__name__, args, world, f"file://{folder}/store"
        for rank, (_, pipe) in enumerate(_ranks[:world]):
            pipe.send((rank, *job))
        end = time.monotonic() + TIMEOUT
        found, left = {}, {pipe: rank for rank, (_, pipe) in enumerate(_ranks[:world])}
        while left and not any(error for error, _ in found.values()):
            ready = wait(left, end - time.monotonic())
            for pipe in ready:
                answer = io.BytesIO(pipe.recv_bytes())
                found[left.pop(pipe)] = torch.load(answer, weights_only=False)
            if not ready:
                found[-1] = f"no answer from the ranks {[*left.values()]}", None
        failed = [f"rank {rank}: {error}" for rank, (error, _) in found.items() if error]
        if failed:  # the others may wait for it
            for process, _ in _ranks:
                process.kill()
                process.join()
            _ranks.clear()
    assert not failed, "\n".join(failed)
    return [found[rank][1] for rank in range(world)]


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
