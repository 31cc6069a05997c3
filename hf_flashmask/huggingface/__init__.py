"""attn_implementation="flashmask": how Transformers' masks and kwargs become ours."""

from __future__ import annotations

from .naming import NAME


def register() -> None:
    """Make "flashmask" an attention implementation of Transformers. Idempotent; ``import hf_flashmask`` calls it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from . import naming, packing, paged
    from .attention import flashmask_attention_forward
    from .masking import flashmask_mask

    naming.install()
    packing.install(flashmask_mask)
    AttentionInterface.register(NAME, flashmask_attention_forward)
    AttentionMaskInterface.register(NAME, flashmask_mask)
    paged.install(flashmask_attention_forward)


__all__ = ["NAME", "register"]
