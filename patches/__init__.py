"""What hf-flashmask changes in other libraries: one module per target, opt-in, idempotent and reversible.

Installed as ``hf_flashmask.patches``. ``enable()`` gives TRL's stock ``DPOTrainer``, ``RewardTrainer``,
``KTOTrainer``, ``GRPOTrainer`` and ``RLOOTrainer`` one flag, ``padding_free=True`` in their configs: rows that begin
alike are computed once (``hf_flashmask.share_prompts``), by the policy and by whatever is the reference. ``trl``'s
command line starts its scripts with the patches in place. Without the flag the trainers are TRL's own.
"""

from .enabling import disable, enable, enabled

__all__ = ["disable", "enable", "enabled"]
