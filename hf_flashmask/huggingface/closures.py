"""What the closures of Transformers' mask functions hold, also while torch.compile traces.

A closure that is made while torch.compile traces has no ``__closure__`` to read, but it keeps attributes. So the
factories of ``transformers.masking_utils`` (5.17 to 5.24 read) note on what they return what it closes over. Can go
when torch.compile traces ``__closure__``, or when mask functions carry a description.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from transformers import masking_utils

_NOTED = "_hf_flashmask_cells"
_FACTORIES = (
    "and_masks",
    "or_masks",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "chunked_overlay",
    "blockwise_overlay",
    "padding_mask_function",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
)


def code(factory_name: str, *args: Any) -> CodeType | None:
    """The code that closures of a Transformers factory share; None where this release has no such factory."""
    factory = getattr(masking_utils, factory_name, None)
    return None if factory is None else factory(*args).__code__


CAUSAL = masking_utils.causal_mask_function.__code__
BIDIRECTIONAL = masking_utils.bidirectional_mask_function.__code__
AND = code("and_masks", masking_utils.causal_mask_function)
OR = code("or_masks", masking_utils.causal_mask_function)
WINDOW = code("sliding_window_overlay", 1)
WINDOW_BOTH_WAYS = code("sliding_window_bidirectional_overlay", 1)
CHUNKED = code("chunked_overlay", 1, torch.zeros(1, dtype=torch.int64))
BLOCKWISE = code("blockwise_overlay", torch.zeros(1, 1, dtype=torch.int64))
PADDING = code("padding_mask_function", torch.ones(1, 1, dtype=torch.bool))
PACKED = code("packed_sequence_mask_function", torch.zeros(1, 1, dtype=torch.int64))
REMAP = code(
    "remap_positions_for_packed_sequence", masking_utils.causal_mask_function, torch.zeros(1, 1, dtype=torch.int64)
)


def cells(function: Callable[..., Any]) -> dict[str, Any]:
    """What a mask function closes over, by name."""
    noted: dict[str, Any] | None = getattr(function, _NOTED, None)
    if noted is not None:
        return noted
    closure = function.__closure__ or ()  # type: ignore[attr-defined]
    names = function.__code__.co_freevars  # type: ignore[attr-defined]
    return {name: cell.cell_contents for name, cell in zip(names, closure, strict=True)}


def install() -> None:
    """Let Transformers' factories of mask functions note what these close over. Idempotent."""
    for name in _FACTORIES:
        factory = getattr(masking_utils, name, None)
        if factory is not None and not hasattr(factory, "_hf_flashmask"):
            setattr(masking_utils, name, _noting(factory))


def _noting(factory: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(factory).parameters.values()
    names = tuple(p.name for p in parameters)
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)

    @functools.wraps(factory)
    def noting(*args: Any, **kwargs: Any) -> Any:
        function = factory(*args, **kwargs)
        function._hf_flashmask_cells = {names[0]: args} if variadic else {**dict(zip(names, args)), **kwargs}  # noqa: B905
        return function

    noting._hf_flashmask = True  # type: ignore[attr-defined]
    return noting
