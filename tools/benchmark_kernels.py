"""What `zoo-bench kernels` measures: errors against float64, then time and memory."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo import kernels
from zoo.kernels import dispatch
from zoo.kernels.peers import Arguments, CannotRunError, Contender
from zoo.tools import benchmark_timing as timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The largest relative root mean square error against float64 of a correct contender. Rounding stays far below it, and a
# wrong border or a missing bias far above.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CHECKED_IMAGES = 2
KINDS = ("forward", "backward", "forward and backward")
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Operator:
    """A public function of zoo.kernels, its cases, and the ways to compute it."""

    function: Callable[..., Tensor]
    cases: dict[str, Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]]
    peers: tuple[Contender, ...]
    flops: Callable[[Arguments], int]  # per element of the output, forward
    backward_flops: float  # those of the backward pass, in units of the forward pass

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """Our implementations, followed by the others."""
        folder = self.function.__module__.rpartition(".")[0]
        names = ("triton", "torch", "reference") if find_spec(f"{folder}.triton_impl") else ("torch", "reference")
        return *(Contender(name, partial(call_ours, self.function, name)) for name in names), *self.peers


def call_ours(function: Callable[..., Tensor], choice: str, **arguments: Any) -> Tensor:
    """Call the public function with one implementation."""
    if choice == "triton":
        first = next(value for value in arguments.values() if isinstance(value, Tensor))
        if (obstacle := dispatch.triton_obstacle(first)) is not None:
            raise CannotRunError(obstacle)
    with kernels.implementation(choice):
        return function(**arguments)


def _operator(name: str) -> Operator:
    """The operator that a folder of zoo.kernels describes."""
    cases, peers = (import_module(f"zoo.kernels.{name}.{part}") for part in ("cases", "peers"))
    shapes = {name: partial(cases.inputs, case) for name, case in (cases.TARGETS | cases.CASES).items()}
    return Operator(cases.FUNCTION, shapes, peers.PEERS, peers.flops, peers.BACKWARD_FLOPS)


# By the first word of their names.
OPERATORS = {name.partition("_")[0]: _operator(name) for name in kernels.OPERATORS}


@dataclass
class Row(timing.Row):
    """The results of one contender, with its error against float64."""

    error: float | None = None


@dataclass
class Result:
    """The results of one case with one dtype and one kind of pass."""

    operator: str
    case: str
    dtype: str
    kind: str  # "forward", "backward" or "forward and backward"
    batch: int
    min_bytes: int
    flops: int
    ours: str | None
    rows: list[Row]


# The compiler must keep what a backward pass needs, since `measure` runs it again.
@torch._functorch.config.patch(donated_buffer=False)
def measure(
    name: str,
    case: str,
    *,
    batch: int,
    dtype: str,
    device: str,
    backward: bool,
    seconds: float,
    leave_out: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Check every contender of a case against float64, then time the correct ones in turns.

    Returns:
        The forward pass or, with `backward`, the backward pass and both passes together; each is timed for `seconds`.
    """
    operator = OPERATORS[name]
    torch.compiler.reset()  # else torch stops compiling a function after many sizes
    make = partial(_arguments, operator, case, dtype=DTYPES[dtype])
    arguments = make(batch=batch, device=device, requires_grad=backward)
    per_image = _that_differ(make(batch=1, device="meta"), make(batch=2, device="meta"))
    want = _Wanted(operator.function, arguments, per_image, backward)

    rows: list[Row] = []
    right: list[Contender] = []
    for contender in operator.contenders:
        if contender.name in leave_out or (contender.only_backward and not backward):
            continue
        say(f"checking {contender.name}")
        row = Row(contender.name)
        rows.append(row)
        try:
            row.error = want.error(contender)
        except CannotRunError as reason:
            row.status, row.reason = "not run", str(reason)
        except Exception as fault:  # the other contenders still run
            row.failed(fault)
        else:
            allowed = TOLERANCE[DTYPES[dtype]]
            if row.error <= allowed:
                right.append(contender)
            else:
                row.status = "wrong"
                row.reason = f"relative error {row.error:.1e} against float64, {allowed:.0e} allowed"
        timing.release(device)

    ours = next((name for name in ("triton", "torch") if name in {contender.name for contender in right}), None)
    results = []
    for kind in KINDS[1:] if backward else KINDS[:1]:
        say(f"timing {kind}")
        timed = [replace(row) for row in rows]
        runs = {contender.name: want.run(contender, kind) for contender in right}
        times = timing.alternately(runs, device, seconds, MIN_ROUNDS) if runs else {}
        for row in timed:
            if row.name in runs:
                row.times = times[row.name]
                row.ratios = [a / b for a, b in zip(row.times, times[ours], strict=True)] if ours else []
                row.peak_bytes = timing.peak_bytes(runs[row.name], device)
        del runs
        timing.release(device)
        shares = {"forward": 1.0, "backward": operator.backward_flops}
        results.append(
            Result(
                operator=name,
                case=case,
                dtype=dtype,
                kind=kind,
                batch=batch,
                min_bytes=_min_bytes(arguments, want.output, kind),
                flops=int(
                    want.output.numel() * operator.flops(arguments) * sum(shares[x] for x in kind.split(" and "))
                ),
                ours=ours,
                rows=timed,
            )
        )
    return results


