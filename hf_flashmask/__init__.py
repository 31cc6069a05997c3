"""FlashMask for Hugging Face Transformers: exact attention under column masks that skips what they hide.

Importing this package registers ``attn_implementation="flashmask"``. The import is cheap: torch and Transformers'
modelling code are loaded when they are first needed, and the name is there as soon as they are.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _register

if TYPE_CHECKING:
    import hf_flashmask.patches as patches

    from . import masks as masks
    from .attention import flashmask_attention as flashmask_attention
    from .masks import ColumnMask as ColumnMask
    from .prefix_sharing import share_prompts as share_prompts

__version__ = "0.1.0"
__all__ = ["ColumnMask", "__version__", "flashmask_attention", "masks", "patches", "share_prompts"]

_PUBLIC = {"ColumnMask": "masks", "flashmask_attention": "attention", "share_prompts": "prefix_sharing"}


def __getattr__(name: str) -> Any:
    if name in ("masks", "patches"):
        return importlib.import_module(f"hf_flashmask.{name}")
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"hf_flashmask.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'hf_flashmask' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register.when_transformers_loads()
