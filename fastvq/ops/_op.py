"""One declaration an op.

To declare an op, write its arguments as a NamedTuple, in the order of its schema, and hand them to ``Op``::

    class NearestCall(NamedTuple):
        x: Tensor
        codebook: Tensor
        metric: str
        backend: str | None


    NEAREST = Op(
        "nearest",
        NearestCall,
        {
            "cpu": Kernel(cpu.nearest),
            "cuda": Kernel(cuda.nearest, golden=(known_results(calls.nearest),)),
            "reference": Kernel(without_backend(reference.nearest)),
        },
        check=lambda call: check_lookup("fastvq.ops.nearest", call.x, call.codebook),
        fake=lambda call: call.x.new_empty(call.x.shape[:-1], dtype=torch.int64),
    )
    nearest_op = register(NEAREST)

``register`` makes the schema of the annotations and the defaults, and returns the op as public functions call it. At
every call the op checks its arguments, chooses a backend and hands the NamedTuple to that backend's ``run``. ``check``,
``fake``, ``why_unsupported`` and ``setup_context`` take the same NamedTuple.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fastvq.backends import registry
from fastvq.backends.golden import gate
from fastvq.ops import _library

__all__ = [
    "CUDA_FIRST",
    "OPS",
    "ORDER",
    "Autograd",
    "Golden",
    "Kernel",
    "Op",
    "known_results",
    "register",
    "rests_on",
    "without_backend",
]


ORDER = tuple(registry.BACKENDS)
CUDA_FIRST = ("cpu", "cuda", "triton", "reference")  # for calls that CUDA C++ serves faster than Triton


OPS: dict[str, Op[Any]] = {}  # those registered with torch, by name


class Call(Protocol):
    """The arguments of a call: a NamedTuple with the backend that the call names, if any."""

    @property
    def backend(self) -> str | None: ...


C = TypeVar("C", bound=Call)
# Of an op, a backend and a call: why the backend gives wrong results, or None.
Golden = Callable[["Op[Any]", str, Any], "str | None"]


@dataclass(frozen=True)
class Kernel(Generic[C]):
    """How one backend serves an op."""

    run: Callable[[C], Any]
    # Why the backend cannot serve the call, for reasons other than its device, or None. Asked at every call: cheap.
    why_unsupported: Callable[[C], str | None] | None = None
    # Each runs calls with known results before a kind of GPU is trusted; see backends/golden/gate.py.
    golden: tuple[Golden, ...] = ()


@dataclass(frozen=True)
class Autograd(Generic[C]):
    """The gradient of an op: the formulas of ``torch.library.register_autograd``, and those of its transforms."""

    backward: Callable[..., Any]
    jvp: Callable[..., Any]
    setup_context: Callable[[Any, C, Any], None] = lambda ctx, call, output: None
    fold: Callable[..., Any] | None = None  # for vmap; see ``_transforms.transformable``


@dataclass(eq=False)
class Op(Generic[C]):
    """The declaration of ``torch.ops.fastvq.<name>``."""

    name: str
    call: Callable[..., C]  # the NamedTuple
    kernels: dict[str, Kernel[C]]  # by backend
    check: Callable[[C], None]  # raises where kernels could not rely on the arguments: graphs call the op directly
    fake: Callable[[C], Any] | None = None  # the outputs as empty tensors; None: the op is not registered with torch
    returns: str = "Tensor"  # as the schema says it
    writes: tuple[str, ...] = ()  # arguments that are written to
    # Backends, the fastest first; a function where that depends on the call. Give the measurement of another order.
    order: Sequence[str] | Callable[[C], Sequence[str]] = ORDER
    autograd: Autograd[C] | None = None
    public_name: str = ""  # the function that error messages name; ``fastvq.ops.<name>`` unless given
    device: Callable[[C], torch.device] = field(init=False, repr=False)  # of the first tensor of a call

    def __post_init__(self) -> None:
        self.public_name = self.public_name or f"fastvq.ops.{self.name}"
        types = {name: _schema_type(hint) for name, hint in typing.get_type_hints(self.call).items()}
        first = next(name for name, kind in types.items() if kind in ("Tensor", "Tensor[]"))
        is_list, tensors = types[first] == "Tensor[]", attrgetter(first)
        self._first = f"{first}[0]" if is_list else first
        self.device = (lambda call: tensors(call)[0].device) if is_list else attrgetter(f"{first}.device")

    def schema(self) -> str:
        marks = {name: f"({chr(ord('a') + i)}!)" for i, name in enumerate(self.writes)}
        defaults = self.call._field_defaults  # type: ignore[attr-defined]
        arguments = [
            f"{_schema_type(hint, marks.get(name, ''))} {name}" + (f"={defaults[name]}" if name in defaults else "")
            for name, hint in typing.get_type_hints(self.call).items()
        ]
        return f"{self.name}({', '.join(arguments)}) -> {self.returns}"

    def choose(self, call: C) -> str:
        """The backend that serves ``call``.

        The one that the call names, else ``use_backend``, else ``FASTVQ_BACKEND``, is taken or raises; with none of
        them, the first of ``order`` that supports the call. The first call that the reference serves because no
        kernels run on its device gives a warning.

        Raises:
            ValueError: the named backend cannot serve the call, or none can; every refusal is listed.
        """
        named = registry.named_backend(self.public_name, call.backend)
        order = (named,) if named else self.order(call) if callable(self.order) else self.order
        refusals = []
        for name in order:
            reason = self.why_unsupported(name, call)
            if reason is None:
                if name == "reference" and not named:
                    registry.warn_of_reference(self.public_name, self.device(call))
                return name
            refusals.append(f"{name}: {reason}")
        remedy = "; pass backend=None to let fastvq choose" if named else ""
        raise ValueError(f"{self.public_name}: no backend can serve this call ({'; '.join(refusals)}){remedy}")

    def why_unsupported(self, name: str, call: C) -> str | None:
        """Why the backend ``name`` cannot serve ``call``, or None."""
        kernel = self.kernels.get(name)
        if kernel is None:
            return "it does not have this operation"
        device = self.device(call)
        if (reason := registry.why_unsupported_on(name, device)) is not None:
            # A reason that says what the backend takes is followed by what came.
            return f"{reason}, {self._first} is on {device}" if reason.endswith(" tensors") else reason
        if kernel.why_unsupported is not None and (reason := kernel.why_unsupported(call)) is not None:
            return reason
        for golden in kernel.golden:
            if (reason := golden(self, name, call)) is not None:
                return reason
        return None

    def run(self, call: C) -> Any:
        """Checks the arguments, chooses a backend and runs it."""
        self.check(call)
        name = self.choose(call)
        if name == "reference":
            with registry.outside_autocast():
                return self.kernels[name].run(call)
        return self.kernels[name].run(call)


def register(op: Op[C]) -> Callable[..., Any]:
    """Registers ``op`` with torch. Returns it as the public functions call it."""
    make, run, fake, autograd = op.call, op.run, op.fake, op.autograd
    assert fake is not None, f"{op.name} declares no fake"
    OPS[op.name] = op
    formulas: tuple[Callable[..., Any] | None, ...] = ()
    if autograd is not None:
        setup = autograd.setup_context
        formulas = (
            autograd.backward,
            lambda ctx, inputs, output: setup(ctx, make(*inputs), output),
            autograd.jvp,
            autograd.fold,
        )
    return _library.register(op.schema(), lambda *args: run(make(*args)), lambda *args: fake(make(*args)), *formulas)


def known_results(calls: Callable[[], Iterator[tuple[Any, ...]]]) -> Golden:
    """The golden set of an op whose kernels must return, and write, what the reference does, to the bit.

    calls: yields the arguments of a few calls, tensors on the CPU, and None for the backend.
    """

    def golden(op: Op[Any], backend: str, call: Any) -> str | None:
        def outcome(name: str) -> Callable[..., tuple[Tensor, ...]]:
            def run(*arguments: Any) -> tuple[Tensor, ...]:
                given = op.call(*arguments)
                given = given._replace(**{w: getattr(given, w).clone() for w in op.writes})
                result = op.kernels[name].run(given)
                outputs = (result,) if isinstance(result, Tensor) else result or ()
                return *(getattr(given, w) for w in op.writes), *outputs

            return run

        device = next(t for t in call if isinstance(t, Tensor)).device
        return gate.check_op(backend, op.name, device, outcome(backend), outcome("reference"), calls)

    return golden


def rests_on(other: Op[Any]) -> Golden:
    """The golden sets of another op, for an op whose kernels launch those of the other."""

    def golden(op: Op[Any], backend: str, call: Any) -> str | None:
        reasons = (check(other, backend, call) for check in other.kernels[backend].golden)
        return next((reason for reason in reasons if reason is not None), None)

    return golden


def without_backend(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """``run`` by a function that takes the arguments of a call one by one, but for the backend, which is the last."""
    return lambda call: function(*call[:-1])


def _schema_type(hint: Any, mark: str = "") -> str:
    """An annotation as a schema says it: ``Tensor | None`` is ``Tensor?``, ``list[int]`` is ``int[]``."""
    parts = typing.get_args(hint)
    if type(None) in parts:
        (inner,) = (p for p in parts if p is not type(None))
        return f"{_schema_type(inner, mark)}?"
    if typing.get_origin(hint) is list:
        return f"{_schema_type(parts[0], mark)}[]"
    return f"{hint.__name__}{mark}"
