"""DeepSpeed's Ulysses: attention where every process holds a part of each row.

DeepSpeed (0.19.8 read) puts a wrapper in place of the attention function. It exchanges parts of rows for parts of the
heads, so that the function sees whole rows, and hands it the position_ids of all processes and no mask, since
Transformers made one for a part of the row. The function then makes the mask again: causal, the layer's window, and
documents. Whatever else a mask says would be lost, so it is refused where it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import closures
from .naming import NAME
from .tree_mask import TreeMask

_REMADE = (closures.CAUSAL, closures.WINDOW, closures.PADDING, closures.PACKED, closures.REMAP)


def masks_are_dropped() -> bool:
    """Whether DeepSpeed's wrapper stands before the attention function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # imported, it registers us

    return ALL_ATTENTION_FUNCTIONS[NAME].__module__.startswith("deepspeed.")


def refuse_lost_mask(attention_mask: Any, mask_function: Callable[..., Any] | None = None) -> None:
    """
    Raises:
        NotImplementedError: DeepSpeed would drop a mask that cannot be made again from position_ids.
    """
    if not masks_are_dropped():
        return
    if getattr(attention_mask, "ndim", 2) == 4:
        what = "the mask of share_prompts" if isinstance(attention_mask, TreeMask) else "a 4D attention_mask"
    elif mask_function is not None and not _is_remade(mask_function):
        what = f"a mask of {mask_function.__module__}.{mask_function.__qualname__}"
    else:
        return
    raise NotImplementedError(
        f"Ulysses sequence parallelism drops {what}, which cannot be made again from position_ids; it serves causal "
        "attention, windows and packed documents"
    )


def _is_remade(function: Callable[..., Any]) -> bool:
    code = getattr(function, "__code__", None)
    if code is closures.AND:
        return all(_is_remade(part) for part in closures.cells(function)["mask_functions"])
    if code is closures.REMAP and code is not None:
        return _is_remade(closures.cells(function)["mask_function"])
    return code is not None and any(code is known for known in _REMADE)
