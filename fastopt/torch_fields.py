"""Where torch keeps what must be looked at in every step: offsets into its objects.

Torch's own interfaces tell where a tensor is, but a step of many small tensors would spend nearly
all of its time in them. So the offsets are found once per process, by looking for what is known of
a few tensors in the bytes of these. A field counts only if there is one place for it that is right
for all of them; where any has none, torch is asked at every step, in Python.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

TENSOR_BYTES = 176  # of a c10::TensorImpl
STORAGE_BYTES = 64  # of a c10::StorageImpl; it has more
VERSION_BYTES = 24  # of the counter of versions
WORD = 8
INLINE = 5  # sizes of more dimensions are kept elsewhere

# c10::ScalarType: torch's numbers, which its stable ABI keeps.
SCALAR_TYPES = {
    torch.float32: 6,
    torch.float64: 7,
    torch.bfloat16: 15,
    torch.float16: 5,
    torch.int16: 2,
}


class Fields(NamedTuple):
    """Offsets in bytes; as TensorFields of csrc/torch_tensor.h has them, in the same order.

    Args:
        impl: in a Python tensor: the address of its TensorImpl. The next ones are in that.
        storage: the address of the StorageImpl.
        autograd_meta: the address of what autograd knows, or 0.
        version: the address of the counter of versions.
        dim: the number of dimensions.
        sizes: `INLINE` sizes, then as many strides; of more dimensions, the address of both.
        storage_offset: in elements.
        dtype: a number of 16 bits.
        keys: the set of dispatch keys, 64 bits, which tells layout, kind of device, lazy negation
            and subclasses that intercept operators.
        data: in a StorageImpl: the address of the memory.
        grad: in what autograd knows: the address of the gradient's TensorImpl.
        number: in the counter of versions: the version, 32 bits.
        undefined: the address of the TensorImpl that stands for no gradient.
        plain_keys: the dispatch keys of an ordinary tensor on the CPU.
    """

    impl: int
    storage: int
    autograd_meta: int
    version: int
    dim: int
    sizes: int
    storage_offset: int
    dtype: int
    keys: int
    data: int
    grad: int
    number: int
    undefined: int
    plain_keys: int


class Functions(NamedTuple):
    """Addresses of functions of torch's stable C interface; as TensorFunctions of the same file."""

    make: int
    assign: int
    destroy: int


class NotFoundError(Exception):
    """A field has no place, or more than one."""


def find() -> tuple[Fields, Functions] | None:
    """Those of this torch and its functions, None where they cannot be told for sure."""
    names = ("new_uninitialized_tensor", "assign_tensors", "delete_tensor_object")
    try:
        found = (_function("libtorch_cpu.so", f"aoti_torch_{name}") for name in names)
        addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found]
        # Whatever the mode is that the process is in now.
        with torch.inference_mode(False), _disable_current_modes(), torch._C._DisableFuncTorch():
            return _find(), Functions(*addresses)
    except Exception:  # whatever another version may raise
        return None


def _find() -> Fields:
    tensors = _probes()
    impls = [_bytes(tensor._cdata, TENSOR_BYTES) for tensor in tensors]
    keys = [torch._C._dispatch_keys(tensor).raw_repr() for tensor in tensors]

    def field(code: str, value: Callable[[Tensor], Any]) -> int:
        """The offset of a field of the TensorImpl."""
        return _offset(impls, [struct.pack(code, value(tensor)) for tensor in tensors])

    objects = [_bytes(id(tensor), type(tensor).__basicsize__) for tensor in tensors]
    impl = _offset(objects, [struct.pack("Q", tensor._cdata) for tensor in tensors])
    storage = field("Q", lambda tensor: tensor.untyped_storage()._cdata)
    storages = [_bytes(tensor.untyped_storage()._cdata, STORAGE_BYTES) for tensor in tensors]
    addresses = [struct.pack("Q", tensor.untyped_storage().data_ptr()) for tensor in tensors]
    # The memory's address stands a second time there, for whoever frees it.
    data = min(_offsets(storages, addresses), default=-1)
    if data < 0 or bytes(WORD) in addresses:
        raise NotFoundError
    autograd_meta, grad, undefined = _autograd(tensors, impls)
    version, number = _version(tensors, impl)
    return Fields(
        impl=impl,
        storage=storage,
        autograd_meta=autograd_meta,
        version=version,
        dim=field("Q", Tensor.dim),
        sizes=_sizes(tensors, impls),
        storage_offset=field("Q", Tensor.storage_offset),
        dtype=field("H", lambda tensor: SCALAR_TYPES[tensor.dtype]),
        keys=_offset(impls, [struct.pack("Q", key) for key in keys]),
        data=data,
        grad=grad,
        number=number,
        undefined=undefined,
        plain_keys=keys[-1],
    )


