"""``flashmask serve ...``: ``transformers serve``, which also takes ``--attn-implementation flashmask``, and does so
unless another is asked for.

Transformers (5.17 to 5.23 read) has a list of the attention names that its server takes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from .naming import NAME


def install() -> None:
    """Let Transformers' server load models with "flashmask". Idempotent."""
    from transformers.cli.serving.model_manager import ModelManager

    stock = ModelManager._validate_args
    if hasattr(stock, "_hf_flashmask"):
        return

    @functools.wraps(stock)
    def _validate_args(self: Any) -> None:
        asked = self.attn_implementation
        if asked == NAME:
            self.attn_implementation = None
        try:
            stock(self)
        finally:
            self.attn_implementation = asked

    _validate_args._hf_flashmask = True  # type: ignore[attr-defined]
    ModelManager._validate_args = _validate_args  # type: ignore[method-assign]


def run(arguments: Sequence[str]) -> None:
    """Serve until interrupted. Arguments are those of ``transformers serve``."""
    from transformers.cli.transformers import app

    install()
    option = "--attn-implementation"
    named = any(argument == option or argument.startswith(option + "=") for argument in arguments)
    app(args=["serve", *arguments, *(() if named else (option, NAME))], prog_name="flashmask")
