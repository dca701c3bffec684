"""Masks and indices that depend on sizes alone, kept between calls within a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

from zoo.kernels import dispatch

MAX_BYTES = 256 << 20

_kept: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
_lock = Lock()


def constant(make: Callable[..., Tensor], *args: object, like: Tensor) -> Tensor:
    """`make(*args, device=like.device)`, from the last calls where it can be; not to be written to.

    At most MAX_BYTES are kept, the longest unused going first. While a graph is traced, or torch's operations are
    watched otherwise, nothing is kept or taken: the graph is to hold the operations, and its fake tensors are of no use
    outside.

    Args:
        make: A function of hashable arguments and a device.
        args: Its arguments.
        like: A tensor on the device that the constant is for.
    """
    if only_traced(like):
        return make(*args, device=like.device)
    key = (make, args, like.device)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    # An inference tensor could not be saved for a backward pass later.
    with torch.inference_mode(False), torch.no_grad():
        value = make(*args, device=like.device)
    if value.nbytes > MAX_BYTES:
        return value
    with _lock:
        _kept[key] = value
        size = sum(x.nbytes for x in _kept.values())
        while size > MAX_BYTES:
            size -= _kept.popitem(last=False)[1].nbytes
    return value


def only_traced(tensor: Tensor) -> bool:
    """Whether operations on `tensor` are but traced or watched, so that there are no numbers to keep or to look at.

    By torch.compile, torch.jit.trace, torch.func, forward-mode differentiation, a mode such as FakeTensorMode.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return True
    return dispatch.transformed() or torch._C._len_torch_dispatch_stack() > 0
