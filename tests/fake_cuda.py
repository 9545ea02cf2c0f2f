"""A CUDA device that is not there: code runs on fake tensors of device cuda:0, with shapes, types and devices only.

Run with LD_PRELOAD=shim.so (tests/shim.c, built by test_fake_cuda.py), then: with FakeCuda() as gpu: ...

What it finds, without a driver, at any model size (nothing is allocated):
  - an operation on tensors of both devices (FakeTensorMode raises), wrong shapes and types in CUDA-only branches
  - `gpu.waits`: every place where the host waits for the device, with the line that asked for it
  - `gpu.launches`: how many operations are launched (views and metadata are not counted)
  - `gpu.plans`: which attention backend is taken, with the shapes
Integers, booleans and fp64 keep their values in a shadow on the CPU, as far as they follow from host data: shapes that
depend on data work. What follows from floats is 0 / False (a sampled token is 0); a float that is asked for is 1.0.
"""

import collections
import contextlib
import ctypes
import os
import traceback
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default: "item", aten.is_nonzero.default: "item", aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select", aten.equal.default: "equal", aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique", aten.unique_dim.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}  # fmt: skip
VIEWS = (  # launch nothing
    "device size stride layout numel storage_offset dim detach lift_fresh alias view _unsafe_view expand permute t "
    "transpose slice select unsqueeze squeeze split split_with_sizes unbind as_strided empty empty_like new_empty "
    "empty_strided unfold reshape _reshape_alias chunk diagonal set_ resize_ movedim is_same_size sym_size"
)
RANDOM = ("rand", "bernoulli", "dropout", "uniform", "normal", "multinomial", "exponential")
LARGE = 1 << 26  # elements: larger tensors have no shadow


def where():
    """The innermost line that is being run outside torch, and of the project above it, if this thread has one."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    own = [f for f in frames if "site-packages" not in f.filename]
    places = dict.fromkeys(f"{os.path.basename(f.filename)}:{f.lineno}" for f in frames[-1:] + own[-1:])
    return f"{' < '.join(places)}  {(frames[-1].line or '')[:70] if frames else ''}"


def move(module, function, recurse=True):
    """Module._apply, which cannot exchange the insides of fake parameters: new ones take their places."""
    for child in module.children() if recurse else ():
        child._apply(function)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None and (moved := function(parameter)) is not parameter:
                module._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else function(buffer)
    return module


class Sdpa(torch.autograd.Function):
    """The shapes of scaled_dot_product_attention and of its gradients."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


