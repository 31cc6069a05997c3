"""The attention function of ``attn_implementation="flashmask"``: kwargs in, backend out, unknown kwargs refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils import logging

from hf_flashmask import masks
from hf_flashmask.attention.api import attention_of_heads
from hf_flashmask.masks import ColumnMask
from hf_flashmask.masks.column_mask import version_of
from hf_flashmask.masks.convert import refuse_gradient

from .packing import BuiltMask, covers, split_documents
from .paged import PagedStep
from .sequence_parallel import masks_are_dropped, own_sinks, refuse_context_parallel
from .tree_mask import TreeMask, WindowedTree

logger = logging.get_logger(__name__)

# What models hand to attention functions that has no bearing on the result here. Everything else that is set is
# refused: a kernel that ignores an argument it does not know is silently wrong.
_NO_EFFECT = frozenset(
    {
        "cache_position",
        "fused_lm_head",
        "grid_thw",  # LFM3-VL; the images are told apart by cu_seq_lens beside it
        "is_first_forward",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "margin",  # of rewards; TRL's RewardTrainer hands all columns of its batch to the model
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "return_dict",
        "shift_labels",  # of the loss, where sequences are split among devices
        "token_type_ids",
        "use_cache",
    }
)


def flashmask_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ColumnMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | dict[str, Tensor] | None = None,
    seq_idx: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Sk, D]``.
        value: ``[B, Hkv, Sk, Dv]``.
        attention_mask: what ``flashmask_mask`` made, a ``ColumnMask`` or a dense 4D mask of the user's, or None from
            modules without masks (vision towers); a ``PagedStep`` adds keys and values of a paged cache.
        s_aux: attention sinks ``[Hq]``.

    Returns:
        ``([B, Sq, Hq, Dv], None)``.

    Raises:
        NotImplementedError: an argument that would change attention and is not supported.
    """
    where = type(module).__name__
    if not torch.compiler.is_compiling():
        refuse_context_parallel()
    if dropout:
        raise NotImplementedError(
            f"{where}: flashmask has no attention dropout, got {dropout}; set it to 0 in the model's config "
            "(attention_dropout, attn_pdrop) or use attn_implementation='sdpa'"
        )
    if output_attentions:
        raise NotImplementedError(
            f"{where}: flashmask never forms attention weights, so output_attentions=True cannot be served; "
            "use attn_implementation='eager' for them"
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    step = attention_mask if isinstance(attention_mask, PagedStep) else None
    for name, given in kwargs.items():
        known = name in _NO_EFFECT or (step is not None and name in PagedStep.ARGUMENTS)
        if given is not None and given is not False and not known:
            raise NotImplementedError(
                f"{where}: flashmask does not know the attention argument {name!r} and will not ignore it; "
                "use attn_implementation='eager' or 'sdpa' for this model or call"
            )
    options: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap, "sinks": s_aux}
    if step is not None:
        if (out := step.attend(module, query, key, value, **options)) is not None:
            return out, None
        key, value, attention_mask = step.read(module, key, value, sliding_window)
        # They are in that mask; position_ids say where a request is, not where it begins.
        cu_seq_lens_q = cu_seq_lens_k = position_ids = None
    if (lower := _lower_dtype(module, query)) is not None:
        query, key, value = (t.to(lower) for t in (query, key, value))

    mask = _given_mask(module, query, key, attention_mask, is_causal, sliding_window)
    if _attends_elsewhere(module, is_causal):
        cu_seq_lens_q = cu_seq_lens_k = position_ids = seq_idx = None
    elif attention_mask is None and not is_causal and not covers(cu_seq_lens_q, cu_seq_lens_k, mask.q_len, mask.kv_len):
        cu_seq_lens_q = cu_seq_lens_k = None  # a vision tower's own fit it; these are the text's
    if cu_seq_lens_q is not None and masks_are_dropped():
        raise NotImplementedError(
            f"{where}: under Ulysses sequence parallelism documents are told by position_ids, which DeepSpeed gathers; "
            "cu_seq_lens_q would be those of one process: leave them out of the batch (return_flash_attn_kwargs=False)"
        )
    if cu_seq_lens_q is not None and query.shape[0] != 1:
        raise NotImplementedError(
            f"{where}: cu_seq_lens_q describes one packed row, but the batch has {query.shape[0]}; "
            "pack into one row or pass position_ids"
        )
    if isinstance(cu_seq_lens_k, dict):
        raise NotImplementedError(
            f"{where}: cu_seq_lens_k by layer type is continuous batching's, but its mask did not reach attention; "
            "use attn_implementation='sdpa' for this model"
        )
    if cu_seq_lens_q is not None or mask.q_len == mask.kv_len:  # only then are there documents to tell apart
        mask = split_documents(mask, position_ids, cu_seq_lens_q, cu_seq_lens_k, seq_idx)
    mask = mask if mask.device == query.device else mask.to(query.device)
    if s_aux is not None and s_aux.shape[0] != query.shape[1] and masks_are_dropped():
        options["sinks"] = own_sinks(s_aux, query.shape[1])
    if isinstance(mask, WindowedTree):
        tensors = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return mask.attend(*tensors, **options), None
    if isinstance(mask, TreeMask) and sliding_window is not None and sliding_window < mask.row_len:
        raise NotImplementedError(
            f"{where}: sliding_window={sliding_window} reached attention but not the mask, so merged rows would lose "
            "it; run this model without share_prompts"
        )
    return attention_of_heads(query, key, value, mask, **options), None


