"""The specification of how numbers are kept in memory, in plain torch operators.

16-bit parameters lie beside what makes fp32 masters of them, 8-bit states beside their scales. The
arithmetic sees fp32 only: `Stored.unpack` makes it, `Stored.pack_` stores it again.
``csrc/packing.h`` and ``kernels/packing.py`` have the same functions, with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .rule import arithmetic_dtype

CODE_BLOCK, MIN_CODE_BLOCK = 256, 32  # the most elements that share a scale, and the least
MIN_CODED = 4096  # elements of a tensor whose states are worth 8 bits, as for bitsandbytes
SUM_BLOCK = 256  # elements that share a checksum
CHUNK = 8192  # elements that share a key
SIGNED_MANTISSA, MANTISSA = 5, 4  # bits of a code with a sign, and without
MIN_SCALE = 2.0**-120
NAN = 0x7FC00000  # the bits of one
ONE = 127 << 23  # the bits of 1.0

Random = Callable[[Tensor], Tensor]

#: Of parameters and gradients.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def memory_order(tensor: Tensor) -> list[int]:
    """The tensor's dimensions from the largest stride to the smallest."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in sizes) + 1) * tensor.element_size()


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements in one dimension; a view of a tensor without gaps."""
    return tensor.permute(memory_order(tensor)).reshape(-1)


def code_block(tensor: Tensor) -> int:
    """How many elements share a scale in 8-bit states of this tensor; 0: it has none.

    The largest power of two that divides a row, an index of dimension 0. No block is in two rows,
    so that a sharded tensor has the blocks of a whole one.
    """
    if tensor.numel() < MIN_CODED or tensor.ndim < 2:
        return 0
    inner = [d for d in range(1, tensor.ndim) if tensor.shape[d] > 1]
    if any(tensor.stride(d) > tensor.stride(0) for d in inner):
        return 0  # a row is no run of memory
    block = math.gcd(math.prod(tensor.shape[1:]), CODE_BLOCK)
    return block if block >= MIN_CODE_BLOCK else 0


def bits(x: Tensor) -> Tensor:
    """Those of fp32 numbers, as int64 in 0 .. 2^32 - 1."""
    return x.view(torch.int32).long() & 0xFFFFFFFF


def from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)  # wraps


def bfloat16_from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int16).view(torch.bfloat16)  # wraps


def nearest_bfloat16(x: Tensor) -> Tensor:
    """To nearest, ties away from zero.

    A remainder of 16 bits cannot tell the two ties of an even number apart, which
    ``x.bfloat16()`` rounds to that number both. The results differ for 1 in 131,072 numbers.
    """
    # Not by >>, which DTensor takes for an in-place operator and leaves out.
    rounded = torch.where(x.isnan(), NAN, bits(x) + 0x8000).bitwise_right_shift(16)
    return bfloat16_from_bits(rounded)


def checksums(param: Tensor, order: Tensor) -> Tensor:
    """One for each block of `SUM_BLOCK` bf16 numbers: int32.

    A weighted sum of the 16-bit words. A change of one word always changes it; other changes may be
    missed, once in about 2^16 blocks or more: then an old remainder moves them by half a bf16 step.

    Args:
        order: a tensor in whose memory order the numbers are taken.
    """
    x = param.detach().permute(memory_order(order)).reshape(-1).view(torch.int16).int()
    i = torch.arange(1, SUM_BLOCK + 1, device=param.device) * 0x9E3779B1 & 0xFFFFFFFF
    factors = (((i ^ i >> 16) * 0x2C1B3C6D & 0xFFFFFFFF) >> 17 | 1).int()
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % SUM_BLOCK)).view(-1, SUM_BLOCK)
    return (blocks * factors).sum(1, dtype=torch.int32)  # wraps


def _unpack_remainder(param: Tensor, remainder: Tensor) -> Tensor:
    value = param.float()
    master = from_bits(bits(value) + remainder)
    # A parameter that was set to 0 or infinity, with the remainder of what it was before.
    return torch.where(master.isnan(), value, master)


def _pack_remainder(x: Tensor, random: Random) -> tuple[Tensor, Tensor]:
    return nearest_bfloat16(x), torch.where(x.isnan(), 0, bits(x)).to(torch.int16)


def param_of(master: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter of a master."""
    return nearest_bfloat16(master) if dtype == torch.bfloat16 else master.to(dtype)


def _unpack_master(param: Tensor, master: Tensor) -> Tensor:
    # A master that is not what the parameter was rounded from is out of date.
    rounded = param_of(master, param.dtype)
    stands = rounded.view(torch.int16) == param.view(torch.int16)
    return torch.where(stands, master, param.float())


def _pack_master(dtype: torch.dtype) -> Callable[[Tensor, Random], tuple[Tensor, Tensor]]:
    return lambda x, random: (param_of(x, dtype), x)


def _unpack_stochastic(param: Tensor, nothing: None) -> Tensor:
    return param.float()


def _pack_stochastic(x: Tensor, random: Random) -> tuple[Tensor, None]:
    """Rounds up with a probability that is the dropped part: unbiased."""
    rounded = torch.where(x.isnan(), NAN, bits(x) + (random(x) >> 16))
    return bfloat16_from_bits(rounded >> 16), None


