"""A CUDA card that is not there: CPU tensors that say they are on one.

`CardTensor` sees every call of torch's Python API with such a tensor. It refuses what CUDA
refuses (tensors of two devices in one operation, a wait for the device while a graph is
recorded), counts the waits, computes on the CPU and labels the result. `Graph` records aten
operations with the very tensors that they had and replays those alone, so a Python value that
changes from step to step shows as a wrong token, as with a CUDA graph. `card_kernels.py` makes
the demands of torch's FlashAttention. What it cannot show: the kernels' numbers, real memory, time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM

from serve_app.engine.model import build
from serve_app.engine.model.attention import interface
from serve_app.engine.model.runner import Runner
from tests.engine.card_kernels import flash_attention, prefix_sum

CPU = torch.device("cpu")
GIB = 2**30
# Methods that hand values to Python.
READS = {"tolist", "item", "nonzero", "is_nonzero", "__bool__", "__int__", "__float__", "__index__"}
MOVES = {"to", "cuda", "cpu"}
# Computed otherwise than on a CPU.
KERNELS = {"_flash_attention_forward.default": flash_attention, "cumsum": prefix_sum}
# Calls of these may hold tensors of two devices.
CROSSING = {"copy_", "__getitem__", "__setitem__"}


class Card:
    """The driver's and the allocator's numbers of a card, in bytes, and what happens on it.

    Args:
        count: of equal cards.
    """

    def __init__(self, *, count: int = 1) -> None:
        self.count = count
        self.total = 80 * GIB
        self.others = 0  # held by other processes
        self.context = GIB // 2
        self.weights = 16 * GIB
        self.step = GIB  # the largest forward takes so much
        self.peak = self.weights
        self.waits: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.recording = False

    def wait(self, kind: str) -> None:
        """Count a wait of the host for the device, or a copy that is one."""
        self.waits[kind] += 1
        if self.recording:
            raise RuntimeError(f"operation not permitted when stream is capturing ({kind})")

    def memory(self, _device: Any = None) -> tuple[int, int]:
        """Return the free and all bytes."""
        return self.total - self.others - self.context - self.weights, self.total

    def reset_peak(self, _device: Any = None) -> None:
        """Forget the peak so far; the next forward takes `step`."""
        self.peak = self.weights + self.step


card = Card()  # the one in use


def device_of(value: Any) -> torch.device:
    """Return where a tensor says that it is."""
    return value.on if isinstance(value, CardTensor) else CPU


def label(value: Any, device: torch.device) -> Any:
    """Return the tensor in the same memory that says it is on a device; others as they are."""
    if not isinstance(value, torch.Tensor) or device == CPU:
        return value
    labelled = value.as_subclass(CardTensor)
    labelled.on = device
    return labelled


def plain(value: Any) -> Any:
    """Return the CPU's tensor behind a labelled one."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(torch.Tensor)


def named(device: Any) -> torch.device:
    """Return a device with its index."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


class CardTensor(torch.Tensor):
    """A CPU tensor that says it is on `on`."""

    on: torch.device

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Compute on the CPU what a card would compute."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name == "__get__" and func.__self__.__name__ in {"device", "is_cuda", "is_cpu"}:
            kind = func.__self__.__name__
            return args[0].on if kind == "device" else kind == "is_cuda"
        if name in MOVES:
            return move(name, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        target = device_of(args[0]) if name in CROSSING else _common(tensors, name)
        if name in CROSSING:
            _check_crossing(name, args)
        if name in READS:
            card.wait(name)
        if kwargs.get("device") is not None:
            target = named(kwargs["device"])
            kwargs["device"] = "cpu"
        if name in KERNELS:
            card.calls[name] += 1
            func, args, kwargs = KERNELS[name], *tree_map(plain, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        return tree_map(lambda value: label(value, target), out)


def _common(tensors: list[torch.Tensor], name: str) -> torch.device:
    """Return the device of an operation; numbers on the CPU go anywhere."""
    devices = {t.on for t in tensors if isinstance(t, CardTensor)}
    with torch._C.DisableTorchFunctionSubclass():
        if any(not isinstance(t, CardTensor) and t.dim() for t in tensors):
            devices.add(CPU)
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{found}! ({name})"
        )
    return devices.pop()


def _check_crossing(name: str, args: tuple[Any, ...]) -> None:
    """Count the copies that a copy or an index makes, and refuse an index from elsewhere."""
    device = device_of(args[0])
    if name != "__getitem__" and isinstance(args[-1], torch.Tensor):
        source = device_of(args[-1])
        if source != device and args[-1].dim():
            card.wait(f"copy {source.type} to {device.type}")
    if name == "copy_":
        return
    parts = args[1] if isinstance(args[1], tuple) else (args[1],)
    for part in parts:
        if isinstance(part, list):
            card.wait("index from a list")
        elif isinstance(part, torch.Tensor) and device_of(part) != device:
            if device_of(part) != CPU:
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    f"({device})"
                )
            card.wait("index from the host")


def move(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stand in for `Tensor.to`, `cuda` and `cpu`."""
    tensor, *rest = args
    copy = kwargs.pop("copy", False)
    device, dtype = (CPU if name == "cpu" else torch.device("cuda")), None
    if name == "to" and rest and isinstance(rest[0], torch.Tensor):
        device, dtype = device_of(rest[0]), rest[0].dtype
    elif name == "to":
        rest = [named(each) if isinstance(each, int) else each for each in rest]
        device, dtype, *_ = torch._C._nn._parse_to(*rest, **kwargs)
    source = device_of(tensor)
    target = source if device is None else named(device)
    if target != source:
        card.wait(f"copy {source.type} to {target.type}")
    with torch._C.DisableTorchFunctionSubclass():
        copy |= target != source
        out = torch.Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copy)
    return out if out is tensor else label(plain(out), target)


