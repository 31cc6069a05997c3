"""Completions of one prompt stay in one micro-batch, so that it can share the prompt.

GRPO and RLOO score a generation batch as a whole, then shuffle it row by row and split it into micro-batches
(``_prepare_inputs``, read in TRL 1.16.0), which scatters the completions of a prompt. Here blocks of rows are
shuffled instead: as many rows as divide both a micro-batch and a group, so that a block is of one prompt and in one
micro-batch. As many random numbers are drawn, so that the same seed gives the same completions.

The estimator stays what it is. Advantages are made before the shuffle. Every row is in one micro-batch of the
generation batch, and in any of them with the same probability, as before. Where an optimizer step spans the
generation batch (``gradient_accumulation_steps`` a multiple of ``steps_per_generation``, as is default), its gradient
does not depend on the shuffle at all. Elsewhere only which rows meet in a step changes: siblings do, so that its
expectation is the same over shuffles, and its variance that of sampling prompts rather than rows.

That takes a loss in which a row weighs the same whoever is beside it. Three settings of GRPO put a statistic of the
micro-batch into the loss: "bnpo" and the entropy bonus divide by its number of tokens, ``top_entropy_quantile`` ranks
its tokens. Siblings alone have other statistics than a mixture, which moves the expected gradient, so with these TRL's
own shuffle stays, and a micro-batch shares what siblings it happens to hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .replacing import Replacement, check_parameters

logger = logging.get_logger(__name__)

# Rows that stay together; None where the stock shuffle is wanted.
_block: ContextVar[int | None] = ContextVar("hf_flashmask_block", default=None)


def replacements(module: ModuleType, trainer: type) -> Iterator[Replacement]:
    """For a trainer whose ``_prepare_inputs`` calls ``shuffle_sequence_dict`` of its module.

    Raises:
        RuntimeError: one of them has other parameters than expected.
    """
    prepare, shuffle = trainer._prepare_inputs, module.shuffle_sequence_dict  # type: ignore[attr-defined]
    check_parameters(prepare, ("self", "generation_batch"))
    check_parameters(shuffle, ("seq_dict",))
    yield Replacement(trainer, "_prepare_inputs", _prepare_whole_groups(prepare))
    yield Replacement(module, "shuffle_sequence_dict", _shuffle_whole_groups(shuffle))


def _prepare_whole_groups(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def _prepare_inputs(self: Any, generation_batch: Any) -> Any:
        if not getattr(self, "shared_prompts", ()):
            return stock(self, generation_batch)
        if (setting := _uses_batch_statistics(self)) is not None:
            logger.warning_once(
                "padding_free=True: completions of a prompt are not kept in one micro-batch, because %s puts "
                "statistics of the micro-batch into the loss; fewer prompts are shared, results are those of TRL",
                setting,
            )
            return stock(self, generation_batch)
        token = _block.set(math.gcd(self.args.per_device_train_batch_size, self.num_generations))
        try:
            return stock(self, generation_batch)
        finally:
            _block.reset(token)

    return _prepare_inputs


def _uses_batch_statistics(trainer: Any) -> str | None:
    """The setting by which the loss of a row depends on the other rows of its micro-batch, if there is one."""
    if getattr(trainer, "loss_type", None) == "bnpo":
        return "loss_type='bnpo'"
    if getattr(trainer, "top_entropy_quantile", 1.0) < 1.0:
        return f"top_entropy_quantile={trainer.top_entropy_quantile}"
    if getattr(trainer, "_entropy_bonus_enabled", False):
        return "the entropy bonus (entropy_coef or use_adaptive_entropy)"
    return None


def _shuffle_whole_groups(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def shuffle_sequence_dict(seq_dict: dict[str, Any]) -> dict[str, Any]:
        block = _block.get()
        return stock(seq_dict) if block is None else shuffle_blocks(seq_dict, block)

    return shuffle_sequence_dict


def shuffle_blocks(batch: dict[str, Any], block: int) -> dict[str, Any]:
    """Shuffle blocks of consecutive rows of all values alike. Values without rows (None, 0-d tensors) stay.

    Raises:
        ValueError: the number of rows is not a multiple of ``block``.
    """
    rows = next(len(v) for v in batch.values() if not _has_no_rows(v))
    if rows % block:
        raise ValueError(f"batch must have a multiple of {block} rows, got {rows}")
    drawn = torch.randperm(rows)  # as the stock shuffle: what is drawn later, completions too, stays as it was
    order = (drawn[drawn % block == 0][:, None] + torch.arange(block)).flatten()

    def permuted(value: Any) -> Any:
        if _has_no_rows(value):
            return value
        return value[order] if isinstance(value, Tensor) else [value[i] for i in order.tolist()]

    return {name: permuted(value) for name, value in batch.items()}


def _has_no_rows(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and value.ndim == 0)
