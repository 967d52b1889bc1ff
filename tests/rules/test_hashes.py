"""The bits of every rule in every precision mode, as they were: hashes.txt.

``python tests/rules/test_hashes.py`` writes the file. A change of a hash is a change of what users
get from the same run, and has its reason in the commit.
"""

import hashlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script
from helpers import CASES, FP32, FP64, MODES, interpreted, masked_out

pytestmark = masked_out
FILE = Path(__file__).with_name("hashes.txt")
SHAPES = [(33, 65), (8200,), (), (300,), (0,)]
CODED = [(9, 512), (130, 32), (33, 192), (2, 64, 48)]  # large enough for states of 8 bits
SETTINGS = {"lr": 0.01, "weight_decay": 0.1, "max_norm": 2.0, "clip_value": 0.05}


def numbers(shape, dtype, seed):
    """From -1 to 1, without a generator, which another torch may have changed."""
    n = torch.Size(shape).numel()
    x = (torch.arange(n) + 1) * (2 * seed + 0x9E3779B1) & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x2C1B3C6D & 0xFFFFFFFF
    return ((x ^ x >> 12).double() / 2**31 - 1).to(dtype).reshape(shape)


def name_of(cls, variant, dtype, master, states):
    flags = "".join(f" {key}={value}" for key, value in variant.items())
    words = (str(dtype).removeprefix("torch."), str(master), str(states).removeprefix("torch."))
    return f"{cls.__name__}{flags}: {' '.join(words)}"


def digest(cls, variant, dtype, master, states, backend):
    """Of parameters, states and norm after three steps; no such mode: ValueError."""
    shapes = SHAPES + CODED * (states == "8bit")
    params = [torch.nn.Parameter(numbers(shape, dtype, i)) for i, shape in enumerate(shapes)]
    with torch.no_grad():  # of another layout
        params.append(torch.nn.Parameter(numbers((7, 40), dtype, 9).t()))
    modes = {"master_weights": master, "state_dtype": states, "seed": 3}
    optimizer = cls(params, **SETTINGS, **modes, **variant, backend=backend)
    found = hashlib.sha256()
    for step in range(3):
        for i, param in enumerate(params):
            param.grad = numbers(param.shape, dtype, 100 * step + i)
        optimizer.step()
        found.update(optimizer.grad_norm.numpy().tobytes())
    for param in params:
        entries = optimizer.state.get(param, {})
        for tensor in (param.detach(), *(entries[key] for key in sorted(entries))):
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def every():
    for cls, variant in CASES:
        for dtype, master, states in [(FP64, None, FP32), *MODES]:
            yield cls, variant, dtype, master, states


def digests(backend, cases):
    found = {}
    for case in cases:
        try:
            found[name_of(*case)] = digest(*case, backend)
        except ValueError as error:  # a mode that a rule does not have
            if "is not for" not in str(error) and "must be its states" not in str(error):
                raise
    return found


def known():
    return dict(line.rsplit("  ", 1) for line in FILE.read_text().splitlines())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_the_same_bits_as_ever(backend):
    assert digests(backend, every()) == known()


@interpreted
@pytest.mark.parametrize("case", [case for i, case in enumerate(every()) if i % 19 == 0], ids=str)
def test_the_same_bits_as_ever_in_triton(case):
    for name, found in digests("triton", [case]).items():
        assert found == known()[name]


if __name__ == "__main__":
    FILE.write_text("".join(f"{k}  {v}\n" for k, v in digests("cpp", every()).items()))
