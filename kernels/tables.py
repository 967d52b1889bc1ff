"""How a launch finds its tensors: tables of int64 words in the memory of the device.

What a launch does is a list of chunks, one for each program. Doubles stand in the tables bit by
bit.

Tensors: [PARAM + 2 * (1 + states), tensors]; a column has a tensor's number of elements, its param
group, the address of its step, its number in the optimizer, where it is in the whole of which it is
a shard (`fastopt.packing.Piece`), the address of its checksums, and the addresses of both arrays
(see `packing`) of itself and of each state.
Scalars: [rows, OWN + the rule's]; `fastopt.rule.HEAD`, then what the rule takes.
Settings: [groups, 2, OWN + the rule's hyperparameters]; what `update.compute_scalars` makes rows of
scalars from: values, then the addresses of those that lie in the device's memory, else 0.
"""

import triton
import triton.language as tl

from fastopt import rule

CHUNK = tl.constexpr(8192)  # elements; also the fixed partition of the norm
BLOCK = tl.constexpr(1024)  # elements that a program has in its registers at a time
THREADS = tl.constexpr(128)  # of a program

# Rows of the table of tensors. Those of the states follow.
NUMEL, GROUP, STEP, NUMBER, OFFSET, RUN, STRIDE, SUMS, PARAM = map(tl.constexpr, range(9))
# Columns of the table of scalars, and of that of settings. Those of the rule follow.
COEF = tl.constexpr(rule.COEF)
CLIP_VALUE = tl.constexpr(rule.CLIP_VALUE)
UNCLIPPED_COEF = tl.constexpr(rule.UNCLIPPED_COEF)
MAX_NORM = tl.constexpr(rule.MAX_NORM)
SEED = tl.constexpr(rule.SEED)
COUNT = tl.constexpr(rule.STEP)
OWN = tl.constexpr(len(rule.HEAD))


@triton.jit
def locate(chunks, numels):
    """The tensor of this program's chunk, the chunk's first element, and how many elements the
    tensor has from there on."""
    word = tl.load(chunks + tl.program_id(0))
    tensor = word >> 32
    begin = (word & 0xFFFFFFFF) * CHUNK
    return tensor, begin, tl.load(numels + tensor) - begin


@triton.jit
def as_double(word):
    return word.to(tl.float64, bitcast=True)


@triton.jit
def as_word(double):
    return double.to(tl.int64, bitcast=True)
