"""What hf-flashmask changes in other libraries: one module per target, opt-in, idempotent and reversible.

Installed as ``hf_flashmask.patches``. No library needs a patch so far: ``import hf_flashmask`` registers
``attn_implementation="flashmask"``, and TRL's packed SFT works as it is.
"""
