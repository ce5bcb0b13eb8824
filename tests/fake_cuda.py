"""
A CUDA device simulated on the CPU, for tests of the CUDA code where there is no GPU.

    with FakeCuda(monkeypatch) as gpu:
        model.to("cuda").generate(...)

A tensor that is created on "cuda" or moved there computes on the CPU, but says that it is on
cuda:0. What CUDA would not do raises: an operation on tensors of both devices, and a wait for the
GPU while a graph is captured. A captured graph is replayed as CUDA does it: the same operations on
the same tensors, results in the same places. `gpu.waits` names the operations that waited for the
GPU.
"""
import contextlib
import types

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
TRANSFERS = {"to", "cuda", "cpu"}
# results that only the host can use, or whose size only the host can allocate
WAITING = {"item", "tolist", "numpy", "nonzero", "unique", "masked_select", "equal", "__bool__",
           "__int__", "__float__", "__index__", "__contains__", "allclose", "bincount"}
# these take tensors of both devices, and the first ones wait
COPYING = {"copy_", "__getitem__", "__setitem__"}
MIXED = COPYING | {"__set__", "_has_compatible_shallow_copy_type"}


def tensors_in(x):
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, (list, tuple)):
        return [tensor for part in x for tensor in tensors_in(part)]
    return []


def is_cuda(x):
    return isinstance(x, (str, torch.device)) and torch.device(x).type == "cuda"


def is_device(x):
    return isinstance(x, torch.device) or isinstance(x, str) and x.split(":")[0] in ("cuda", "cpu")


class Graph:
    """torch.cuda.CUDAGraph: what a capture recorded, in order."""

    def __init__(self):
        self.operations = []

    @torch.no_grad()
    def replay(self):
        with torch._C.DisableTorchFunction():
            for function, args, kwargs, old in self.operations:
                new = function(*args, **kwargs)
                for x, y in zip(tensors_in(old), tensors_in(new)):
                    if x.data_ptr() != y.data_ptr():           # else in place, or a view
                        x.copy_(y)


