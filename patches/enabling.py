"""All patches on, off, or on for a ``with`` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import trl_cli, trl_dpo, trl_grpo, trl_kto, trl_reward, trl_rloo
from .replacing import Replaced, check_version

_PATCHES = (trl_dpo, trl_reward, trl_kto, trl_grpo, trl_rloo, trl_cli)
_in_force: Replaced | None = None


def enable() -> None:
    """Put all patches in place, or none. Does nothing where they are already.

    Call it before a config is built. Trainers built while it is in force keep sharing prompts after ``disable()``.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this TRL is not one that was read: another release, or other parameters of what is replaced.
    """
    global _in_force
    if _in_force is not None:
        return
    # What the patches replace was read in 1.16.0.
    check_version("trl", "1.16", "1.17")
    # Everything is checked before anything is replaced.
    replacements = [replacement for patch in _PATCHES for replacement in patch.replacements()]
    _in_force = Replaced(replacements)


def disable() -> None:
    """Put back what ``enable()`` replaced. Does nothing where nothing is."""
    global _in_force
    if _in_force is not None:
        _in_force.undo()
        _in_force = None


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Patches in place for a ``with`` block, and after it only if they were before."""
    before = _in_force is not None
    enable()
    try:
        yield
    finally:
        if not before:
            disable()
