"""Pick a back end for an operator, or say exactly why it cannot be used.

A back end is a module with two names:

    unavailable(request=None) -> str | None    why it cannot run this (None: it can); the reason carries the command
                                               that mends it. request=None asks about the machine only.
    run(...)                                   the operator, on checked arguments (the op's __init__ lists them)

It must cost nothing to import: numba, triton, compiled extensions and the like are looked for inside those functions.
"""

import difflib
import functools
import logging
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.autograd import forward_ad

from seqlab.errors import UserError

try:  # what guards compiled code: whether tensors are of the kind that others were, in one call
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # torch's own affair, which may go; then `layout` looks at them one by one
    TensorGuards = None
try:
    from torch._C import _len_torch_dispatch_stack as dispatch_modes
except ImportError:

    def dispatch_modes() -> int:
        return 1  # that there may be some


ORDER = ("cuda", "mamba_ssm", "cpu", "reference")
"""What "auto" tries, fastest first."""

ENVIRONMENT = "SEQLAB_BACKEND"

_log = logging.getLogger("seqlab")
_announced: set[tuple[str, str, str]] = set()
_chosen: dict[tuple, str] = {}  # answers on a GPU, which do not change in a process; asking costs more than a short call


@dataclass(frozen=True)
class Request:
    """What a call needs of a back end: facts about the arguments, never their values."""

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype  # of the data (u or x); parameters and states are fp32, or fp64 beside fp64 data
    channels: int  # d
    batch: int = 0  # b and l; 0 while torch.compile traces, where they need not be known
    length: int = 0
    d_state: int = 0  # n (selective_scan)
    width: int = 0  # w (causal_conv1d)
    initial_state: bool = False
    final_state: bool = False
    grad: bool = False  # some argument wants a gradient
    mask: bool = False
    reverse: bool = False


def reasons(modules: dict[str, ModuleType], request: Request | None = None) -> dict[str, str | None]:
    """name -> why that back end cannot serve `request` (None: it can), in the order of preference."""
    return {name: modules[name].unavailable(request) for name in ORDER if name in modules}


