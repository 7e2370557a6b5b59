"""GPUs that are not there: tensors that say they lie on one, compute on the CPU, and meet others as real ones would.

Inside `pretend_gpus()` every operation runs as on a machine with GPUs, forward and backward, with true values. It
refuses what a GPU refuses: tensors of two devices in one operation. It does not run a GPU's kernels: their rounding,
their speed and what they cannot do are seen on a GPU alone.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import transformers_crosslmm
from transformers_crosslmm import attention_crosslmm

aten = torch.ops.aten

COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Besides copies the only operations that take tensors of two devices: indices may lie on the CPU."""
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
}
"""What they return, or its shape, is not known until the GPU has come so far."""


@dataclass
class Traffic:
    """What goes between CPU and GPU and stops either: each time the line of Transformers or of this package."""

    waits: list[str] = field(default_factory=list)  # the CPU waits for a result of the GPU
    uploads: list[str] = field(default_factory=list)  # tensors from the CPU

    def clear(self) -> None:
        self.waits.clear()
        self.uploads.clear()


@contextlib.contextmanager
def pretend_gpus(*, has_flash_kernel: bool = True) -> Iterator[Traffic]:
    """has_flash_kernel: whether PyTorch's own flash kernel runs on them, for half precision; old GPUs lack it."""
    traffic = Traffic()

    def can_use_flash_attention(params, debug=False):
        is_half = params.query.dtype in (torch.float16, torch.bfloat16)
        return has_flash_kernel and is_half and params.query.shape[-1] <= 256

    with (
        patch.object(torch.cuda, "_lazy_init", lambda: None),
        patch.object(torch.cuda, "default_stream", lambda device: Stream()),
        patch.object(torch, "Stream", Stream),
        patch.object(attention_crosslmm, "can_use_flash_attention", can_use_flash_attention),
        NamedForCpp(),
        PretendGpus(traffic),
    ):
        lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes its values on the CPU
        try:
            yield traffic
        finally:
            torch._C._set_only_lift_cpu_tensors(lift)


class OnGpu(Tensor):
    """C++ sees a tensor of the meta device that has the GPU's number; Python sees one of the GPU."""

    values: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, values: Tensor, place: torch.device) -> OnGpu:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device("meta", place.index),
        )
        tensor.values, tensor.place = values, place
        return tensor

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self, **_) -> str:
        return f"OnGpu({self.values!r}, {self.place})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of `pretend_gpus()`.")


class NamedForCpp(TorchFunctionMode):
    """Hides GPUs from C++: a build without CUDA would end the process."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        args, kwargs = mapped(as_meta, args), mapped(as_meta, kwargs)
        if func in (torch.tensor, Tensor.new_tensor) and (device := kwargs.pop("device", None)) is not None:
            return func(*args, **kwargs).to(device)
        if func is Tensor.cuda:
            return args[0].to(torch.device("meta", 0))
        return func(*args, **kwargs)


def mapped(change, tree):
    """The tree of lists, tuples and dicts with `change` applied to all else. PyTorch's own takes most of a test."""
    if type(tree) in (list, tuple):
        return type(tree)([mapped(change, branch) for branch in tree])
    if type(tree) is dict:
        return {name: mapped(change, branch) for name, branch in tree.items()}
    return change(tree)


def values_of(leaf):
    return leaf.values if isinstance(leaf, OnGpu) else leaf


def as_meta(leaf):
    if isinstance(leaf, str) and leaf.partition(":")[0] == "cuda":
        leaf = torch.device(leaf)
    return torch.device("meta", leaf.index or 0) if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf


def as_gpu(device: torch.device | None) -> torch.device | None:
    is_gpu = device is not None and device.type == "meta" and device.index is not None
    return torch.device("cuda", device.index) if is_gpu else device


class PretendGpus(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors: list[Tensor] = []
        for tree in (args, kwargs):
            mapped(lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None, tree)
        # A single number of the CPU goes with every device.
        places = [tensor.device for tensor in tensors if tensor.ndim or isinstance(tensor, OnGpu)]
        asked = as_gpu(kwargs.get("device"))
        place = asked or (places[0] if places else torch.device("cpu"))
        is_indexed = func in INDEXING and len({places[0], *(one.device for one in args[2:3] if one.ndim)}) == 1
        if len(set(places)) > 1 and func not in COPIES and not is_indexed:
            raise RuntimeError(f"{func}: tensors must be on one device, found {[str(one) for one in places]}.")
        self.note(func, args, places, place)
        if asked is not None and asked.type == "cuda":
            kwargs["device"] = torch.device("cpu")
        run = STAND_INS.get(func, func) if place.type == "cuda" else func
        result = run(*mapped(values_of, args), **mapped(values_of, kwargs))
        if func._schema.is_mutable:
            return tensors[0]
        if place.type != "cuda":
            return result
        return mapped(lambda leaf: OnGpu(leaf, place) if isinstance(leaf, Tensor) else leaf, result)

    def note(self, func, args, places: list[torch.device], place: torch.device) -> None:
        sources = {one.type for one in places}
        has_mask = func in INDEXING and any(one is not None and one.dtype == torch.bool for one in args[1])
        if "cuda" in sources and (func in WAITING or has_mask):
            self.traffic.waits.append(f"{func.overloadpacket.__name__} {caller()}")
        if func in COPIES and places[-1:] and {places[-1].type, place.type} == {"cuda", "cpu"}:
            kind = self.traffic.waits if place.type == "cpu" else self.traffic.uploads
            kind.append(f"copy {caller()}")
        if func in INDEXING and sources == {"cuda", "cpu"}:
            self.traffic.uploads.append(f"index {caller()}")


LIBRARIES = tuple(str(Path(library.__file__).parent) for library in (transformers, transformers_crosslmm))


def caller() -> str:
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(LIBRARIES)]
    return f"{frames[-1].filename.rpartition('/')[2]}: {frames[-1].line}" if frames else "test"


def flash_attention(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """PyTorch's flash kernel for CUDA, by the one for the CPU: checked as the kernel checks, and to return what is
    described to the compiler."""
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert query.shape[-1] % 8 == 0
    assert query.shape[-1] <= 256
    assert max(query.shape[:2]) <= 65_535  # blocks of a grid, along batch and heads
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    result = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, scale=scale)
    on_meta = (tensor.to("meta") for tensor in (query, key, value))
    described = aten._scaled_dot_product_flash_attention(*on_meta, dropout_p, is_causal, return_debug_mask)
    for one, its in zip(result, described[:2], strict=True):
        assert (one.shape, one.dtype) == (its.shape, its.dtype)
    return *result, *described[2:6], *(torch.zeros(one.shape, dtype=one.dtype) for one in described[6:])


def float32_product(one, other, out_dtype):
    """cuBLAS's product of matrices in half precision, summed and returned in float32."""
    assert one.dtype == other.dtype
    assert one.dtype in (torch.float16, torch.bfloat16)
    return one.to(out_dtype) @ other.to(out_dtype)


STAND_INS = {aten._scaled_dot_product_flash_attention.default: flash_attention, aten.bmm.dtype: float32_product}


class Stream:
    """Everything happens at once, in the order in which it is written."""

    def wait_stream(self, other: Stream) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        pass