class FakeCuda(TorchFunctionMode):
    def __init__(self, monkeypatch, capability=(9, 0)):
        super().__init__()
        self.storages = {}             # on the GPU; weak, so that an address is not used again
        self.pinned = {}
        self.waits = []
        self.captures = 0
        self.graph = None              # that is being captured
        self.in_backward = False       # what autograd itself computes is not seen
        self.replace_torch(monkeypatch, capability)

    def replace_torch(self, monkeypatch, capability):
        card = types.SimpleNamespace(total_memory=2 ** 34, name="fake")
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
                "is_available": lambda: True, "get_device_capability": lambda *_: capability,
                "get_device_properties": lambda *_: card, "max_memory_allocated": lambda: 0,
                "get_rng_state": torch.get_rng_state, "set_rng_state": torch.set_rng_state,
                "Stream": lambda: stream, "current_stream": lambda: stream,
                "stream": contextlib.nullcontext, "CUDAGraph": Graph, "graph": self.capture,
                }.items():
            monkeypatch.setattr(torch.cuda, name, value)

        autocast, enabled = torch.autocast, torch.is_autocast_enabled
        dtype, group = torch.get_autocast_dtype, torch.nn.utils.clip_grad
        by_device = group._group_tensors_by_device_and_dtype

        def say_cuda(tensors, *more):
            groups = by_device(tensors, *more)
            return {(CUDA, key[1]): value for key, value in groups.items()}

        def cpu_autocast(device_type, *args, **more):
            return autocast("cpu", *args, **more)

        monkeypatch.setattr(torch, "autocast", cpu_autocast)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: enabled("cpu"))
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda *_: dtype("cpu"))
        monkeypatch.setattr(group, "_group_tensors_by_device_and_dtype", say_cuda)

    @contextlib.contextmanager
    def capture(self, graph, stream):
        self.captures += 1
        self.graph = graph
        yield
        self.graph = None

    # ------------------------------------------------------------------------- where a tensor is

    def is_on_gpu(self, x):
        return x.untyped_storage()._cdata in self.storages

    def put(self, out, where=None):
        for x in tensors_in(out):
            storage = x.untyped_storage()
            (self.storages if where is None else where)[storage._cdata] = StorageWeakRef(storage)
        if len(self.storages) % 5000 == 0:
            alive = {key: ref for key, ref in self.storages.items() if not ref.expired()}
            self.storages = alive
        return out

    def wait(self, name):
        if self.graph is not None:
            raise RuntimeError(f"{name} waits for the GPU in a capture")
        self.waits.append(name)

    # ------------------------------------------------------------------------------- operations

    def __torch_function__(self, function, _, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function.__name__
        if name == "__get__":
            return self.get(function, *args)
        tensors = tensors_in([args, kwargs])
        on_gpu = [x for x in tensors if self.is_on_gpu(x)]
        if name == "backward":
            return self.backward(args[0])
        if name == "pin_memory":
            return self.put(args[0].clone(), self.pinned)
        if name in TRANSFERS:
            return self.transfer(name, *args, **kwargs)
        if not on_gpu and is_cuda(kwargs.get("device")):       # a factory
            if name in ("tensor", "as_tensor"):
                self.wait(name)                                # copied from pageable memory
            return self.put(function(*args, **kwargs | {"device": "cpu"}))
        if on_gpu:
            self.check(name, args, tensors, on_gpu)
            if is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
        if kwargs.get("out_dtype") == torch.float32:           # mm and bmm: not there on a CPU
            def function(a, b, out_dtype):
                return torch.matmul(a.float(), b.float())
        out = function(*args, **kwargs)
        if on_gpu:
            self.put(out)
            if self.graph is not None:
                self.graph.operations.append((function, args, kwargs, out))
        return out

    def get(self, function, x, *more):
        """A property."""
        name = function.__self__.__name__
        if name == "device" and self.is_on_gpu(x):
            return CUDA
        if name == "is_cuda":
            return self.is_on_gpu(x)
        out = function(x, *more)
        if name == "grad" and out is not None and self.is_on_gpu(x):
            self.put(out)
        return out

    def check(self, name, args, tensors, on_gpu):
        """Raise where CUDA would, and count what waits."""
        on_cpu = [x for x in tensors if x.dim() > 0 and not self.is_on_gpu(x)]
        if on_cpu and not self.in_backward:
            if name not in MIXED or name == "__getitem__" and not self.is_on_gpu(args[0]):
                raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU")
            if name in COPYING:
                self.wait(name)
        masks = name in ("__getitem__", "__setitem__") and tensors_in([args[1]])
        if masks and any(x.dtype == torch.bool for x in masks):
            self.wait("a boolean index")
        waits = name in WAITING or name == "repeat_interleave" and len(tensors) > 1
        if waits and not self.in_backward:
            self.wait(name)

    def transfer(self, name, x, *args, **kwargs):
        kwargs.pop("memory_format", None)
        non_blocking = kwargs.pop("non_blocking", False)
        device = CUDA if name == "cuda" else torch.device("cpu") if name == "cpu" else None
        rest = []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                device = CUDA if self.is_on_gpu(arg) else torch.device("cpu")
                rest.append(arg.dtype)
            elif is_device(arg):
                device = torch.device(arg)
            elif isinstance(arg, bool):
                non_blocking = arg
            elif arg is not None:
                rest.append(arg)
        if "device" in kwargs:
            device = torch.device(kwargs.pop("device"))
        before = self.is_on_gpu(x)
        after = before if device is None else device.type == "cuda"
        out = x.to(*rest, **kwargs) if rest or kwargs else x
        if before != after:
            pinned = x.untyped_storage()._cdata in self.pinned
            if not (after and pinned and non_blocking):
                self.wait(name)
            out = out.clone()
        if after:
            self.put(out)
            if self.graph is not None:
                operation = (torch.Tensor.to, (x, *rest), kwargs, out)
                self.graph.operations.append(operation)
        return out

    def backward(self, loss):
        self.in_backward = True
        try:
            with self:
                torch._C._ImperativeEngine().run_backward(
                    (loss,), (torch.ones(()),), False, False, (), accumulate_grad=True)
        finally:
            self.in_backward = False
