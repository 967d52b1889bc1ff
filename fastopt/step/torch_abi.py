"""Where torch keeps what must be looked at in every step: offsets into its objects.

Torch's own interfaces tell where a tensor is, but a step of many small tensors would spend nearly
all of its time in them. So the offsets are found once per process, by looking for what is known of
a few tensors in the bytes of these. A field counts only if there is one place for it that is right
for all of them, and for others that were not searched. Where gradients, versions or Python objects
have none, of which no stable interface tells, torch is asked for them at every step; where any
other field has none, every step is planned anew, in Python.

Torch's objects differ in size between its versions, and torch does not tell the size. But each
object is an allocation of its own, and the allocator tells how many bytes of that may be read: at
least the object's. The few bytes behind the object are never taken for a field, because they do not
follow what is known of each tensor. An address is followed only if torch returned it, or if it has
been found in the object that keeps it.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

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
    """Offsets in bytes; as TensorFields of csrc/torch_abi.h has them, in the same order.

    Args:
        impl: in a Python tensor: the address of its TensorImpl. The next ones are in that.
        storage: the address of the StorageImpl.
        autograd_meta: the address of what autograd knows, or 0.
        version: the address of the counter of versions.
        dim: the number of dimensions.
        sizes: `INLINE` sizes, then as many strides; of more dimensions, the address of both.
        storage_offset: in elements.
        dtype: a number of 16 bits; behind it the device, two of 8 bits.
        keys: the set of dispatch keys, 64 bits, which tells layout, kind of device, lazy negation
            and subclasses that intercept operators.
        data: in a StorageImpl: the address of the memory; then who frees it, and of what.
        nbytes: in a StorageImpl: the size of the memory.
        grad: in what autograd knows: the address of the gradient's TensorImpl.
        number: in the counter of versions: the version, 32 bits.
        object: the address of the Python tensor; its lowest bit may be set.
        undefined: the address of the TensorImpl that stands for no gradient.
        plain_keys: the dispatch keys of an ordinary tensor on the CPU.

    Those in `OPTIONAL` are 0 where they are not known.
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
    nbytes: int
    grad: int
    number: int
    object: int
    undefined: int
    plain_keys: int


class Functions(NamedTuple):
    """Addresses of functions of torch's stable C interface; as TensorFunctions of the same file."""

    make: int
    assign: int
    destroy: int


# Values that are right; one for each of some fields that tell of each other.
Choices = set[tuple[int, ...]]


class NotFoundError(Exception):
    """A field has no value that is right, or more than one."""


def find() -> tuple[Fields, Functions] | None:
    """Those of this torch and its functions, None where they cannot be told for sure."""
    names = ("new_uninitialized_tensor", "assign_tensors", "delete_tensor_object")
    try:
        found = (_function("libtorch_cpu.so", f"aoti_torch_{name}") for name in names)
        addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found]
        # Whatever the mode is that the process is in now.
        with torch.inference_mode(False), _disable_current_modes(), torch._C._DisableFuncTorch():
            return _verify(_search(_probes()), _others()), Functions(*addresses)
    except Exception:  # whatever another version may raise
        return None


def _search(tensors: Sequence[Tensor]) -> Fields:
    """The fields for which one value, and no other, is right for all tensors."""
    common: dict[tuple[str, ...], Choices] = {}
    for tensor in tensors:
        for names, values in _values(tensor).items():
            common[names] = common.get(names, values) & values
    found: dict[str, int] = {}
    for names, values in common.items():
        found.update(_unknown(names) if len(values) != 1 else zip(names, *values, strict=True))
    return Fields(**found)


def _verify(fields: Fields, tensors: Sequence[Tensor]) -> Fields:
    """Those fields that are right for each of the tensors."""
    for tensor in tensors:
        for names, values in _values(tensor).items():
            if tuple(getattr(fields, name) for name in names) not in values:
                fields = fields._replace(**_unknown(names))
    return fields


def _unknown(names: tuple[str, ...]) -> dict[str, int]:
    if names not in OPTIONAL:
        raise NotFoundError(names)
    return dict.fromkeys(names, 0)


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


def _others() -> list[Tensor]:
    """Tensors as a step meets them."""
    param = torch.nn.Parameter(torch.zeros(6, 8, dtype=torch.bfloat16, device="cpu"))
    param.grad = torch.ones(8, 6, dtype=torch.bfloat16, device="cpu").t()
    for _ in range(9):
        param.detach().add_(1)
    frozen = torch.nn.Parameter(torch.zeros((), dtype=torch.float64, device="cpu"))
    state = torch.zeros(2, 1, 3, 1, 2, 5, device="cpu")[1:]
    return [param, param.grad, frozen, param.detach()[2:, 3:], state, state.half()]


