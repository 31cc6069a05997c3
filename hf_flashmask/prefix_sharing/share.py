"""share_prompts(model): a decoder that computes what its rows begin with once, whoever calls it."""

from __future__ import annotations

import functools
import inspect
import types
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from hf_flashmask.huggingface.tree_mask import TreeMask, TreeRows

from .merge import merge_rows
from .verify import compare

_RECURRENT = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase)
_ATTENTION = ("full_attention", "sliding_attention")


class SharedPrompts:
    """What ``share_prompts`` returns: undone by ``undo()``, or at the end of a ``with`` block.

    ``rows_tokens`` counts the tokens of the rows seen so far, padding left out, ``merged_tokens`` those computed.
    """

    def __init__(self, backbone: Any, unverified: bool = False) -> None:
        self._backbone = backbone
        # A bound method (which deepcopy binds to the copy), or what another library put on the instance.
        self._stock = backbone.forward
        self._on_instance = "forward" in backbone.__dict__
        self._signature = inspect.signature(self._stock)
        parameters = self._signature.parameters.values()
        self._others = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), "")
        self._unverified = unverified
        self.rows_tokens = 0
        self.merged_tokens = 0

    def undo(self) -> None:
        """The stock forward again. Does nothing the second time."""
        if self._backbone.__dict__.get("_hf_flashmask_shared") is self:
            del self._backbone.forward, self._backbone._hf_flashmask_shared
            if self._on_instance:
                self._backbone.forward = self._stock

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stock = self._stock
        given = dict(self._signature.bind(*args, **kwargs).arguments)
        given |= given.pop(self._others, {})
        if given.get("past_key_values") is not None or given.get("use_cache"):
            return stock(*args, **kwargs)
        if self._unverified:
            self._unverified = False
            compare(self._backbone, lambda: stock(*args, **kwargs), lambda: _run_merged(None, stock, given), given)
        return _run_merged(self, stock, given)

    def __enter__(self) -> SharedPrompts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def share_prompts(model: nn.Module, *, verify: str | None = None) -> SharedPrompts:
    """Let a decoder-only model compute what rows of a batch have in common at their beginning once.

    DPO pairs, reward candidates, GRPO groups and conversations repeat their prompts; results and gradients are those of
    the stock model up to rounding, and everything above the backbone (heads, losses, trainers, reference models) stays
    as it is. Dropout, where a model has any, falls on a prompt once too. Calls with a cache, as in ``generate``, run as
    before. Works in place on the backbone; calling it again returns the handle that there is.

    Args:
        model: a Transformers model with ``attn_implementation="flashmask"``, or a PEFT model or
            ``DistributedDataParallel`` around one; before or after FSDP2's ``fully_shard``.
        verify: "first" runs the first batch both ways, without dropout, and compares hidden states and, where gradients
            are on, the gradient of every trained parameter. Costs two forwards and two backwards once.

    Raises:
        TypeError, ValueError, NotImplementedError: the model's rows cannot be merged, and why.
        RuntimeError: from the first batch, with a table, if ``verify`` finds a difference beyond rounding.
    """
    if verify not in (None, "first"):
        raise ValueError(f'verify must be "first" or None, got {verify!r}')
    backbone = _backbone(model)
    existing: SharedPrompts | None = backbone.__dict__.get("_hf_flashmask_shared")
    if existing is not None:
        return existing
    _check(backbone)
    shared = SharedPrompts(backbone, unverified=verify is not None)

    @functools.wraps(type(backbone).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._hf_flashmask_shared._forward(args, kwargs)

    # A method, so that a deep copy of the model computes with the copy's parameters.
    backbone.forward = types.MethodType(forward, backbone)
    backbone._hf_flashmask_shared = shared
    return shared


def _backbone(model: Any) -> Any:
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
            if getattr(config, "is_prompt_learning", False):
                raise NotImplementedError(
                    f"adapter {name!r} puts learned tokens before every row, which merged rows cannot have"
                )
        # A model that PEFT put adapters into has a peft_config too, and is its own base.
        whole = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    backbone = getattr(whole, getattr(whole, "base_model_prefix", ""), whole)
    if not isinstance(backbone, nn.Module) or not hasattr(backbone, "config"):
        raise TypeError(f"{type(model).__name__} has no backbone that Transformers knows of")
    return backbone


def _check(backbone: Any) -> None:
    name, config = type(backbone).__name__, backbone.config
    implementation = config._attn_implementation
    if implementation != "flashmask":
        raise ValueError(
            f"{name} has attn_implementation={implementation!r}; prompts are shared by masks of 'flashmask': "
            "model.set_attn_implementation('flashmask')"
        )
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
    if other := set(getattr(config, "layer_types", None) or _ATTENTION) - set(_ATTENTION):
        raise NotImplementedError(
            f"{name} has layers of {', '.join(sorted(other))}, which would mix tokens of other branches of the tree"
        )
    for path, module in backbone.named_modules():
        if isinstance(module, _RECURRENT) or "Mamba" in type(module).__name__:
            raise NotImplementedError(f"{name} mixes neighbouring tokens in {path} ({type(module).__name__})")
        if "Positional" in type(module).__name__ and "attention_mask" in inspect.signature(module.forward).parameters:
            raise NotImplementedError(f"{name} counts positions from the attention mask in {path}")


def _run_merged(shared: SharedPrompts | None, stock: Any, given: dict[str, Any]) -> Any:
    if given.get("inputs_embeds") is not None:
        raise NotImplementedError("share_prompts compares token ids: give input_ids instead of inputs_embeds")
    input_ids, attention_mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"share_prompts needs input_ids, got {type(input_ids).__name__}")
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        raise NotImplementedError("share_prompts makes its own mask: attention_mask must be [N, L] or None")
    for name in ("token_type_ids", "cu_seq_lens_q", "output_attentions", "output_router_logits"):
        if given.get(name) is not None and given[name] is not False:
            raise NotImplementedError(f"share_prompts cannot merge rows that come with {name}")
    rows = merge_rows(input_ids, attention_mask, given.get("position_ids"))
    if shared is not None:
        shared.merged_tokens += rows.input_ids.shape[1]
        shared.rows_tokens += rows.rows_tokens
    out = stock(
        **{
            **given,
            "input_ids": rows.input_ids,
            "attention_mask": TreeMask(rows.mask.bounds, causal=True, tree_rows=TreeRows(rows.places, rows.real)),
            "position_ids": rows.position_ids,
            "use_cache": False,
        }
    )
    if isinstance(out, tuple):
        return (rows.restore(out[0]), *out[1:])
    out.last_hidden_state = rows.restore(out.last_hidden_state)
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(rows.restore(h) for h in out.hidden_states)
    return out
