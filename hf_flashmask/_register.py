"""Registers "flashmask" the moment Transformers' modelling code is there, so that our own import need not load it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# Models load the first; whoever makes masks without them, the second.
_AWAITED = ("transformers.modeling_utils", "transformers.masking_utils")


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds an awaited module as usual, once, and registers after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _AWAITED or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                execute(module)
            except BaseException:
                when_transformers_loads()  # its import failed: wait for the next try
                raise
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from .huggingface import register

    register()


def when_transformers_loads() -> None:
    """Register now if Transformers' modelling code has been imported, else right after it is."""
    names = ("AttentionInterface", "AttentionMaskInterface")  # defined late: their modules have run
    if any(hasattr(sys.modules.get(module), name) for module, name in zip(_AWAITED, names, strict=True)):
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