def check_name(name: str, modules: dict[str, ModuleType], where: str) -> None:
    """Raise UserError for a back end that does not exist, naming the nearest one that does."""
    if name == "auto" or name in modules:
        return
    near = difflib.get_close_matches(str(name), ["auto", *modules], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{where} {name!r} is not a back end; allowed: {', '.join(['auto', *modules])}{hint}")


def forced(modules: dict[str, ModuleType]) -> str:
    """What SEQLAB_BACKEND says of an operator with these back ends: a name, or "auto" where it says nothing or names a back end
    that only other operators have (a decoder's, `mamba_ssm` of the scan). A name that none has is returned, for `check_name`."""
    name = os.environ.get(ENVIRONMENT) or "auto"
    return "auto" if name not in modules and _is_some_operators(name) else name


def forces_another(name: str) -> bool:
    """Whether SEQLAB_BACKEND keeps the back end `name`, one of ORDER, from running the parts of a block."""
    given = os.environ.get(ENVIRONMENT) or "auto"
    return given not in ("auto", name) and (given in ORDER or not _is_some_operators(given))


@functools.cache
def _is_some_operators(name: str) -> bool:
    from seqlab.ops import OPERATORS, backends

    return any(name in backends(op) for op in OPERATORS)


class CannotRun(UserError, RuntimeError):
    """A back end cannot run what it was asked for, and why; a command shows it as the user's to mend."""


def choose(op: str, modules_of: Callable[[], dict[str, ModuleType]], backend: str, **facts) -> str:
    """Name of the back end that runs `op` for arguments described by `facts` (the fields of Request).

    An explicit name (argument, else the environment variable) is taken or refused, never replaced. "auto" takes the
    first that is right and logs that once per process. While compiling, the answer is a constant of the graph.

    Raises:
        UserError (a ValueError): no such back end.
        CannotRun (a UserError and a RuntimeError): the one asked for cannot run this; the message lists every back end with its reason.
    """
    where = "argument backend"
    if backend == "auto":
        backend, where = os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT
        if backend != "auto":
            backend = forced(modules_of())
    known = None
    if facts.get("device") == "cuda":
        known = (op, backend, torch.cuda.current_device(), *facts.values())
        if known in _chosen:
            return _chosen[known]
    modules = modules_of()
    request = Request(**facts)
    check_name(backend, modules, where)
    if backend == "auto":
        for name in ORDER:
            if name in modules and modules[name].unavailable(request) is None:
                _announce(op, name, request.device)
                if known is not None and name == ORDER[0]:
                    _chosen[known] = name
                return name
        raise CannotRun(f"{op}: no back end can run this. {_listing(modules, request)}")
    if modules[backend].unavailable(request) is not None:
        raise CannotRun(
            f"{op}: back end {backend!r} (asked for by {where}) cannot run this. {_listing(modules, request)}"
        )
    return backend


try:  # the transform at work, innermost first: torch's own affair, which may go
    from torch._C._functorch import is_gradtrackingtensor, peek_interpreter_stack
except ImportError:

    def is_gradtrackingtensor(x: torch.Tensor) -> bool:
        return False

    def peek_interpreter_stack() -> None:
        return None


def transforming() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func is at work, so that tensors may be what they do not
    look like. Asked in every call: a tenth of a microsecond."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def differentiable(op: str, backend: str, tensors: tuple[torch.Tensor | None, ...]) -> str:
    """`backend`, or "reference" where some tensor has a tangent (torch.func.jvp, forward_ad) or is differentiated by torch.func.grad
    and its like: an operator written by hand would drop the tangent, and a derivative of 0 look right; grad does not know it.

    Raises CannotRun where another back end is asked for by name.
    """
    present = [x for x in tensors if x is not None]
    if not any(is_gradtrackingtensor(x) or forward_ad.unpack_dual(x).tangent is not None for x in present):
        return backend
    if backend not in ("auto", "reference"):
        raise CannotRun(f"{op}: back end {backend!r} knows no forward-mode derivative and no torch.func; leave it out, or ask for 'reference'")
    return "reference"


# What torch.compiler.assume_constant_result does, which would import the whole compiler (a second) to do it.
choose._dynamo_marked_constant = True


def layout(backend: str, tensors: tuple[torch.Tensor | None, ...], *options) -> tuple | None:
    """All that the checks of a call and its way through a native kernel depend on: everything but values and addresses.
    None away from the GPU, while compiling and inside torch.func, whose tensors have no address. An operator keeps it with
    what it found out, which takes longer than a short kernel, and skips all of that when it sees the same again. The first
    tensor is the data."""
    if torch.compiler.is_compiling() or type(tensors[0]) is not torch.Tensor or not tensors[0].is_cuda or transforming():
        return None
    return (
        os.environ.get(ENVIRONMENT) if backend == "auto" else backend, torch.cuda.current_device(),
        torch.is_grad_enabled(), options,
        *[
            None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.data_ptr() % 16)
            for x in tensors
        ],
    )  # fmt: skip


def remember(known: dict, layout: tuple | None, given: tuple, used: tuple, find: Callable, *options) -> None:
    """Keep find(given, *options), what is left to do of a call of this layout, unless its tensors had to be changed (`used`
    is not `given`)."""
    if layout is not None and layout not in known and all(a is b for a, b in zip(used, given, strict=True)):
        memorise(known, layout, find(given, *options))