class FakeCuda(TorchDispatchMode):
    """See above."""

    def __init__(self, name="NVIDIA H100 80GB HBM3", capability=(9, 0)):
        super().__init__()
        self.name, self.capability = name, capability
        self.shadow, self.pinned = WeakTensorKeyDictionary(), set()
        self.reset()

    def reset(self):
        """Forget what was counted."""
        self.waits, self.pageable = collections.Counter(), collections.Counter()
        self.launches, self.plans = 0, collections.Counter()

    # ---- being there

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.fake.may_turn_const = lambda tensor: False  # else it computes on the real device
        self.stack.enter_context(self.fake)
        ctypes.c_int.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "shim_devices").value = 127
        memory = 80 * 2**30
        properties = SimpleNamespace(total_memory=memory, major=self.capability[0], minor=self.capability[1],
                                     name=self.name, multi_processor_count=132)  # fmt: skip

        def state(*args, **kwargs):
            return torch.zeros(16, dtype=torch.uint8, device="cpu")

        def nothing(*args, **kwargs):
            return None

        def yes(*args, **kwargs):
            return True

        def zero(*args, **kwargs):
            return 0

        self.patch(
            "torch.cuda", is_available=yes, device_count=lambda: 1, current_device=zero, set_device=nothing,
            synchronize=lambda *a: self.wait("synchronize"), get_device_name=lambda *a: self.name,
            empty_cache=nothing, get_device_properties=lambda *a: properties, is_bf16_supported=yes,
            get_device_capability=lambda *a: self.capability, max_memory_allocated=zero, memory_allocated=zero,
            max_memory_reserved=zero, reset_peak_memory_stats=nothing, get_rng_state=state, set_rng_state=nothing,
            manual_seed=nothing, manual_seed_all=nothing, _lazy_init=nothing, is_initialized=yes,
            mem_get_info=lambda *a: (memory, memory),
        )  # fmt: skip
        sdpa = self.sdpa(torch.nn.functional.scaled_dot_product_attention)
        self.patch("torch.nn.functional", scaled_dot_product_attention=sdpa)
        self.stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # of which convolutions ask the version
        self.patch("torch.cuda.amp.common", amp_definitely_not_available=lambda: False)
        self.patch("torch.Tensor", pin_memory=lambda tensor, *a: self.pin(tensor))
        self.patch("torch._subclasses.fake_tensor.FakeTensor", tolist=lambda x: self.tolist(x),
                   numpy=lambda x, **k: self.numpy(x))  # fmt: skip
        self.patch("torch.nn.Module", _apply=move)
        self.patch("torch.nn.attention.varlen", _should_use_cudnn=lambda index: self.capability[0] in (9, 10))
        real_tensor = torch.tensor

        def numbers(data):
            if isinstance(data, (list, tuple)):
                return [numbers(part) for part in data]
            return data.item() if isinstance(data, torch.Tensor) else data

        def tensor(data, *args, device=None, **kwargs):  # of a list with tensors in it torch would ask the driver
            device = {} if device is None else {"device": device}
            return real_tensor(numbers(data) if isinstance(data, (list, tuple)) else data, *args, **kwargs, **device)

        self.patch("torch", tensor=tensor)
        super().__enter__()
        return self

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def patch(self, target, **attributes):
        for name, value in attributes.items():
            self.stack.enter_context(mock.patch(f"{target}.{name}", value))

    def pin(self, tensor):
        self.pinned.add(tensor.untyped_storage()._cdata)
        return tensor

    def sdpa(self, real):
        """Which backend torch 2.14.1 takes (sdp_utils.cpp) for half precision: cuDNN first on Hopper."""

        def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
            if query.device.type != "cuda":
                return real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            assert attn_mask is None or attn_mask.device.type == "cuda", "the mask is on the CPU"
            if torch.is_autocast_enabled("cuda"):  # it is on autocast's list
                query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
            assert query.dtype == key.dtype == value.dtype, (query.dtype, key.dtype, value.dtype)
            half = query.dtype in (torch.float16, torch.bfloat16)
            hopper = self.capability[0] in (9, 10)
            if half and hopper and torch.backends.cuda.cudnn_sdp_enabled() and key.shape[2] > 1:
                backend = "cudnn"
            elif half and attn_mask is None and not (is_causal and query.shape[2] != key.shape[2]):
                backend = "flash"
            else:
                backend = "efficient"
            self.plans[backend, tuple(query.shape), tuple(key.shape)] += 1
            self.launches += 1
            return Sdpa.apply(query, key, value)

        return attention

    # ---- values

    def value(self, tensor):
        """The numbers of an integer or boolean tensor (a real one's own), None of others."""
        return self.shadow.get(tensor) if isinstance(tensor, FakeTensor) else tensor

    def host_value(self, tensor):
        value = self.value(tensor)
        with torch._C._DisableTorchDispatch():
            return torch.ones(tensor.shape) if value is None else value

    def tolist(self, tensor):
        if tensor.device.type == "cuda":
            self.wait("tolist")
        value = self.host_value(tensor)
        with torch._C._DisableTorchDispatch():
            return value.tolist()

    def numpy(self, tensor, **kwargs):
        value = self.host_value(tensor)
        with torch._C._DisableTorchDispatch():
            return value.numpy().copy()

    def wait(self, kind):
        self.waits[f"{kind}: {where()}"] += 1

    # ---- every operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        on_cuda = any(x.device.type == "cuda" for x in tensors)
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        real = self.really(func, args, kwargs, tensors, name)
        if func is aten._local_scalar_dense.default:
            if on_cuda:
                self.wait("item")
            value = self.value(tensors[0])
            with torch._C._DisableTorchDispatch():
                return 1.0 if value is None else value.item()
        mask = func is aten.index.Tensor and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if on_cuda and (func in WAITS or mask):
            self.wait("boolean index" if mask else WAITS[func])
        if func in WAITS or mask:
            out, real = self.of_values(func, args, kwargs, tensors, real, mask, on_cuda)
        else:
            out = func(*args, **kwargs)
        results = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        if name in ("_to_copy", "copy_"):
            self.count_copy(name, args, kwargs, results)
        if (on_cuda or any(x.device.type == "cuda" for x in results)) and name not in VIEWS.split():
            self.launches += 1
        if name == "_varlen_attn":
            options = dict(zip(("window_size", "enable_gqa"), args[9:11]))
            taken = varlen._can_use_cudnn(args[0], args[1], args[2], args[5], **options)
            self.plans[f"varlen {'cudnn' if taken else 'flash'}", tuple(args[0].shape), tuple(args[1].shape)] += 1
        values = [None] * len(results) if real is None else tree_flatten(real)[0]
        for fake, value in zip(results, [x for x in values if x is None or isinstance(x, torch.Tensor)]):
            self.remember(fake, value, name, args, tensors)
        return out

    def of_values(self, func, args, kwargs, tensors, real, mask, on_cuda):
        """An operation whose shape depends on values: that of the shadows, or as if all numbers were ones."""
        try:
            return func(*args, **kwargs), real
        except (DynamicOutputShapeException, DataDependentOutputException):
            with torch._C._DisableTorchDispatch():
                if real is None and mask:  # of floats: the shape follows from the mask alone
                    real = torch.empty(args[0].shape)[tuple(x if x is None else self.value(x) for x in args[1])]
                elif real is None:
                    real = func(*(torch.ones(x.shape) if isinstance(x, torch.Tensor) else x for x in args))
            dtype, device = tensors[0].dtype if mask else None, "cuda" if on_cuda else "cpu"
            out = tree_map_only(torch.Tensor, lambda x: torch.empty(x.shape, dtype=dtype or x.dtype, device=device),
                                real)  # fmt: skip
            return out, real

    def count_copy(self, name, args, kwargs, results):
        source = args[1] if name == "copy_" else args[0]
        ends = source.device.type, results[0].device.type
        non_blocking = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        if ends == ("cuda", "cpu"):
            self.wait("device to host")
        elif ends == ("cpu", "cuda") and not non_blocking:
            self.wait("host to device, blocking")
        elif ends == ("cpu", "cuda") and source.untyped_storage()._cdata not in self.pinned:
            self.pageable[where()] += 1

    def remember(self, fake, value, name, args, tensors):
        """Keep the value of an integer or boolean result, and of an fp64 one if it is known (counts travel so)."""
        exact = fake.dtype == torch.float64
        if not isinstance(fake, FakeTensor) or fake.is_complex() or (fake.dtype.is_floating_point and not exact):
            return
        if (value is None or value.shape != fake.shape) and not exact:
            with torch._C._DisableTorchDispatch():
                finite = name in ("ne", "isfinite") or (name == "eq" and args[0] is args[1])  # as floats are 1
                make = torch.ones if finite else torch.zeros
                value = make(fake.shape, dtype=fake.dtype) if fake.numel() < LARGE else None
        if value is None and fake in self.shadow:  # changed in place by what is not known
            del self.shadow[fake]
        if value is not None and not any(fake is x for x in tensors):
            self.shadow[fake] = value

    def really(self, func, args, kwargs, tensors, name):
        """The result on the values of the tensors, if all of them have some."""
        values = [self.value(x) for x in tensors]
        if any(v is None or v.numel() > LARGE for v in values) or any(word in name for word in RANDOM):
            return None
        makes_floats = (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point
        if not tensors and makes_floats and name not in ("arange", "full", "scalar_tensor", "zeros"):
            return None
        pairs = {id(x): v for x, v in zip(tensors, values)}

        def swap(x):
            if isinstance(x, torch.Tensor):
                return pairs[id(x)]
            return torch.device("cpu") if isinstance(x, torch.device) else x

        try:
            with torch._C._DisableTorchDispatch():
                flat, spec = tree_flatten((args, kwargs))
                a, k = tree_unflatten([swap(x) for x in flat], spec)
                k.pop("pin_memory", None)
                return func(*a, **k)
        except RuntimeError:  # no such operator on the CPU: its value is not known
            return None
