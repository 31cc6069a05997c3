"""How masked attention is computed: one checked entry point, several backends."""

from .api import BACKENDS, flashmask_attention

__all__ = ["BACKENDS", "flashmask_attention"]
