"""How masked attention is computed: one checked entry point, several backends."""

from .api import flashmask_attention
from .backends import BACKENDS

__all__ = ["BACKENDS", "flashmask_attention"]
