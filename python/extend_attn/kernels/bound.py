"""Bound launches: a kernel that ran once is launched again without Triton's dispatch.

Triton's ``function.run`` binds some fifty arguments, derives what the kernel is specialised for and looks up the
compiled kernel, which takes longer than the launch. What it finds, a *handle*, is right for one specialisation only, so
``_key`` holds all that Triton specialises for, each fact at least as finely as Triton takes it: types of arguments,
alignment of pointers, specialised integers by value, other integers by width, compile-time constants, options.

A ``Bound`` is all launches of one recipe with everything filled in but addresses. It serves calls whose facts are those
of the call that it was made from; calls.py recognises them. Where there is none (the interpreter, a launcher that is
not known, a kernel that did not run yet, hooks that want to see launches), Triton's own dispatch runs.
"""

from __future__ import annotations

import functools
from operator import itemgetter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from ..inputs import ALIGNMENT, Inputs
from .compat import INTERPRETED
from .launchers import Handle, handle_of, hooked
from .recipe import NUM_TENSORS, Kernel, Recipe
from .workspace import Workspace, addresses_of, workspaces

# A launch picks its arguments from the call's addresses as calls.py makes them (of the tensors of Inputs, in their
# order, then the rows of k_new and v_new, then None), those of workspaces, and what descriptors come apart into.
_SLOTS = {name: i for i, name in enumerate(Inputs._fields[:NUM_TENSORS])}
_ROWS = {"k_new": NUM_TENSORS, "v_new": NUM_TENSORS + 1}
_NONE = NUM_TENSORS + 2
# Tensors whose alignment calls.py tells apart; no other may be specialised by it.
_ALIGNED = ("q", "k_new", "v_new", "o", "k_pool", "v_pool")
_DESCRIBED = ("q", "k_new", "v_new", "k_pool", "o")
_UNBOUNDED = 1 << 30  # a descriptor's dim of this size has nothing to do with a tensor's rows
MAX_HANDLES = 4096  # past this what is known is dropped and found anew
MAX_DESCRIBED = 256  # addresses and rows that a descriptor is kept for; an allocator hands the same few out again

_handles: Dict[tuple, Optional[Handle]] = {}

# private to torch, but what Triton's own driver asks; a build without CUDA has neither
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


class Unbindable(Exception):
    """A launch that can't be repeated from addresses; the text says why."""


class _Launch(NamedTuple):
    launch: Callable[..., None]
    grid: Tuple[int, int, int]
    head: tuple
    pick: Callable[[tuple], tuple]
    numbers: tuple
    one_tuple: bool


class Bound:
    """The launches of a recipe for calls of one kind on one device. Ask ``ready`` before each ``launch``."""

    __slots__ = ("_descriptors", "_device", "_hooks", "_launches", "_others", "_token", "_workspaces", "needs_rows")

    def __init__(
        self,
        device: torch.device,
        launches: Sequence[_Launch],
        workspaces: Sequence[Workspace],
        descriptors: Sequence[_Descriptor],
        hooks: Sequence[list],
    ) -> None:
        self._device, self._launches, self._hooks = device, launches, hooks
        self._workspaces, self._descriptors = workspaces, descriptors
        self.needs_rows = any(one.rows is not None for one in descriptors)
        self._token = object()
        self._others = torch.cuda.device_count() > 1

    def ready(self) -> bool:
        """Whether the kernels' device is the current one and nobody wants to see the launches."""
        if self._others and _current_device() != self._device.index:
            return False
        return not hooked() and not any(self._hooks)

    def launch(self, addresses: tuple) -> None:
        """Enqueues the kernels on the current stream."""
        stream = _current_stream(self._device.index)
        values = addresses
        if self._workspaces:
            values += addresses_of(self._workspaces, self._device, stream, self._token)
        for descriptor in self._descriptors:
            values += descriptor.pieces(values)
        for launch, grid, head, pick, numbers, one_tuple in self._launches:
            if one_tuple:
                launch(*grid, stream, *head, (*pick(values), *numbers))
            else:
                launch(*grid, stream, *head, *pick(values), *numbers)


def remember(kernel: Kernel, arguments: Sequence[Any], compiled: Any, device: torch.device) -> None:
    """Keeps what ``kernel.function.run`` returned for launches of the same specialisation."""
    if INTERPRETED or device.type != "cuda":
        return
    try:
        key = _key(kernel, arguments, device.index)
    except Unbindable:
        return
    if len(_handles) >= MAX_HANDLES:
        _handles.clear()
    _handles[key] = handle_of(compiled)


