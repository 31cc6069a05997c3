"""One batch with and without shared prompts, compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Largest relative difference of a tensor that rounding explains, by its dtype.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SHOWN = 10


def compare(backbone: nn.Module, stock: Callable[[], Any], merged: Callable[[], Any], given: dict[str, Any]) -> None:
    """Run both in eval mode and compare hidden states of real tokens, and gradients where they are on.

    The gradients are those of the product with a fixed random tensor.

    Raises:
        RuntimeError: they differ by more than rounding, with the tensors that differ most.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        backbone.eval()
        expected, actual = (_hidden(run()) for run in (stock, merged))
    finally:
        for module, training in modes:
            module.training = training
    attention_mask = given.get("attention_mask")
    padding = torch.zeros_like(expected[..., 0]) if attention_mask is None else attention_mask == 0
    expected, actual = (h.masked_fill(padding.bool().unsqueeze(-1), 0) for h in (expected, actual))
    pairs = {"hidden states": (actual, expected)}
    parameters = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
    if expected.requires_grad and parameters:
        generator = torch.Generator(expected.device).manual_seed(0)
        weights = torch.randn(expected.shape, generator=generator, device=expected.device, dtype=expected.dtype)
        ours, theirs = (_grads(h, weights, parameters) for h in (actual, expected))
        for name, a, b in zip(parameters, ours, theirs, strict=True):
            pairs[f"gradient of {name}"] = (a, b)
    differences = {name: _relative(*pair) for name, pair in pairs.items()}
    tolerance = _TOLERANCE[expected.dtype]
    # NaN compares false.
    wrong = sorted((name for name, x in differences.items() if not x <= tolerance), key=lambda n: -differences[n])
    if wrong:
        table = "\n".join(f"  {differences[name]:.2e}  {name}" for name in wrong[:_SHOWN])
        raise RuntimeError(
            f"sharing prompts changes {type(backbone).__name__}'s results beyond the rounding of {expected.dtype} "
            f"({tolerance:.0e} relative) in {len(wrong)} of {len(differences)} tensors:\n{table}\n"
            "this model must be run without share_prompts"
        )


def _hidden(out: Any) -> Tensor:
    hidden: Tensor = out[0] if isinstance(out, tuple) else out.last_hidden_state
    return hidden


def _grads(hidden: Tensor, weights: Tensor, parameters: dict[str, nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad((hidden * weights).sum(), list(parameters.values()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters.values(), strict=True)]


def _relative(actual: Tensor, expected: Tensor) -> float:
    scale = max(float(expected.detach().float().norm()), 1e-6 * expected.numel() ** 0.5)
    return float((actual.detach().float() - expected.detach().float()).norm()) / scale
