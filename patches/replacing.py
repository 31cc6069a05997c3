"""Attributes of other libraries replaced and put back, and checks that they are those that were read."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

_ABSENT = object()


class Replacement(NamedTuple):
    """``owner.name`` becomes ``value``."""

    owner: Any
    name: str
    value: Any


class Replaced:
    """Replacements in force, until ``undo()``."""

    def __init__(self, replacements: Iterable[Replacement]) -> None:
        self._originals: list[Replacement] = []
        for owner, name, value in replacements:
            # The owner's own attribute, not one that a base class lends it.
            self._originals.append(Replacement(owner, name, vars(owner).get(name, _ABSENT)))
            setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, last first. Does nothing the second time."""
        while self._originals:
            owner, name, original = self._originals.pop()
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def check_version(package: str, oldest: str, newest: str) -> None:
    """Refuse a release that nobody has read: ``oldest <= release < newest``, compared number by number.

    Raises:
        ImportError: the package is not installed.
        RuntimeError: another release is.
    """
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"hf_flashmask.patches needs {package}>={oldest},<{newest}: pip install {package}") from None
    if not _numbers(oldest) <= _numbers(found) < _numbers(newest):
        raise RuntimeError(
            f"hf_flashmask.patches was written for {package}>={oldest},<{newest} and does not know {package} {found}; "
            f"install a release it knows, or call share_prompts(model) on policy and reference yourself"
        )


def check_parameters(function: Callable[..., Any], expected: tuple[str, ...]) -> None:
    """Refuse a function whose parameters are not exactly those that were read.

    Raises:
        RuntimeError: with both lists.
    """
    found = tuple(inspect.signature(function).parameters)
    if found != expected:
        raise RuntimeError(
            f"hf_flashmask.patches does not know this {function.__module__}.{function.__qualname__}: it takes "
            f"({', '.join(found)}), expected ({', '.join(expected)}); another package may have replaced it"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """(1, 16) of 1.16.0.dev0; zeros at the end do not count."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
