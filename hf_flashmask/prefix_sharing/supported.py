"""What can run on merged rows: which part of a model, which models, adapters and calls; all else is refused."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

_RECURRENT = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase)
_ATTENTION = ("full_attention", "sliding_attention")
# The name that a backbone's cache has, in Transformers 5.24 and before.
_CACHES = ("cache", "past_key_values")
# What describes rows, or is made for each of them, and does not fit merged ones.
_OF_ROWS = (
    "token_type_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "seq_idx",
    "encoder_hidden_states",
    "output_attentions",
    "output_router_logits",
)


def find_backbone(model: Any) -> Any:
    """The module that makes hidden states, under heads, adapters and DistributedDataParallel.

    Raises:
        TypeError, NotImplementedError: there is none, or what is around it cannot have merged rows.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Transformers model, got {type(model).__name__}")
    whole: Any = model
    if isinstance(whole, nn.DataParallel):
        raise NotImplementedError(
            "nn.DataParallel copies the model without what is set on it; start one process a GPU (torchrun, accelerate "
            "launch), which is faster too"
        )
    # DistributedDataParallel runs the module inside; FSDP2 changes a module's class and keeps what is set on it.
    if not hasattr(whole, "config") and isinstance(getattr(whole, "module", None), nn.Module):
        whole = whole.module
    if hasattr(whole, "peft_config"):
        for name, config in whole.peft_config.items():
            if obstacle := adapter_obstacle(config):
                raise NotImplementedError(f"adapter {name!r} {obstacle}")
        # A model that PEFT put adapters into has a peft_config too, and is its own base.
        whole = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    backbone = getattr(whole, getattr(whole, "base_model_prefix", ""), whole)
    if not isinstance(backbone, nn.Module) or not hasattr(backbone, "config"):
        raise TypeError(f"{type(model).__name__} has no backbone that Transformers knows of")
    return backbone


def adapter_obstacle(config: Any) -> str | None:
    """Why an adapter of this ``PeftConfig`` cannot run on merged rows, as the end of a sentence; None if it can."""
    if getattr(config, "is_prompt_learning", False):
        return "puts learned tokens before every row, which merged rows cannot have; use an adapter of the weights"
    if getattr(config, "alora_invocation_tokens", None) is not None:
        return (
            "acts from its alora_invocation_tokens on, a place that PEFT counts in every row and merged rows do not "
            "have; use LoRA without them"
        )
    kind = getattr(config, "peft_type", None)
    if kind == "XLORA":
        return "mixes adapters by weights that it makes for every row, which merged rows cannot have; use LoRA"
    if kind == "POLY":
        return "takes a task for every row (task_ids), which merged rows cannot have; use LoRA"
    return None


def check_implementation(backbone: Any) -> None:
    """
    Raises:
        ValueError: the backbone does not attend with "flashmask".
    """
    implementation = backbone.config._attn_implementation
    if implementation != "flashmask":
        raise ValueError(
            f"{type(backbone).__name__} has attn_implementation={implementation!r}; prompts are shared by masks of "
            "'flashmask': model.set_attn_implementation('flashmask')"
        )


def check_model(backbone: Any) -> None:
    """
    Raises:
        ValueError, NotImplementedError: the backbone's rows cannot be merged, and why.
    """
    name, config = type(backbone).__name__, backbone.config
    check_implementation(backbone)
    if getattr(config, "output_router_logits", False):
        raise NotImplementedError(
            f"{name} returns router logits for its balancing loss, which would count a shared prompt once; set "
            "config.output_router_logits=False"
        )
    if getattr(config, "is_encoder_decoder", False) or hasattr(config, "vision_config"):
        raise NotImplementedError(f"{name} is not a decoder of text alone, whose rows could be merged")
    parameters = inspect.signature(backbone.forward).parameters
    missing = [p for p in ("input_ids", "attention_mask", "position_ids") if p not in parameters]
    if missing:
        raise NotImplementedError(f"{name}.forward takes no {missing[0]}, which merged rows need")
    if "cross_attention_states" in parameters:
        raise NotImplementedError(f"{name} attends to images (cross_attention_states), which belong to single rows")
    if other := set(getattr(config, "layer_types", None) or _ATTENTION) - set(_ATTENTION):
        raise NotImplementedError(
            f"{name} has layers of {', '.join(sorted(other))}, which would mix tokens of other branches of the tree"
        )
    for path, module in backbone.named_modules():
        if isinstance(module, _RECURRENT) or "Mamba" in type(module).__name__:
            raise NotImplementedError(f"{name} mixes neighbouring tokens in {path} ({type(module).__name__})")
        if "Positional" in type(module).__name__ and "attention_mask" in inspect.signature(module.forward).parameters:
            raise NotImplementedError(f"{name} counts positions from the attention mask in {path}")
    if "labels" in parameters:
        raise NotImplementedError(
            f"{name} makes a loss itself, so it is not the backbone, and it has none under base_model_prefix="
            f"{backbone.base_model_prefix!r}; run it without share_prompts"
        )


def has_cache(given: dict[str, Any]) -> bool:
    """Whether a call reads or fills a cache, which is of rows."""
    return bool(given.get("use_cache")) or any(given.get(name) is not None for name in _CACHES)


def check_call(backbone: Any, given: dict[str, Any]) -> None:
    """
    Raises:
        TypeError, ValueError, NotImplementedError: a call with these arguments cannot run on merged rows, and why.
    """
    check_implementation(backbone)
    if given.get("inputs_embeds") is not None:
        raise NotImplementedError("share_prompts compares token ids: give input_ids instead of inputs_embeds")
    input_ids, attention_mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"share_prompts needs input_ids, got {type(input_ids).__name__}")
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        raise NotImplementedError("share_prompts makes its own mask: attention_mask must be [N, L] or None")
    for name in _OF_ROWS:
        if given.get(name) is not None and given[name] is not False:
            raise NotImplementedError(f"share_prompts cannot merge rows that come with {name}")
    # PEFT's model takes this argument and hands it to all its layers through hooks, so that no backbone sees it.
    if (adapted := next((m for m in backbone.modules() if "lora_A" in m._modules), None)) is not None:
        for hook in adapted._forward_pre_hooks.values():
            if isinstance(hook, functools.partial) and "adapter_names" in hook.keywords:
                raise NotImplementedError(
                    "share_prompts cannot merge rows that come with adapter_names, one adapter a row; set_adapter() "
                    "takes one for all"
                )
