"""What a mask is: column bounds, builders, conversions and pictures. Pure torch; knows no kernel and no model."""

from .builders import (
    causal,
    causal_blockwise,
    causal_document,
    document,
    full,
    global_sliding_window,
    hash_sparse,
    image_blocks,
    padding,
    prefix_lm_causal,
    prefix_lm_document,
    prefix_tree,
    qk_sparse,
    random_eviction,
    share_question,
    sliding_window,
)
from .column_mask import ColumnMask

__all__ = [
    "ColumnMask",
    "causal",
    "causal_blockwise",
    "causal_document",
    "document",
    "full",
    "global_sliding_window",
    "hash_sparse",
    "image_blocks",
    "padding",
    "prefix_lm_causal",
    "prefix_lm_document",
    "prefix_tree",
    "qk_sparse",
    "random_eviction",
    "share_question",
    "sliding_window",
]