def _level(codes: Tensor, mantissa: int) -> Tensor:
    """z - 1: see `_pack_codes`."""
    return from_bits((codes.long() << (23 - mantissa)) + ONE) - 1


def _unpack_codes(codes: Tensor, scale: Tensor) -> Tensor:
    x = _level(codes & 0x7F, SIGNED_MANTISSA) * scale
    return x.copysign(127.5 - codes.float())


def _unpack_unsigned_codes(codes: Tensor, scale: Tensor) -> Tensor:
    return _level(codes, MANTISSA) * scale


def _pack_codes(x: Tensor, random: Random) -> tuple[Tensor, Tensor]:
    """Codes of numbers with a sign.

    A code c stands for (z - 1) * scale, where z is the c-th number from 1 on whose mantissa has
    SIGNED_MANTISSA bits: evenly spaced near 0, then in octaves, each with the relative precision of
    so many bits. The scale makes the largest of a block the largest code.

    Rounded stochastically: a moving average moves by less than half a code in many steps, and would
    never move at all, not even to 0 after the last gradient.
    """
    # Both moments round by bits of their own. The last one of 16 is left out where the largest z,
    # with its rounding errors, might get beyond the largest code.
    codes, scale = _pack_levels(x, 127, SIGNED_MANTISSA, random(x) & 0xFFFE)
    return torch.where(x.signbit(), codes | 0x80, codes), scale


def _pack_unsigned_codes(x: Tensor, random: Random) -> tuple[Tensor, Tensor]:
    """The same of squares, with MANTISSA bits: four times the octaves, so twice the decades.

    They do not become code 0, so that they do not decode to 0: a denominator of eps alone would
    make a step of any size. Code 0 is what new states are filled with.
    """
    codes, scale = _pack_levels(x, 255, MANTISSA, random(x) >> 16)
    return codes.clamp(min=1), scale