def _probes() -> list[Tensor]:
    """Tensors that differ in every field."""

    def strided(
        dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], offset: int, version: int
    ) -> Tensor:
        base = torch.zeros(4096, dtype=dtype, device="cpu")
        for _ in range(version):
            base.zero_()
        return base.as_strided(shape, strides, offset)

    leaf = torch.zeros(23, device="cpu", requires_grad=True)
    leaf.grad = torch.ones(23, device="cpu")
    return [
        strided(torch.float32, (3, 5, 7), (101, 11, 2), 13, 3),
        strided(torch.float64, (17,), (29,), 31, 4),
        strided(torch.bfloat16, (2, 3, 2, 3, 2), (300, 90, 40, 9, 3), 41, 5),
        strided(torch.int16, (2, 3, 2, 1, 2, 3, 2), (600, 150, 70, 60, 20, 5, 2), 43, 6),
        torch._neg_view(strided(torch.float16, (19, 2), (61, 4), 47, 7)),
        leaf,
        torch.zeros(37, device="cpu", requires_grad=True),
        torch.zeros(41, device="cpu"),
    ]


def _bytes(address: int, count: int) -> bytes:
    return ctypes.string_at(address, count)


def _word(address: int) -> int:
    (word,) = struct.unpack("Q", _bytes(address, WORD))
    return int(word)


def _offsets(memories: Sequence[bytes], values: Sequence[bytes]) -> list[int]:
    """Where each memory has its value."""
    size = len(values[0])
    return [
        offset
        for offset in range(0, len(memories[0]) - size + 1, size)
        if all(
            memory[offset : offset + size] == value
            for memory, value in zip(memories, values, strict=True)
        )
    ]


def _offset(memories: Sequence[bytes], values: Sequence[bytes]) -> int:
    found = _offsets(memories, values)
    if len(found) != 1:
        raise NotFoundError
    return found[0]


def _sizes(tensors: Sequence[Tensor], impls: Sequence[bytes]) -> int:
    def packed(tensor: Tensor) -> bytes:
        return struct.pack(f"{2 * tensor.dim()}Q", *tensor.shape, *tensor.stride())

    def kept(impl: bytes, offset: int, dim: int) -> bytes:
        if dim > INLINE:
            (address,) = struct.unpack_from("Q", impl, offset)
            return _bytes(address, 2 * dim * WORD)
        strides = offset + INLINE * WORD
        return impl[offset : offset + dim * WORD] + impl[strides : strides + dim * WORD]

    few = [(t, i) for t, i in zip(tensors, impls, strict=True) if t.dim() <= INLINE]
    offsets = [
        offset
        for offset in range(0, TENSOR_BYTES - 2 * INLINE * WORD + 1, WORD)
        if all(kept(impl, offset, tensor.dim()) == packed(tensor) for tensor, impl in few)
    ]
    if len(offsets) != 1:
        raise NotFoundError
    # Only now an address that stands there is one.
    for tensor, impl in zip(tensors, impls, strict=True):
        if kept(impl, offsets[0], tensor.dim()) != packed(tensor):
            raise NotFoundError
    return offsets[0]


def _autograd(tensors: Sequence[Tensor], impls: Sequence[bytes]) -> tuple[int, int, int]:
    """Offsets of what autograd knows, and of the gradient in that; and what stands for none."""
    function = _function("libc10.so", "_ZNK3c1010TensorImpl4gradEv")  # TensorImpl::grad() const
    known = [tensor.requires_grad or tensor._is_view() for tensor in tensors]
    places = [function(tensor._cdata) for tensor in tensors]
    found = []
    for offset in range(0, TENSOR_BYTES, WORD):
        metas = [struct.unpack_from("Q", memory, offset)[0] for memory in impls]
        distances = {place - meta for place, meta, k in zip(places, metas, known, strict=True) if k}
        others = {meta for meta, k in zip(metas, known, strict=True) if not k}
        if others == {0} and len(distances) == 1 and 0 < min(distances) < 256:
            found.append((offset, distances.pop()))
    grads = [tensor.grad for tensor in tensors if tensor.is_leaf]
    there = [_word(place) for place, tensor in zip(places, tensors, strict=True) if tensor.is_leaf]
    nothing = {word for word, grad in zip(there, grads, strict=True) if grad is None}
    agree = all(
        grad is None or grad._cdata == word for word, grad in zip(there, grads, strict=True)
    )
    if len(found) != 1 or len(nothing) != 1 or not agree:
        raise NotFoundError
    return (*found[0], nothing.pop())


def _version(tensors: Sequence[Tensor], impl: int) -> tuple[int, int]:
    """Offsets of the address of the counter of versions, and of the number in that."""
    # torch::autograd::impl::version_counter(at::Tensor const&). A Python tensor has an at::Tensor.
    function = _function(
        "libtorch_cpu.so", "_ZN5torch8autograd4impl15version_counterERKN2at6TensorE"
    )
    places = [function(id(tensor) + impl) for tensor in tensors]
    offsets = {place - tensor._cdata for place, tensor in zip(places, tensors, strict=True)}
    if len(offsets) != 1 or not 0 < min(offsets) <= TENSOR_BYTES - WORD:
        raise NotFoundError
    counters = [_bytes(_word(place), VERSION_BYTES) for place in places]
    number = _offset(counters, [struct.pack("I", tensor._version) for tensor in tensors])
    return offsets.pop(), number


def _function(library: str, name: str) -> Any:
    """A function of one of torch's libraries, from an address to an address."""
    function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / library))[name]
    function.argtypes = [ctypes.c_void_p]
    function.restype = ctypes.c_void_p
    return function
