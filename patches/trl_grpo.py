"""TRL's GRPOTrainer honours ``padding_free=True``: a prompt is computed once for its group, which a micro-batch keeps
whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from . import whole_groups
from .padding_free import PaddingFree
from .replacing import Replacement

_PATCH = PaddingFree(
    trainer_module="trl.trainer.grpo_trainer",
    trainer="GRPOTrainer",
    config_module="trl.trainer.grpo_config",
    config="GRPOConfig",
    parameters=(
        "self",
        "model",
        "reward_funcs",
        "args",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "reward_processing_classes",
        "callbacks",
        "optimizers",
        "quantization_config",
        "peft_config",
        "tools",
        "rollout_func",
        "environment_factory",
    ),
    fused_head=True,
)


def replacements() -> Iterator[Replacement]:
    yield from _PATCH.replacements()
    module = importlib.import_module(_PATCH.trainer_module)
    yield from whole_groups.replacements(module, getattr(module, _PATCH.trainer))
