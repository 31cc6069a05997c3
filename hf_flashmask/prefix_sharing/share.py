"""share_prompts(model): a decoder that computes what its rows begin with once, whoever calls it."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from types import TracebackType
from typing import Any

from torch import nn

from .run import reads_last_position, run_merged
from .supported import check_call, check_model, find_backbone, has_cache
from .verify import compare


class SharedPrompts:
    """What ``share_prompts`` returns: undone by ``undo()``, or at the end of a ``with`` block.

    ``rows_tokens`` counts the tokens of the rows seen so far, padding left out, ``merged_tokens`` those computed.
    """

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        # A bound method (which deepcopy binds to the copy), or what another library put on the instance.
        self._stock = backbone.forward
        self._on_instance = "forward" in backbone.__dict__
        self._signature = inspect.signature(self._stock)
        parameters = self._signature.parameters.values()
        self._others = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), "")
        self._last_position = reads_last_position(backbone)
        self._unverified = False
        self._holders = 0
        self.rows_tokens = 0
        self.merged_tokens = 0

    def undo(self) -> None:
        """The stock forward again, whoever else asked to share. Does nothing the second time."""
        if self._backbone.__dict__.get("_hf_flashmask_shared") is self:
            del self._backbone.forward, self._backbone._hf_flashmask_shared
            if self._on_instance:
                self._backbone.forward = self._stock

    def release(self) -> None:
        """Take back one call of ``share_prompts``; the last of them undoes it."""
        self._holders -= 1
        if self._holders <= 0:
            self.undo()

    def _hold(self, verify: bool) -> SharedPrompts:
        self._holders += 1
        self._unverified |= verify
        return self

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stock = self._stock
        given = dict(self._signature.bind(*args, **kwargs).arguments)
        given |= given.pop(self._others, {})
        if has_cache(given):
            return stock(*args, **kwargs)
        check_call(self._backbone, given)
        merged = functools.partial(run_merged, self._backbone, stock, given, self._last_position)
        if self._unverified:
            compare(self._backbone, lambda: stock(*args, **kwargs), lambda: merged()[0], given)
            self._unverified = False  # not before: a call that fails has shown nothing
        out, rows_tokens, merged_tokens = merged()
        self.rows_tokens += rows_tokens
        self.merged_tokens += merged_tokens
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedPrompts:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle saves a method by its name, which finds the class's own when it is loaded: no prompts are shared there.
        return type(None), ()

    def __enter__(self) -> SharedPrompts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def share_prompts(model: nn.Module, *, verify: str | None = None) -> SharedPrompts:
    """Let a decoder-only model compute what rows of a batch have in common at their beginning once.

    DPO pairs, reward candidates, GRPO groups and conversations repeat their prompts; results and gradients are those of
    the stock model up to rounding, and everything above the backbone (heads, losses, trainers, reference models) stays
    as it is. Dropout and NEFTune's noise, where a model has any, fall on a prompt once too. Calls with a cache, as in
    ``generate``, run as before. Works in place on the backbone; calling it again returns the handle that there is, and
    the end of a ``with`` block leaves the model shared if it was before. A deep copy of the model shares prompts too; a
    pickle of it, as ``torch.save(model, ...)`` makes, does not.

    Args:
        model: a Transformers model with ``attn_implementation="flashmask"``, or a PEFT model or
            ``DistributedDataParallel`` around one; before or after FSDP2's ``fully_shard``.
        verify: "first" runs the first batch both ways, without dropout, and compares hidden states and, where gradients
            are on, the gradient of every trained parameter. Costs two forwards and two backwards once. A call
            that fails does not count as the first.

    Raises:
        TypeError, ValueError, NotImplementedError: the model's rows cannot be merged, and why.
        RuntimeError: from the first batch, with a table, if ``verify`` finds a difference beyond rounding.
    """
    if verify not in (None, "first"):
        raise ValueError(f'verify must be "first" or None, got {verify!r}')
    backbone = find_backbone(model)
    existing: SharedPrompts | None = backbone.__dict__.get("_hf_flashmask_shared")
    if existing is not None:
        return existing._hold(verify is not None)
    check_model(backbone)
    shared = SharedPrompts(backbone)

    @functools.wraps(type(backbone).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._hf_flashmask_shared._forward(args, kwargs)

    # A method, so that a deep copy of the model computes with the copy's parameters.
    backbone.forward = types.MethodType(forward, backbone)
    backbone._hf_flashmask_shared = shared
    return shared._hold(verify is not None)
