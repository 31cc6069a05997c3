"""Attention where every process holds a part of each row: DeepSpeed's Ulysses is served, ring attention is refused.

DeepSpeed (0.19.8 read) puts a wrapper in place of the attention function. It exchanges parts of rows for parts of the
heads, so that the function sees whole rows, and hands it the position_ids of all processes and no mask, since
Transformers made one for a part of the row. The function then makes the mask again: causal, the layer's window, and
documents. Whatever else a mask says would be lost, so it is refused where it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import closures
from .naming import NAME
from .tree_mask import TreeMask

_REMADE = (closures.CAUSAL, closures.WINDOW, closures.PADDING, closures.PACKED)


def masks_are_dropped() -> bool:
    """Whether DeepSpeed's wrapper stands before the attention function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # imported, it registers us

    return ALL_ATTENTION_FUNCTIONS[NAME].__module__.startswith("deepspeed.")


def refuse_context_parallel() -> None:
    """
    Raises:
        NotImplementedError: torch's ``context_parallel`` is on. It exchanges keys in scaled_dot_product_attention,
            which it replaces meanwhile; any other attention would see a part of the row and not know.
    """
    if F.scaled_dot_product_attention.__module__.startswith("torch.distributed."):
        raise NotImplementedError(
            "flashmask cannot run under context parallelism (accelerate's cp_size, torch's context_parallel), which "
            "exchanges keys in scaled_dot_product_attention alone; split rows with Ulysses (sp_size) instead, or use "
            "attn_implementation='sdpa'"
        )


def own_sinks(sinks: Tensor, heads: int) -> Tensor:
    """The sinks ``[Hq]`` of this process's heads, its share in the order of ranks. Differentiable."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    return sinks.narrow(0, parallel_state_sp.get_sequence_parallel_rank() * heads, heads)


def refuse_lost_mask(attention_mask: Any, mask_function: Callable[..., Any] | None = None) -> None:
    """
    Raises:
        NotImplementedError: DeepSpeed would drop a mask that cannot be made again from position_ids.
    """
    if not masks_are_dropped():
        return
    if getattr(attention_mask, "ndim", 2) == 4:
        what = "the mask of share_prompts" if isinstance(attention_mask, TreeMask) else "a 4D attention_mask"
    elif mask_function is not None and (lost := _lost(mask_function)) is not None:
        what = f"a mask of {getattr(lost, '__qualname__', repr(lost))}"
    else:
        return
    raise NotImplementedError(
        f"Ulysses sequence parallelism drops {what}, which cannot be made again from position_ids; it serves causal "
        "attention, windows and packed documents"
    )


def _lost(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The first part of a mask function that position_ids, causality and windows do not say again."""
    code = getattr(function, "__code__", None)
    if code is not None and code is closures.AND:
        parts = closures.cells(function)["mask_functions"]
    elif code is not None and code is closures.REMAP:
        parts = (closures.cells(function)["mask_function"],)
    else:
        return None if code is not None and any(code is known for known in _REMADE) else function
    return next((lost for lost in map(_lost, parts) if lost is not None), None)
