"""attn_implementation="flashmask": how Transformers' masks and kwargs become ours."""

from __future__ import annotations

import importlib

from .naming import NAME, PAGED_NAME


def register() -> None:
    """Make "flashmask" an attention implementation of Transformers. Idempotent; ``import hf_flashmask`` calls it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from . import closures, naming, packing, paged
    from .attention import flashmask_attention_forward
    from .masking import flashmask_mask

    naming.install()
    closures.install()
    packing.install(flashmask_mask)
    paged.install(flashmask_mask)
    # Transformers 5.17 has another name for continuous batching.
    for name in (NAME, PAGED_NAME) if "paged|sdpa" in AttentionInterface() else (NAME,):
        AttentionInterface.register(name, flashmask_attention_forward)
        AttentionMaskInterface.register(name, flashmask_mask)


# What is registered when this is imported imports it too: it comes first, while none of that is half made.
importlib.import_module("transformers.modeling_utils")

__all__ = ["NAME", "register"]