class Factories(TorchFunctionMode):
    """Makes tensors on the card: `torch.zeros(..., device="cuda")`, `host.to("cuda")`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Label what is made on a card."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        on_card = any(isinstance(t, CardTensor) for t in tree_leaves((args, kwargs)))
        if name in MOVES and not on_card and _names_a_card(*args[1:], *kwargs.values()):
            return move(name, args, kwargs)
        if not on_card and _names_a_card(kwargs.get("device")):
            device = named(kwargs.pop("device"))
            if name in {"tensor", "as_tensor"}:
                card.wait("tensor from the host")
            return label(func(*args, **kwargs), device)
        return func(*args, **kwargs)


def _names_a_card(*values: Any) -> bool:
    return any(
        named(value).type == "cuda"
        for value in values
        if isinstance(value, str | torch.device) or (type(value) is int)
    )


class Tape(TorchDispatchMode):
    """Records aten operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Compute and remember."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    made: ClassVar[int] = 0

    def __init__(self) -> None:
        self.tape = Tape()

    def replay(self) -> None:
        """Run the recorded operations again, and nothing of the Python around them."""
        card.calls["replay"] += 1
        with torch._C.DisableTorchFunction():
            for func, args, kwargs, out in self.tape.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextmanager
def record(graph: Graph, **_: Any) -> Iterator[None]:
    """Stand in for `torch.cuda.graph`."""
    Graph.made += 1
    card.recording = True
    try:
        with graph.tape:
            yield
    finally:
        card.recording = False


def put(module: torch.nn.Module, device: torch.device) -> None:
    """Label a module's tensors; those that are shared stay so."""
    labelled: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    found = labelled.setdefault(id(tensor), label(tensor.detach(), device))
                    found._is_param = isinstance(tensor, torch.nn.Parameter)
                    store[name] = found


def _from_pretrained(*args: Any, device_map: Any = None, **kwargs: Any) -> Any:
    model, report = _load(*args, **kwargs)
    if device_map == "auto":  # by accelerate's own rules and hooks, as transformers does it
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        room = {**dict.fromkeys(range(card.count - 1), size // card.count), card.count - 1: size}
        split = infer_auto_device_map(
            model, max_memory=room, no_split_module_classes=model._no_split_modules
        )
        dispatch_model(model, {name: named(index) for name, index in split.items()})
    elif device_map is not None:
        put(model, named(device_map))
    return model, report


_load = AutoModelForCausalLM.from_pretrained
_enter_thread = Runner.enter_thread


def _entered(runner: Runner) -> None:
    _enter_thread(runner)
    Factories().__enter__()  # modes belong to a thread; this one ends with its engine


@contextmanager
def inserted(**settings: Any) -> Iterator[Card]:
    """Put a card into this machine; `settings` are `Card`'s."""
    global card  # noqa: PLW0603 (torch calls `CardTensor` from everywhere)
    card = Card(**settings)
    torch_cuda = {
        "is_available": lambda: True,
        "device_count": lambda: card.count,
        "get_device_capability": lambda _device=None: (9, 0),
        "mem_get_info": card.memory,
        "memory_allocated": lambda _device=None: card.weights,
        "memory_reserved": lambda _device=None: card.weights,
        "max_memory_allocated": lambda _device=None: card.peak,
        "reset_peak_memory_stats": card.reset_peak,
        "empty_cache": lambda: None,
        "synchronize": lambda _device=None: card.wait("synchronize"),
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": Graph,
        "graph": record,
        "current_stream": lambda _device=None: "default",
        "set_stream": lambda _stream: None,
    }
    with ExitStack() as stack:
        for name, value in torch_cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for owner, name, value in (
            (AutoModelForCausalLM, "from_pretrained", _from_pretrained),
            (Runner, "enter_thread", _entered),
            # In float32 too, so that tokens can be compared; the kernel has no softcap.
            (torch.backends.cuda, "is_flash_attention_available", lambda: True),
            (build, "compiled_by_torch", None),  # there is nothing to compile for
            (interface, "supports", lambda shapes: not any(s.softcap for s in shapes)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(Factories())
        yield card
