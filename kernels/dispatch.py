"""The choice of an implementation, made at each call in plain Python that torch.compile can trace."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVarTuple, cast

import torch
from torch import Tensor

from zoo.kernels import checks

Tensors = TypeVarTuple("Tensors")  # each a Tensor or None

CHOICES = ("auto", "reference", "torch", "triton")


def _checked(choice: str, where: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"Got {where}={choice!r}; it has to be one of {', '.join(CHOICES)}.")
    return choice


_choice = _checked(os.environ.get("ZOO_KERNELS", "auto"), "ZOO_KERNELS")
_warned: set[str] = set()
_fused_allowed: Callable[[], bool] | None = None


def follow(allowed: Callable[[], bool]) -> None:
    """Make `allowed` decide whether fused attention may be used; `import zoo` passes timm's function."""
    global _fused_allowed
    _fused_allowed = allowed


def fused_allowed() -> bool:
    """Whether fused attention may be used: True unless the function passed to `follow` returns False."""
    return _fused_allowed is None or _fused_allowed()


def set_implementation(choice: str) -> None:
    """Choose the implementation of all operators, until the next call.

    The environment variable ZOO_KERNELS sets the choice at the start. It holds for the whole process, all threads
    included.

    Args:
        choice: "reference", the plain formula that defines the correct result; "torch", PyTorch that is fast on CPUs
            and runs anywhere; "triton", for GPUs; or "auto", Triton where it can run and PyTorch elsewhere. An operator
            without a Triton form runs PyTorch under "triton" too.

    Raises:
        ValueError: the choice is unknown.
    """
    global _choice
    _choice = _checked(choice, "choice")


@contextmanager
def implementation(choice: str) -> Iterator[None]:
    """Choose the implementation of all operators for a `with` block; the previous choice returns at its end.

    Args:
        choice: As for `set_implementation`.

    Raises:
        ValueError: the choice is unknown; raised when the block is entered.
    """
    before = _choice
    set_implementation(choice)
    try:
        yield
    finally:
        set_implementation(before)


class use:
    """The former name of `set_implementation` and `implementation`, to be removed in version 0.2.

    `use("torch")` holds until the next call, `with use("torch"):` until the end of the block.
    """

    def __init__(self, choice: str) -> None:
        self.before = _choice
        set_implementation(choice)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_: object) -> None:
        set_implementation(self.before)


def current() -> str:
    """The current choice, one of CHOICES."""
    return _choice


def choose(operator: str, tensor: Tensor, head_dim: int) -> str:
    """The implementation for one call of `operator` on `tensor`: "reference", "torch" or "triton".

    Args:
        operator: The operator's name, for messages.
        tensor: The operator's first input.
        head_dim: The number of channels per head.

    Raises:
        RuntimeError: the choice is "triton" and Triton cannot run.
    """
    if _choice in ("reference", "torch"):
        return _choice
    empty = checks.certain(checks.sizes(tensor)[0] == 0)  # a batch of no images launches nothing
    if _choice == "triton":
        reason = triton_obstacle(tensor) or _head_obstacle(head_dim)
        if reason is not None:
            raise RuntimeError(
                f"{operator} cannot run in Triton here: {reason}. Choose zoo.kernels.set_implementation('auto')."
            )
        return "torch" if empty else "triton"
    if tensor.device.type != "cuda" or not fused_allowed() or empty:
        return "torch"
    reason = triton_obstacle(tensor) or _head_obstacle(head_dim)
    if reason is None:
        return "triton"
    _warn_once(f"{operator} runs in PyTorch instead of Triton: {reason}.")
    return "torch"


def triton_obstacle(tensor: Tensor) -> str | None:
    """The reason why our Triton kernels cannot take `tensor`, or None if they can."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 and float32, not in {tensor.dtype}"
    if transformed():
        return "torch.func and forward-mode differentiation need operators that PyTorch can differentiate"
    if tensor.device.type != "cuda" and not interpreting():
        return f"the tensors are on {tensor.device}, and Triton needs a GPU (or TRITON_INTERPRET=1)"
    return _machine_obstacle(tensor.device.index or 0)


def _head_obstacle(head_dim: int) -> str | None:
    return f"it has tiles for heads of up to 128 channels, not {head_dim}" if head_dim > 128 else None


# Triton reads the variable once, at import, and so do we.
_interpreting = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return _interpreting


@torch.compiler.assume_constant_result
def _machine_obstacle(index: int) -> str | None:
    return _examined(index)


@cache
def _examined(index: int) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    # A machine without a GPU can still export programs for one, from fake tensors.
    if torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability(index) < (8, 0):
        return f"{torch.cuda.get_device_name(index)} has a compute capability below 8.0"
    return None


@torch.compiler.assume_constant_result
def transformed() -> bool:
    """Whether torch.func or forward-mode AD is active; the Triton operators have rules for neither."""
    level = torch.autograd.forward_ad._current_level
    return torch._C._functorch.peek_interpreter_stack() is not None or level >= 0


@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def autocast(*tensors: *Tensors) -> tuple[*Tensors]:
    """The tensors in autocast's dtype under torch.autocast, unchanged otherwise; float64 stays float64, as there."""
    device = next(x for x in tensors if isinstance(x, Tensor)).device.type
    if not _autocasting(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    converted = (
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )
    return cast("tuple[*Tensors]", tuple(converted))


def as_given(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without autocast, for an implementation, which chooses its own dtypes."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if _autocasting(device) else nullcontext()


def _autocasting(device: str) -> bool:
    # torch.is_autocast_enabled raises for a device without autocast, such as "meta".
    return _knows_autocast(device) and torch.is_autocast_enabled(device)


@torch.compiler.assume_constant_result  # Dynamo of torch 2.11 cannot trace it
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def triton_op(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """torch.library.triton_op if Triton is installed; else a decorator that does nothing, since torch would raise."""
    return torch.library.triton_op(name, mutates_args=()) if find_spec("triton") else lambda function: function


def register_autograd(operator: Any, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
    """torch.library.register_autograd if `triton_op` registered an operator."""
    if find_spec("triton"):
        operator.register_autograd(backward, setup_context=setup_context)


def again_differentiable(*tensors: Tensor | None) -> bool:
    """Whether the backward pass over `tensors` may have to be differentiable itself (create_graph=True).

    False under torch.jit.trace, which traces with and without gradients and compares the two.
    """
    if torch.jit.is_tracing():
        return False
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def compiled_for_cpu(tensor: Tensor) -> bool:
    """Whether torch.compile traces operations on `tensor`, on a CPU; False for programs to export."""
    return tensor.device.type == "cpu" and torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def composite_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of `function(*inputs)` by autograd, used for double backward."""
    with torch.enable_grad():
        out = function(*inputs)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