def least_bytes(name: str, case: str, batch: int, dtype: str, kind: str) -> int:
    """The fewest bytes that a pass of a case has to read and write, without running it."""
    with FakeTensorMode():
        arguments = _arguments(
            OPERATORS[name], case, batch=batch, dtype=DTYPES[dtype], device="cpu", requires_grad=kind != "forward"
        )
    return _min_bytes(arguments, _output_shape(OPERATORS[name].function, arguments), kind)


def _output_shape(function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
    """The output without contents, on device "meta", where no reference loops over tokens."""
    shapes = {
        name: torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }
    with torch.no_grad():
        return call_ours(function, "reference", **shapes)


def _arguments(operator: Operator, case: str, **options: Any) -> Arguments:
    """All arguments of the public function, by name."""
    args, kwargs = operator.cases[case](**options)
    bound = inspect.signature(operator.function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _that_differ(some: Arguments, others: Arguments) -> set[str]:
    """The tensors whose shapes differ between `some` and `others`, such as images if the batch size differs."""
    return {name for name, x in some.items() if isinstance(x, Tensor) and x.shape != others[name].shape}


class _Wanted:
    """The correct results for the last images, in float64, and runs to compare with them.

    A checked run has its full size, but the gradient of its output is zero except for the last images. Gradients that
    are summed over images, such as those of weights and bias tables, can then be compared as well.
    """

    def __init__(
        self, function: Callable[..., Tensor], arguments: Arguments, per_image: set[str], backward: bool
    ) -> None:
        self.arguments, self.per_image, self.backward = arguments, per_image, backward
        images = next(value for name, value in arguments.items() if name in per_image).shape[0]
        self.last = slice(max(0, images - CHECKED_IMAGES), None)
        self.output = _output_shape(function, arguments)
        self.function = function
        like = next(value for value in arguments.values() if isinstance(value, Tensor))
        generator = torch.Generator(like.device).manual_seed(1)
        self.grad = None
        if backward:
            size = self.output.shape
            self.grad = torch.randn(size, generator=generator, device=like.device, dtype=torch.float32).to(like.dtype)
        self._known: dict[bool, list[Tensor]] = {}

    def error(self, contender: Contender) -> float:
        """The largest relative root mean square error of output and gradients."""
        grad = None
        if self.grad is not None:
            grad = torch.zeros_like(self.grad)
            grad[self.last] = self.grad[self.last]
        arguments, names = _prepared(contender, self.arguments, grad)
        got = [out.detach() for out in _call(contender.compute, arguments, names)]
        want = self._reference(arguments, grad)
        errors = []
        for name, have in zip(("out", *names), got, strict=True):
            part = have[self.last] if name in ("out", *self.per_image) else have
            errors.append(_relative_error(part, want[name]))
        return max(errors)

    def run(self, contender: Contender, kind: str) -> Callable[[], object]:
        """The call that is timed; the backward pass alone repeats that of a single forward pass."""
        arguments, names = _prepared(contender, self.arguments, self.grad)
        if kind != "backward":
            return partial(_call, contender.compute, arguments, names)
        grad = arguments.pop("grad")
        out = contender.compute(**arguments)
        return partial(torch.autograd.grad, out, [arguments[name] for name in names], grad, retain_graph=True)

    def _reference(self, arguments: Arguments, grad: Tensor | None) -> dict[str, Tensor]:
        with_bias = arguments.get("bias_table") is not None
        if with_bias not in self._known:
            exact: Arguments = {}
            for name, value in self.arguments.items():
                value = None if arguments[name] is None else value
                if isinstance(value, Tensor):
                    value = value[self.last] if name in self.per_image else value
                    wants_grad = value.requires_grad
                    value = value.detach().double() if value.is_floating_point() else value
                    value = value.requires_grad_(wants_grad)
                exact[name] = value
            if grad is not None:
                exact["grad"] = self.grad[self.last].double()
            names = _differentiable(exact)
            results = _call(partial(call_ours, self.function, "reference"), exact, names)
            self._known[with_bias] = dict(zip(("out", *names), (x.detach() for x in results), strict=True))
        return self._known[with_bias]


def _prepared(contender: Contender, arguments: Arguments, grad: Tensor | None) -> tuple[Arguments, list[str]]:
    given = arguments if grad is None else {**arguments, "grad": grad}
    prepared = {name: contender.prepare(name, value) for name, value in given.items()}
    return prepared, _differentiable(prepared)


def _differentiable(arguments: Arguments) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad]


def _call(compute: Callable[..., Tensor], arguments: Arguments, names: list[str]) -> tuple[Tensor, ...]:
    """The output and, if the arguments have `grad`, the gradients of the arguments `names`."""
    arguments = dict(arguments)
    grad = arguments.pop("grad", None)
    if grad is None:
        with torch.no_grad():
            return (compute(**arguments),)
    out = compute(**arguments)
    return out, *torch.autograd.grad(out, [arguments[name] for name in names], grad)


def _relative_error(got: Tensor, want: Tensor) -> float:
    difference = (got.double() - want).square().mean() / want.square().mean().clamp(min=1e-30)
    error = difference.sqrt().item()
    return float("inf") if math.isnan(error) else error


def _min_bytes(arguments: Arguments, out: Tensor, kind: str) -> int:
    """The fewest bytes to read and write: each input and output once a pass, and the gradients in the backward one."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    forward = sum(x.nbytes for x in tensors) + out.nbytes
    backward = forward + out.nbytes + sum(x.nbytes for x in tensors if x.requires_grad)
    return {"forward": forward, "backward": backward, "forward and backward": forward + backward}[kind]
