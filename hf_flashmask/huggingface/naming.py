"""How the name "flashmask" lives beside Transformers' checks for "flash".

Transformers (5.17 to 5.24 read) takes every attention name that contains "flash" for a build of FlashAttention: it
tries to import one, swaps the name for another in gpt-oss-like models, refuses chunked attention, and maps it to
FlashAttention-2 classes in falcon-like models. All of that asks one function, so that function learns one exception.
It is changed in place because some seventy modules hold it by name. Can go when Transformers asks the registry
instead of the name.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
from typing import Any

NAME = "flashmask"
PAGED_NAME = "paged|flashmask"  # what continuous batching of Transformers 5.17 makes of it
_STOCK = "_hf_flashmask_stock_is_flash_attention_requested"


def _is_flash_attention_requested(
    config: Any = None, requested_attention_implementation: str | None = None, version: Any = None
) -> bool:
    # Runs with the globals of transformers.utils.generic: only names found there, and literals.
    ours = ("flashmask", "paged|flashmask")
    if config is None and requested_attention_implementation in ours:
        return False
    if requested_attention_implementation is None and getattr(config, "_attn_implementation", None) in ours:
        return False
    return _hf_flashmask_stock_is_flash_attention_requested(  # type: ignore[name-defined]  # noqa: F821
        config, requested_attention_implementation, version
    )


def install() -> None:
    """Teach Transformers that "flashmask" is no FlashAttention build, and refuse models it cannot reach. Idempotent."""
    from transformers import PreTrainedModel
    from transformers.utils import generic

    asked = generic.is_flash_attention_requested
    if not hasattr(generic, _STOCK):
        ours = inspect.signature(_is_flash_attention_requested).parameters
        theirs = inspect.signature(asked).parameters
        if list(ours) != list(theirs) or asked.__code__.co_freevars:
            raise ImportError(
                "this release of transformers has another is_flash_attention_requested"
                f"({', '.join(theirs)}) than hf_flashmask knows; install transformers==5.24.0 or a newer hf-flashmask"
            )
        stock = types.FunctionType(asked.__code__, asked.__globals__, asked.__name__, asked.__defaults__)
        setattr(generic, _STOCK, stock)
        asked.__code__ = _is_flash_attention_requested.__code__

    check = PreTrainedModel.get_correct_attn_implementation
    if not hasattr(check, "_hf_flashmask"):

        @functools.wraps(check)
        def get_correct_attn_implementation(
            self: Any, requested_attention: str | None, *args: Any, **kwargs: Any
        ) -> str:
            if requested_attention == NAME and (reason := unsupported(type(self))):
                raise NotImplementedError(reason)
            return check(self, requested_attention, *args, **kwargs)

        get_correct_attn_implementation._hf_flashmask = True  # type: ignore[attr-defined]
        PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]


# Classes that have only that part of a source in them which asks the attention interface.
_SPARED = re.compile(r"BigBirdPegasus(ForCausalLM|Decoder)")
COMPUTES_ITSELF = "it computes attention itself instead of asking Transformers' attention interface"
# What a model's source does with attention that no registered function can serve, and what to say of it.
_REASONS = (
    (
        r"attention_mask\[:, 0(, :, :)?\],\n",
        "it attends to keys that an indexer selects from a dense mask, and puts them into that mask",
    ),
    (
        r"_CLASSES\[\w+(\.\w+)*\._attn_implementation\]",
        "it picks its attention class by name from a list of its own",
    ),
    (
        r"visible_token_indices = attention_mask if attention_mask\.dtype == torch\.bool",
        "it attends to keys that an indexer selects from a dense mask, and puts them into that mask",
    ),
    (r"attn_mask = self\.prepare_dynamic_mask\(", "it computes part of its mask from the values"),
    (r"attention_mask = torch\.cat\(\[attention_mask, block_bias", "it appends compressed keys behind its mask"),
    (r"precomputed for all layers in BigBirdPegasusModel", "its encoder adds the mask to scores of its own"),
    (r"torch\.cat\(\s*\[self_attn_mask_mapping", "it joins two masks into one by itself"),
    (r"padding_mask\[:, :, -1, :\]", "its experts read padding from a dense mask"),
)


def unsupported(model_class: type) -> str | None:
    """Why a model class cannot run flashmask, or None. Judged by its source: whether its attention modules ask the
    attention interface (Transformers' own rule), and whether it takes masks apart that only tensors can be."""
    module = sys.modules.get(model_class.__module__)
    try:
        source = inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):  # a notebook or a frozen program: no source to judge by
        source = ""
    own = re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE)
    if not own:
        return None
    if "ALL_ATTENTION_FUNCTIONS" not in source:
        reason = COMPUTES_ITSELF
    else:
        # A vision tower makes no mask to take apart: there, only its choice of attention classes counts.
        tower = "Vision" in model_class.__name__
        reasons = [(p, text) for p, text in _REASONS if not tower or "_CLASSES" in p]
        found = next((text for pattern, text in reasons if re.search(pattern, source)), None)
        if found is None or _SPARED.match(model_class.__name__):
            return None
        reason = found
    return (
        f'{model_class.__name__} does not support attn_implementation="{NAME}": {reason}. '
        "Use attn_implementation='eager' or 'sdpa' for it; in a composite "
        "model give each part its own, e.g. attn_implementation={'text_config': 'flashmask', 'vision_config': 'sdpa'}"
    )