def _layer_type(module: torch.nn.Module) -> str | None:
    """What the model's config calls this layer of attention, if it names layers and the module knows its number."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    at = getattr(module, "layer_idx", None)
    return types[at] if types and isinstance(at, int) and at < len(types) else None


def _lower_dtype(module: torch.nn.Module, query: Tensor) -> torch.dtype | None:
    """float16 or bfloat16 where float32 queries do not belong, as Transformers' FlashAttention reads it; else None.

    Under autocast, its dtype. Else norms or adapters kept in float32 (PEFT's ``prepare_model_for_kbit_training``) made
    them so, and they go back to what the model computes in: a quantized model's dtype, or the first linear layer's.
    """
    if query.dtype != torch.float32:
        return None
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    config: Any = getattr(module, "config", None)
    if hasattr(config, "_is_quantized"):
        dtype = config.dtype
    else:
        linear = next((layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)), None)
        dtype = None if linear is None else linear.weight.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    if not torch.compiler.is_compiling():
        logger.warning_once(
            "flashmask: attention receives float32 queries in a model of %s and computes in %s; float32 norms or "
            "adapters are what makes them",
            dtype,
            dtype,
        )
    return dtype


def _given_mask(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: ColumnMask | Tensor | None,
    is_causal: bool,
    sliding_window: int | None,
) -> ColumnMask:
    """The attention_mask that a layer was given, as a ColumnMask."""
    if isinstance(attention_mask, ColumnMask):
        return attention_mask
    q_len, kv_len = query.shape[2], key.shape[2]
    if attention_mask is None:
        return _without_mask(module, q_len, kv_len, is_causal, sliding_window, query.device)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        # A mask of keys only, [B, 1, 1, Sk], is for every query.
        return _from_dense(attention_mask.expand(-1, -1, q_len, -1) if attention_mask.shape[2] == 1 else attention_mask)
    shape = f" of shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else ""
    raise TypeError(
        f"{type(module).__name__}: attention_mask must be a ColumnMask, a dense 4D mask or None, got "
        f"{type(attention_mask).__name__}{shape}"
    )


def _attends_elsewhere(module: torch.nn.Module, is_causal: bool) -> bool:
    """Whether keys may come from another sequence, to which position_ids and documents of the queries do not apply."""
    if getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__:
        return True
    return not is_causal and bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _without_mask(
    module: torch.nn.Module,
    q_len: int,
    kv_len: int,
    is_causal: bool,
    sliding_window: int | None,
    device: torch.device,
) -> ColumnMask:
    """What a module that made no mask means: everything, or the causal triangle where it says so, as sdpa reads it."""
    if not is_causal or q_len == 1:
        if sliding_window is not None and sliding_window < kv_len:
            raise NotImplementedError(
                f"{type(module).__name__}: sliding_window={sliding_window} without causality and without a mask is "
                "ambiguous; pass a mask"
            )
        return masks.full(kv_len, q_len=q_len, device=device)
    if q_len != kv_len:
        raise NotImplementedError(
            f"{type(module).__name__}: causal attention of {q_len} queries to {kv_len} keys without a mask is "
            "ambiguous (aligned to the first or to the last key?); pass a mask"
        )
    if _layer_type(module) == "chunked_attention":
        raise NotImplementedError(
            f"{type(module).__name__}: a layer of chunked attention cannot be served without its mask; "
            "use attn_implementation='sdpa' here"
        )
    if sliding_window is None:
        mask = masks.causal(kv_len, device=device)
    else:
        mask = masks.sliding_window(kv_len, sliding_window, device=device)
    return BuiltMask.of(mask, documents_known=False)


# Dense masks by tensor: layers of one forward share the tensor, so it is converted once. A view is known by its base.
# Tensors of inference mode do not tell when they are written to: they are compared with a copy. Others tell, but for
# writes through .data, which stay unseen: comparing would make every layer wait for the device.
_dense: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _from_dense(dense: Tensor) -> ColumnMask:
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "a dense 4D mask cannot be converted while torch.compile traces; convert it before the forward: "
            "attention_mask=hf_flashmask.ColumnMask.from_dense(mask)"
        )
    refuse_gradient(dense)  # every time: the tensor may be known from a call without gradients
    base = dense if dense._base is None else dense._base
    untold = dense.is_inference()
    key = (version_of(dense), tuple(dense.shape), dense.stride(), dense.storage_offset(), dense.dtype)
    known = _dense.setdefault(base, {})
    if key not in known or (untold and not torch.equal(dense, known[key][1])):
        known.clear()
        # Outside inference mode: a training step may meet the same tensor later. Leaving it enables gradients too, so a
        # mask that was let through without them is detached.
        with torch.inference_mode(False):
            known[key] = ColumnMask.from_dense(dense.detach()), dense.clone() if untold else None
    result: ColumnMask = known[key][0]
    return result
