"""A cache, bounded in bytes, of masks and indices that depend on sizes alone."""

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
    """`make(*args, device=like.device)`, from the cache if possible. Do not write to it.

    The cache holds at most MAX_BYTES and drops the least recently used tensor first. It is bypassed while torch traces
    or intercepts operations: the graph has to contain them, and its fake tensors are of no use outside.

    Args:
        make: A function of hashable arguments and a device.
        args: The arguments of `make`.
        like: A tensor on the device of the constant.
    """
    if only_traced(like):
        return make(*args, device=like.device)
    key = (make, args, like.device)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    # An inference tensor could not be saved for a later backward pass.
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
    """Whether operations on `tensor` are traced or intercepted, so that there are no values to keep or to inspect.

    This is the case under torch.compile, torch.jit.trace, torch.func, forward-mode AD and modes such as FakeTensorMode.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return True
    return dispatch.transformed() or torch._C._len_torch_dispatch_stack() > 0