def bind(recipe: Recipe, inputs: Inputs) -> Union[Bound, None, bool]:
    """The recipe bound for calls like this one; None as long as one of its kernels has not run, False if never."""
    device = inputs.q.device
    if INTERPRETED or device.type != "cuda":
        return False
    own = workspaces(recipe.workspaces, device)
    launches: List[_Launch] = []
    descriptors: List[_Descriptor] = []
    first_piece = _NONE + 1 + len(own)
    try:
        for kernel, tensors in zip(recipe.kernels, recipe.tensors(inputs, *own)):
            key = _key(kernel, [*tensors, *kernel.numbers], device.index)
            if key not in _handles:
                return None
            handle = _handles[key]
            if handle is None:
                return False
            slots: List[int] = []
            described = 0
            for name, argument in zip(kernel.function.arg_names, tensors):
                if _is_descriptor(argument):
                    if handle.apart is None:
                        raise Unbindable(f"{name}: a descriptor that only Triton's own dispatch takes apart")
                    one = _Descriptor(argument, inputs, own, functools.partial(handle.apart, described))
                    descriptors.append(one)
                    described += 1
                    pieces = len(one.apart(argument))
                    slots.extend(range(first_piece, first_piece + pieces))
                    first_piece += pieces
                else:
                    slots.append(_slot(name, argument, inputs, own))
            numbers = (*kernel.numbers, *kernel.values) if handle.with_constants else kernel.numbers
            grid = (*kernel.grid, 1, 1)[:3]
            launches.append(_Launch(handle.launch, grid, handle.head, itemgetter(*slots), numbers, handle.one_tuple))
    except Unbindable:
        return False
    hooks = [kernel.function.pre_run_hooks for kernel in recipe.kernels]
    return Bound(device, launches, recipe.workspaces, descriptors, hooks)


def _slot(name: str, argument: Any, inputs: Inputs, own: Sequence[torch.Tensor]) -> int:
    """Where a launch finds the argument of this name: kernels call a tensor what Inputs calls it."""
    if argument is None:
        return _NONE
    for i, tensor in enumerate(own):
        if argument is tensor:
            return _NONE + 1 + i
    slot = _SLOTS.get(name)
    if slot is None or inputs[slot] is None or inputs[slot].data_ptr() != argument.data_ptr():
        raise Unbindable(f"{name}: is no tensor of the call and no workspace of the recipe")
    return slot


def _is_descriptor(argument: Any) -> bool:
    return hasattr(argument, "block_shape")


class _Address:
    """What a descriptor asks of its tensor."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Descriptor:
    """What a kernel is passed for a descriptor of another call's tensor or workspace, made from one that passed its
    constructor's checks. ``rows``: where a call's rows are, if the first dim is its tensor's rows; the query's are the
    same in all calls of a Prepared, those of other tensors need not be. ``apart`` (launchers.py) encodes a descriptor;
    that takes as long as a launch, so that the pieces are kept by address."""

    __slots__ = ("apart", "rows", "_fields", "_kept", "_kind", "_shape", "_slot")

    def __init__(
        self, like: Any, inputs: Inputs, own: Sequence[torch.Tensor], apart: Callable[[Any], Sequence[Any]]
    ) -> None:
        name = next((name for name in _DESCRIBED if like.base is getattr(inputs, name)), None)
        memory = [i for i, tensor in enumerate(own) if like.base.data_ptr() == tensor.data_ptr()]
        if not (name or memory) or not hasattr(like, "__dict__"):
            raise Unbindable(f"a descriptor of {type(like.base).__name__}: of no tensor of the call and no workspace")
        self.apart, self._kind, self._fields, self._shape = apart, type(like), dict(like.__dict__), list(like.shape)
        self._slot = _SLOTS[name] if name else _NONE + 1 + memory[0]
        self.rows = _ROWS[name] if name in _ROWS and self._shape[0] == like.base.shape[0] else None
        self._kept: Dict[Any, tuple] = {}
        inner = {*like.base.shape} if name == "q" else {*like.base.shape[1:]}
        if any(n not in inner and n < _UNBOUNDED for n in self._shape[1 if self.rows else 0 :]):
            raise Unbindable(f"a descriptor of {name} with dims {self._shape}: they may depend on its rows")

    def pieces(self, addresses: tuple) -> tuple:
        """The kernel's arguments for a call with these addresses."""
        key = address = addresses[self._slot]
        if self.rows is not None:
            key = (address, addresses[self.rows])
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= MAX_DESCRIBED:
                self._kept.clear()
            found = self._kept[key] = tuple(self.apart(self.like(addresses)))
        return found

    def like(self, addresses: tuple) -> Any:
        """The descriptor itself."""
        new = object.__new__(self._kind)
        new.__dict__.update(self._fields, base=_Address(addresses[self._slot]))
        if self.rows is not None:
            new.__dict__["shape"] = [addresses[self.rows], *self._shape[1:]]
        return new


def _key(kernel: Kernel, arguments: Sequence[Any], device: int) -> tuple:
    """What a compiled kernel is right for."""
    facts = [_fact(parameter, argument) for parameter, argument in zip(kernel.function.params, arguments)]
    kinds = tuple(map(type, kernel.values))  # 1 == True
    key = (device, kernel.function, *facts, kinds, kernel.values, tuple(kernel.options.items()))
    try:
        hash(key)
    except TypeError:
        raise Unbindable("an argument can't be hashed") from None
    return key


def _fact(parameter: Any, argument: Any) -> Any:
    """What Triton may specialise a kernel by in one argument."""
    if argument is None:
        return None
    if isinstance(argument, torch.Tensor):
        if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
            return argument.dtype
        if parameter.name in _SLOTS and parameter.name not in _ALIGNED:
            raise Unbindable(f"{parameter.name}: the kernel is specialised by an alignment that no signature holds")
        return argument.dtype, argument.data_ptr() % ALIGNMENT == 0
    if _is_descriptor(argument):
        return type(argument), argument.base.dtype, tuple(argument.block_shape), getattr(argument, "layout", None)
    if isinstance(argument, int) and not isinstance(argument, bool):
        if not parameter.do_not_specialize:
            return argument
        return "i32" if -(2**31) <= argument < 2**31 else argument
    return type(argument)
