"""A short text that identifies what a function computes: equal texts mean equal functions.

It depends on byte code, constants, defaults, closure and the global values that the function refers
to, never on file, line, module or name. Walk-through: notebooks/05_checkpoints.ipynb.
"""

import builtins
import contextlib
import dis
import functools
import hashlib
import inspect
import random
import sys
import types
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ..config import TERMS
from ..masking.image import IMAGE_MASKERS
from ..masking.text import TEXT_MASKERS
from ..schedules import RATIO_SCHEDULES, SCHEDULES, TERM_SCHEDULES

# Fields of the configuration that are functions, or names of registered ones.
FUNCTIONS: dict[str, dict] = {
    "schedule": SCHEDULES,
    **{f"{term}_schedule": TERM_SCHEDULES for term in TERMS},
    "optimizer": {},
    "image_mask": IMAGE_MASKERS,
    "text_mask": TEXT_MASKERS,
    "image_mask_schedule": RATIO_SCHEDULES,
    "text_mask_schedule": RATIO_SCHEDULES,
}
# mmkit's own functions, by name. Those that a user registers later are not among them.
_BUILT_IN = {id(f): name for known in FUNCTIONS.values() for name, f in known.items()}
_PLAIN: tuple = (bool, int, float, complex, str, bytes, type(None), type(...))
_PLAIN += (type(NotImplemented), torch.dtype, torch.device)
_CYTHON = type(np.random.rand.__func__)  # type: ignore[attr-defined]
# Their states change with each draw and are not compared.
_GENERATORS = (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)
_MOST = 10_000  # most values that a function may refer to, directly or indirectly
_ARGUMENTS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR


def function_identity(value) -> str:
    """A text that identifies a function, another callable, or a name.

    Args:
        value: a callable, or any other value, which is identified by its repr.
    Returns:
        "built-in NAME", "3.11:DIGITS" (byte code can only be compared within a version of Python),
        or "? WHY" where the function cannot be identified.
    """
    if not callable(value):
        return f"{value!r}"
    if id(value) in _BUILT_IN:
        return f"built-in {_BUILT_IN[id(value)]}"
    try:
        digits = _Walk().of(value)
    except _Unknown as why:
        return f"? {why}"
    except RecursionError:
        return "? what it refers to is nested too deeply"
    return f"{sys.version_info.major}.{sys.version_info.minor}:{digits}"


class _Unknown(Exception):
    """A value that cannot be identified; the message says which."""


