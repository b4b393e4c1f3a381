"""Settings that are named once, as the fields of a dataclass, and taken by name elsewhere."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])

LINE_LENGTH = 115
PLACE = "    {fields}"


def taken_from(kind: type, source: object) -> dict[str, Any]:
    """Return the values that an object has for the fields of a dataclass, by name."""
    return {f.name: getattr(source, f.name) for f in fields(kind)}


def spelled_by(kind: type) -> Callable[[Function], Function]:
    """Return a decorator that names the fields of a dataclass in a signature, in place of its `**settings`."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        *named, _ = signature.parameters.values()
        own = {parameter.name for parameter in named}
        added = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(kind)
            if f.name not in own
        ]
        function.__signature__ = signature.replace(parameters=[*named, *added])
        return function

    return decorate


def documented_by(kind: type | None = None, besides: type | None = None) -> Callable[[Class], Class]:
    """Return a decorator that puts the help of fields in a class's docstring, in place of the line `{fields}`.

    Args:
        kind: the dataclass that has the fields; None: the decorated class itself.
        besides: a dataclass whose fields are left out.
    """

    def decorate(cls: Class) -> Class:
        if cls.__doc__ is not None:  # as it is with python -OO
            known = {f.name for f in fields(besides)} if besides else set()
            entries = [_entry(f) for f in fields(kind or cls) if f.name not in known and "help" in f.metadata]
            cls.__doc__ = inspect.cleandoc(cls.__doc__).replace(PLACE, "\n".join(entries))
        return cls

    return decorate


def _entry(field: Field) -> str:
    text = f"{field.name}: {field.metadata['help']}"
    return textwrap.fill(text, LINE_LENGTH, initial_indent=" " * 4, subsequent_indent=" " * 8)