class Alike:
    """What is left to do of calls whose tensors look alike to torch's guards, for the MOST of them that came last. The same
    tensors are None in all of them."""

    MOST = 4

    def __init__(self, tensors: tuple[torch.Tensor | None, ...]):
        present = [i for i, x in enumerate(tensors) if x is not None]
        self._present = operator.itemgetter(slice(1)) if present == [0] else operator.itemgetter(*present)
        self._kept: tuple[tuple, ...] = ()

    def find(self, tensors: tuple[torch.Tensor | None, ...]):
        """What `keep` was given for tensors like these, or None."""
        present = self._present(tensors)
        for guards, found in self._kept:
            if guards.check(*present):
                return found
        return None

    def keep(self, found, tensors: tuple[torch.Tensor | None, ...]) -> None:
        """Not inside of a dispatch mode, which wants to see what a call is made of; the guards of others say no there."""
        if TensorGuards is None or dispatch_modes():
            return
        present = self._present(tensors)
        sizes, strides = [list(x.shape) for x in present], [list(x.stride()) for x in present]
        try:
            guards = TensorGuards(*present, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
            if not guards.check(*present):
                return
        except Exception:  # a torch whose guards are others
            return
        self._kept = ((guards, found), *self._kept)[: self.MOST]


class Recent:
    """What is left to do of the calls made last, by all that their checks depend on but alignment, like `layout` in a
    fifth of the time: five of the fifty microseconds that a short kernel takes from call to launch."""

    MOST = Alike.MOST
    """Calls kept apart by their tensors alone."""

    def __init__(self):
        self._memory: dict[tuple, Alike] = {}

    def find(self, backend: str, tensors: tuple[torch.Tensor | None, ...], *options):
        """What `keep` was given for such a call, or None. `options` tell which of the tensors are None."""
        if torch.compiler.is_compiling() or not tensors[0].is_cuda:
            return None
        asked = os.environ.get(ENVIRONMENT) if backend == "auto" else backend
        kept = self._memory.get((asked, torch.cuda.current_device(), torch.is_grad_enabled(), options))
        return None if kept is None else kept.find(tensors)

    def keep(self, found, backend: str, tensors: tuple[torch.Tensor | None, ...], *options) -> None:
        """Of what `find` was just asked for; only away from torch.compile and on a GPU."""
        asked = os.environ.get(ENVIRONMENT) if backend == "auto" else backend
        key = asked, torch.cuda.current_device(), torch.is_grad_enabled(), options
        (self._memory.get(key) or memorise(self._memory, key, Alike(tensors))).keep(found, tensors)

    def clear(self) -> None:
        self._memory.clear()


def memorise(memory: dict, key: tuple, found):
    """`found`, put into `memory`, which starts anew rather than grow without end where every call is of another kind."""
    if len(memory) >= 4096:
        memory.clear()
    memory[key] = found
    return found


def _listing(modules: dict[str, ModuleType], request: Request) -> str:
    return "; ".join(f"{name}: {why or 'can run this'}" for name, why in reasons(modules, request).items())


def _announce(op: str, name: str, device: str) -> None:
    if (op, name, device) not in _announced:
        _announced.add((op, name, device))
        _log.info("%s: back end %s on %s", op, name, device)


def check_are_tensors(op: str, names: tuple[str, ...], values: tuple, required: int) -> None:
    """Raise TypeError for the first of the arguments `names`, of these `values`, that is no tensor, ValueError for one that is not
    dense; those after the first `required` may be None."""
    for i, x in enumerate(values):
        if isinstance(x, torch.Tensor):
            if x.layout != torch.strided:
                raise ValueError(f"{op}: {names[i]} is laid out as {x.layout}; it must be dense: {names[i]}.to_dense()")
            continue
        if x is None and i >= required:
            continue
        kind, allowed = type(x), "a torch.Tensor" if i < required else "a torch.Tensor or None"
        if x is None:
            raise TypeError(f"{op}: {names[i]} is None; it must be {allowed}")
        seen = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(f"{op}: {names[i]} is of type {seen}; it must be {allowed}: torch.as_tensor({names[i]})")


def check_tensors(
    op: str,
    first: tuple[str, torch.Tensor],
    others: tuple[tuple[str, torch.Tensor | None, tuple[int, ...]], ...],
    beside: str,
) -> None:
    """Raise ValueError unless every tensor of `others` (name, tensor or None, expected shape) has its shape, the device of
    `first` (name, tensor) and a dtype that operators take: floating, not float16; bool for `mask`. `beside` ends the
    message about a shape: what it was expected to go with."""
    first_name, anchor = first
    for name, t, shape in others:
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {shape} to go with {beside}")
        if t.device != anchor.device:
            raise ValueError(f"{op}: {name} is on {t.device}, {first_name} on {anchor.device}; move one of them")
        if name == "mask":
            if t.dtype != torch.bool:
                raise ValueError(f"{op}: mask is {t.dtype}, expected bool (True = real position)")
        elif t.dtype == torch.float16 or not t.dtype.is_floating_point:
            raise ValueError(
                f"{op}: {name} is {t.dtype}; allowed: bfloat16, float32, float64"
                + (" (float16 overflows, use bfloat16)" if t.dtype == torch.float16 else "")
            )