class _Walk:
    """Digests of values and everything that they refer to; each object is visited once."""

    def __init__(self):
        self.found: dict[int, str] = {}
        self.kept: list = []  # keeps the objects alive, so that no id is reused
        self.depth = 0

    def of(self, value) -> str:
        """The digest of a value."""
        if isinstance(value, _PLAIN):
            return _digest(type(value).__name__, repr(value))
        if id(value) not in self.found:
            if len(self.kept) == _MOST:
                raise _Unknown(f"it refers to more than {_MOST:,} values")
            self.kept.append(value)
            self.found[id(value)] = f"within {self.depth}"  # for values that refer to themselves
            self.depth += 1
            self.found[id(value)] = _digest(type(value).__name__, *self.parts(value))
            self.depth -= 1
        return self.found[id(value)]

    def each(self, values) -> Iterator[str]:
        """The digests of several values."""
        return (self.of(value) for value in values)

    def parts(self, value) -> Iterator[str | bytes]:
        """The texts and digests that identify an object."""
        if id(value) in _BUILT_IN:
            yield _BUILT_IN[id(value)]
        elif isinstance(value, types.ModuleType):
            yield value.__name__
        elif isinstance(value, tuple | list):
            yield from self.each(value)
        elif isinstance(value, set | frozenset):
            yield from sorted(self.each(value))
        elif isinstance(value, dict | types.MappingProxyType):
            yield from self.each(x for pair in value.items() for x in pair)
        elif isinstance(value, Tensor | np.ndarray):
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            yield from (str(array.dtype), str(array.shape), array.tobytes())
        elif isinstance(value, types.CodeType):
            yield from self.code(value)
        elif _of_library(value) and self.depth > 1:  # a given function is looked into
            yield f"{value.__module__}.{value.__qualname__}"
        elif isinstance(value, types.FunctionType):
            yield from self.function(value)
        elif isinstance(value, types.BuiltinFunctionType | _CYTHON):  # of a module, an object, …
            yield value.__qualname__
            yield self.of(getattr(value, "__self__", value.__module__))
        elif isinstance(value, types.MethodType):
            yield from self.each((value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            yield from self.each((value.func, value.args, sorted(value.keywords.items())))
        elif isinstance(value, type):
            yield from self.each((_name_of_library(value), value.__bases__))
            own = {k: v for k, v in vars(value).items() if k not in _ABOUT and not _is_slot(v)}
            yield from self.each(x for pair in sorted(own.items()) for x in pair)
        elif isinstance(value, property | staticmethod | classmethod):
            names = ("fget", "fset", "fdel", "__func__")
            yield from self.each(getattr(value, name, None) for name in names)
        elif hasattr(value, "__wrapped__"):  # of functools.cache
            yield from self.each([value.__wrapped__])
        elif not isinstance(value, _GENERATORS):
            yield from self.instance(value)

    def instance(self, value) -> Iterator[str]:
        """Identify an object by its class and its state, as copying it would read them."""
        if isinstance(value, nn.Module) and next(value.parameters(), None) is not None:
            raise _Unknown(f"it refers to a model ({type(value).__name__}), which changes")
        name = getattr(value, "__name__", "")
        if isinstance(value, np.ufunc) and getattr(np, name, None) is value:
            yield name
            return
        try:
            state = value.__reduce_ex__(4)
        except Exception:
            state = ""
        if isinstance(state, str):
            raise _Unknown(f"it refers to a {type(value).__name__}, whose state cannot be read")
        make, arguments, *rest = state
        yield from self.each((type(value), make, arguments, rest[0] if rest else None))
        for items in rest[1:3]:  # of lists and dicts
            yield self.of(None if items is None else list(items))

    def function(self, value: types.FunctionType) -> Iterator[str]:
        """Identify a function by its code without the docstring, its defaults and what it reads."""
        code = value.__code__
        if value.__doc__ is not None and code.co_consts[:1] == (value.__doc__,):
            code = code.replace(co_consts=(None, *code.co_consts[1:]))
        yield from self.each((code, value.__defaults__, value.__kwdefaults__, vars(value)))
        yield from self.each(_reads(value.__code__, value))

    def code(self, code: types.CodeType) -> Iterator[str | bytes]:
        """Identify byte code, with its constants and the names that it uses."""
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
        yield from (code.co_code, str(counts), str(code.co_flags & _ARGUMENTS))
        yield from (code.co_exceptiontable, repr(code.co_names))
        yield from self.each(code.co_consts)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        part = part.encode("utf-8", "backslashreplace") if isinstance(part, str) else part
        digest.update(b"%d:" % len(part) + part)
    return digest.hexdigest()


# Attributes of a class that say where it is defined, not what it does.
_ABOUT = set(
    "__module__ __qualname__ __doc__ __dict__ __weakref__ __firstlineno__ __static_attributes__ "
    "__annotations__ __annotate_func__ _abc_impl".split()
)


def _is_slot(value) -> bool:
    return isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType)


def _of_library(value) -> bool:
    """Whether a function or class of Python or an installed package is known by its name."""
    if isinstance(value, types.FunctionType):  # `__module__` may be that of a wrapped function
        module = value.__globals__.get("__name__", "")
    elif isinstance(value, type):
        module = value.__module__
    else:
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    known = module.partition(".")[0] in {*sys.stdlib_module_names, "mmkit"} or "-packages" in file
    return known and "<" not in value.__qualname__


def _name_of_library(value: type) -> str:
    return f"{value.__module__}.{value.__qualname__}" if _of_library(value) else ""


def _reads(code: types.CodeType, function: types.FunctionType) -> Iterator:
    """The values from outside that a function reads: global ones and those of its closure.

    Of `config.seed` or `math.cos` only the attribute counts as read.
    """
    around = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    value = missing = object()
    for step in (*dis.get_instructions(code), None):
        if step and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if step.argval in getattr(value, "__dict__", ()):
                value = getattr(value, step.argval)
                continue
        if value is not missing:
            yield value
        value = missing
        if step and step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            builtin = getattr(builtins, step.argval, None)
            value = function.__globals__.get(step.argval, builtin)
        elif step and "DEREF" in step.opname and step.argval in around:
            with contextlib.suppress(ValueError):  # the cell is still empty
                value = around[step.argval].cell_contents
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _reads(inner, function)
