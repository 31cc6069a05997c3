"""TRL's RewardTrainer honours ``padding_free=True``. Answers of one question are shared, two or more: those of all
pairs in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator

from .padding_free import PaddingFree
from .replacing import Replacement

_PATCH = PaddingFree(
    trainer_module="trl.trainer.reward_trainer",
    trainer="RewardTrainer",
    config_module="trl.trainer.reward_config",
    config="RewardConfig",
    parameters=(
        "self",
        "model",
        "args",
        "data_collator",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "compute_metrics",
        "callbacks",
        "optimizers",
        "optimizer_cls_and_kwargs",
        "preprocess_logits_for_metrics",
        "quantization_config",
        "peft_config",
    ),
    fused_head=False,
)


def replacements() -> Iterator[Replacement]:
    yield from _PATCH.replacements()