def _pack_levels(x: Tensor, max_code: int, mantissa: int, random: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of magnitudes, which ``random``, of 16 bits, rounds up."""
    x = x.abs()
    # As integers, among which NaN is larger than infinity.
    largest = from_bits(bits(x).amax(1, keepdim=True))
    scale = largest / _level(torch.tensor(max_code, device=x.device), mantissa)
    scale = torch.where(scale < MIN_SCALE, MIN_SCALE, scale)  # no denormals, for their inverses
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    z = x * (1 / scale) + 1
    dither = random << (7 - mantissa)
    return (bits(z) + dither - ONE) >> (23 - mantissa) & max_code, scale


def _unpack_plain(a: Tensor, nothing: None) -> Tensor:
    return a


def _pack_plain(x: Tensor, random: Random) -> tuple[Tensor, None]:
    return x, None


@dataclass(frozen=True)
class Packing:
    """A way of keeping numbers in an array ``a`` of their shape and an array ``b`` beside it.

    Args:
        a: dtype; None: any of `DTYPES`, and that of the arithmetic in new arrays.
        b: dtype; None where there is no such array.
        unpack: numbers of ``a`` and ``b``.
        pack: ``a`` and ``b`` of numbers.
        is_random: ``pack`` rounds stochastically.
        is_coded: ``b`` has an element for each block of ``a``, and both functions take blocks:
            ``a`` of shape (blocks, elements), ``b`` of shape (blocks, 1).
    """

    a: torch.dtype | None
    b: torch.dtype | None
    unpack: Callable[..., Tensor]
    pack: Callable[[Tensor, Random], tuple[Tensor, Tensor | None]]
    is_random: bool = False
    is_coded: bool = False

    def new_a(self, like: Tensor) -> Tensor:
        """An ``a`` for a parameter, without gaps, in the order of its memory, uninitialized."""
        dtype = self.a or arithmetic_dtype(like)
        return torch.empty_like(like, dtype=dtype, requires_grad=False)

    def b_shape(self, shape: Sequence[int], block: int) -> tuple[int, ...]:
        """The shape of ``b`` beside an ``a`` of a shape, in blocks of so many elements."""
        return (shape[0], math.prod(shape[1:]) // block) if self.is_coded else tuple(shape)

    def new_b(self, like: Tensor, block: int) -> Tensor | None:
        """The same of ``b``."""
        if self.is_coded:
            shape = self.b_shape(like.shape, block)
            return torch.empty(shape, dtype=self.b, device=like.device)
        if self.b is None:
            return None
        return torch.empty_like(like, dtype=self.b, requires_grad=False)


def _codes(unpack: Callable[..., Tensor], pack: Callable[..., tuple[Tensor, Tensor]]) -> Packing:
    return Packing(torch.uint8, torch.float32, unpack, pack, is_random=True, is_coded=True)


def _master(dtype: torch.dtype) -> Packing:
    return Packing(dtype, torch.float32, _unpack_master, _pack_master(dtype))


PACKINGS = {
    "plain": Packing(None, None, _unpack_plain, _pack_plain),
    "remainder": Packing(torch.bfloat16, torch.int16, _unpack_remainder, _pack_remainder),
    "master_of_bfloat16": _master(torch.bfloat16),
    "master_of_float16": _master(torch.float16),
    "stochastic": Packing(
        torch.bfloat16, None, _unpack_stochastic, _pack_stochastic, is_random=True
    ),
    "codes": _codes(_unpack_codes, _pack_codes),
    "unsigned_codes": _codes(_unpack_unsigned_codes, _pack_unsigned_codes),
}

#: What numbers can be kept as: the plain dtypes and the packings, by the names of Storage in
#: csrc/packing.h, which are compared on loading.
STORAGES = (*(str(dtype).removeprefix("torch.") for dtype in DTYPES), *[*PACKINGS][1:])


@dataclass
class Stored:
    """Numbers, however they are kept.

    Args:
        a: the numbers themselves, or the first array of a packing.
        packing: one of `PACKINGS`.
        b: the second array of the packing.
        sums: the `checksums` of ``a`` when it was packed, in the memory order of ``b``. Where they
            are others now, somebody else wrote ``a``, and ``b`` counts as 0. None: nobody did.
    """

    a: Tensor
    packing: str = "plain"
    b: Tensor | None = None
    sums: Tensor | None = None

    @property
    def arrays(self) -> list[Tensor]:
        return [array for array in (self.a, self.b, self.sums) if array is not None]

    @property
    def storage(self) -> int:
        """Index into `STORAGES`."""
        plain = str(self.a.dtype).removeprefix("torch.")
        return STORAGES.index(plain if self.packing == "plain" else self.packing)

    @property
    def is_coded(self) -> bool:
        return PACKINGS[self.packing].is_coded

    @property
    def block(self) -> int:
        """How many elements of ``a`` share one of ``b``."""
        if self.b is None or not self.b.numel():
            return 1
        return max(self.a.numel() // self.b.numel(), 1)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The numbers in the type of the arithmetic."""
        a, b = self.a.detach(), self.valid_b()
        if not self.is_coded:
            return PACKINGS[self.packing].unpack(a, b).to(dtype)
        assert b is not None
        x = torch.empty_like(a, dtype=dtype)
        blocks = PACKINGS[self.packing].unpack(self._blocks(a), b.reshape(-1, 1))
        in_memory_order(x).copy_(blocks.view(-1))
        return x

    def _blocks(self, x: Tensor) -> Tensor:
        return in_memory_order(x).view(-1, self.block) if self.is_coded else x

    def pack_(self, x: Tensor, random: Random) -> None:
        """Stores numbers."""
        packing = PACKINGS[self.packing]
        if packing.is_random:
            # Blocks and random numbers go by the memory order of the first array.
            x = torch.empty_like(self.a, dtype=x.dtype).copy_(x)
        a, b = packing.pack(self._blocks(x), random)
        self._blocks(self.a).copy_(a)
        if self.b is not None and b is not None:
            self.b.copy_(b.view(self.b.shape))
            if self.sums is not None:
                self.sums.copy_(checksums(self.a, self.b))

    def valid_b(self) -> Tensor | None:
        """What ``b`` counts as."""
        if self.b is None or self.sums is None:
            return self.b
        stands = checksums(self.a, self.b) == self.sums
        valid = torch.empty_like(self.b)
        in_memory_order(valid).copy_(stands.repeat_interleave(SUM_BLOCK)[: valid.numel()])
        return valid * self.b


class Piece(NamedTuple):
    """Where the elements of a shard are in the whole tensor, in memory order.

    Args:
        offset: the place of the first one.
        run: how many are one after the other; 0: all.
        stride: from the first of a run to that of the next.
    """

    offset: int = 0
    run: int = 0
    stride: int = 0


WHOLE = Piece()


def random_bits(seed: int, step: int, param: int, piece: Piece, like: Tensor) -> Tensor:
    """32 random bits for each element of a tensor, as int64 of its shape.

    A function of nothing but its arguments and of the element's place in memory order: in each
    chunk a Weyl sequence that starts at a key, and one round of shift and multiply.

    Args:
        param: the parameter's place in the optimizer.
    """
    places, last = torch.arange(like.numel(), device=like.device), like.numel() - 1
    if run := piece.run:
        places = places // run * piece.stride + places % run
        last = last // run * piece.stride + last % run
    places += piece.offset
    first = piece.offset // CHUNK
    chunks = range(first, (piece.offset + last) // CHUNK + 1)
    keys = [_key(seed, step, param, chunk) >> 32 for chunk in chunks]
    key = torch.tensor(keys, dtype=torch.int64).to(like.device)[places // CHUNK - first]
    x = places % CHUNK * 0x9E3779B1 + key & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x2C1B3C6D & 0xFFFFFFFF
    result = torch.empty_like(like, dtype=torch.int64)
    in_memory_order(result).copy_(x)
    return result


def _key(*words: int) -> int:
    """64 bits: each word is mixed in with the finalizer of SplitMix64 (Steele et al. 2014)."""
    key = 0
    for word in words:
        z = (key + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) ^ word
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        z = (z ^ z >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        key = z ^ z >> 31
    return key