def _values(tensor: Tensor) -> dict[tuple[str, ...], Choices]:
    """What a tensor's bytes allow of the fields."""
    python_object = ctypes.string_at(id(tensor), type(tensor).__basicsize__)
    (impl,) = _where(python_object, "Q", tensor._cdata)
    memory = _allocation(tensor._cdata)
    storage = tensor.untyped_storage()
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    found = {
        "impl": {impl},
        "storage": _where(memory, "Q", storage._cdata),
        "dim": _where(memory, "Q", tensor.dim()),
        "sizes": _sizes(tensor, impl, memory),
        "storage_offset": _where(memory, "Q", int(tensor.storage_offset())),
        "dtype": _where(memory, "Hbb", SCALAR_TYPES[tensor.dtype], 0, -1),  # 0, -1: the CPU
        "keys": _where(memory, "Q", keys),
        "undefined": {_undefined()},
    }
    if not found["storage"]:
        raise NotFoundError("storage")
    storage_memory = _allocation(storage._cdata)
    data = _where(storage_memory, "Q", storage.data_ptr())
    found["data"] = {offset for offset in data if offset + 2 * WORD in data}
    found["nbytes"] = _where(storage_memory, "Q", storage.nbytes())
    if not tensor.is_neg():
        found["plain_keys"] = {keys}
    choices: dict[tuple[str, ...], Choices] = {
        (name,): {(value,) for value in values} for name, values in found.items()
    }
    for names, look in OPTIONAL.items():
        try:
            choices[names] = look(tensor, impl, memory)
        except (AttributeError, NotFoundError):  # torch has no such function, or it tells otherwise
            choices[names] = set()
    return choices


def _sizes(tensor: Tensor, impl: int, memory: bytes) -> set[int]:
    addresses = ctypes.c_void_p(), ctypes.c_void_p()
    for name, address in zip(("sizes", "strides"), addresses, strict=True):
        get = _function("libtorch_cpu.so", f"aoti_torch_get_{name}")
        get.argtypes, get.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
        if get(id(tensor) + impl, ctypes.byref(address)):  # which is the at::Tensor's address
            raise NotFoundError(name)
    sizes, strides = (address.value or 0 for address in addresses)
    if strides - sizes != max(tensor.dim(), INLINE) * WORD:
        return set()
    if tensor.dim() > INLINE:
        return _where(memory, "Q", sizes)
    offset = sizes - tensor._cdata
    return {offset} if 0 < offset <= len(memory) - 2 * INLINE * WORD else set()


def _undefined() -> int:
    tensor = ctypes.c_void_p()
    if _function("libtorch_cpu.so", "aoti_torch_new_uninitialized_tensor")(ctypes.byref(tensor)):
        raise NotFoundError("undefined")
    address = _word(tensor.value or 0)
    _function("libtorch_cpu.so", "aoti_torch_delete_tensor_object")(tensor)
    return address


def _autograd(tensor: Tensor, impl: int, memory: bytes) -> Choices:
    """Offsets of what autograd knows, and of the gradient in that."""
    # TensorImpl::grad() const
    place = _function("libc10.so", "_ZNK3c1010TensorImpl4gradEv")(tensor._cdata)
    if _word(place) != (_undefined() if tensor.grad is None else tensor.grad._cdata):
        raise NotFoundError("grad")
    known = tensor.requires_grad or tensor._is_view()
    return {
        (at, grad)
        for grad in range(WORD, 256, WORD)
        for at in _where(memory, "Q", place - grad if known else 0)
    }


def _version(tensor: Tensor, impl: int, memory: bytes) -> Choices:
    """Offsets of the address of the counter of versions, and of the number in that."""

    def place(tensor: Tensor) -> int:
        # torch::autograd::impl::version_counter(at::Tensor const&)
        name = "_ZN5torch8autograd4impl15version_counterERKN2at6TensorE"
        return int(_function("libtorch_cpu.so", name)(id(tensor) + impl))

    # What stands there is an address, not the number itself: tensors that share a counter have the
    # same, and others of the same version have another.
    one, other = torch.empty(0, device="cpu"), torch.empty(0, device="cpu")
    shared = one.detach()
    if _word(place(one)) != _word(place(shared)) or _word(place(one)) == _word(place(other)):
        raise NotFoundError("version")
    offset = place(tensor) - tensor._cdata
    counter = _allocation(_word(place(tensor)))
    return {(offset, number) for number in _where(counter, "I", tensor._version)}


def _object(tensor: Tensor, impl: int, memory: bytes) -> Choices:
    return {(at,) for at in _where(memory, "Q", id(tensor))}


#: What a step can do without.
OPTIONAL = {
    ("autograd_meta", "grad"): _autograd,
    ("version", "number"): _version,
    ("object",): _object,
}


def _where(memory: bytes, code: str, *values: int) -> set[int]:
    """The offsets of packed values."""
    value = struct.pack(code, *values)
    size = len(value)
    return {at for at in range(0, len(memory) - size + 1, size) if memory[at : at + size] == value}


def _word(address: int) -> int:
    (word,) = struct.unpack("Q", ctypes.string_at(address, WORD))
    return int(word)


def _allocation(address: int) -> bytes:
    """All that may be read of an object, which begins there."""
    usable = ctypes.CDLL(None).malloc_usable_size  # of the allocator that the process has
    usable.argtypes, usable.restype = [ctypes.c_void_p], ctypes.c_size_t
    return ctypes.string_at(address, usable(address))


def _function(library: str, name: str) -> Any:
    """A function of one of torch's libraries, from an address to an address."""
    function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / library))[name]
    function.argtypes = [ctypes.c_void_p]
    function.restype = ctypes.c_void_p
    return function
