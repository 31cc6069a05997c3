"""The torch.library operators: schema, shapes for tracing, autograd. Imports torch only.

One pair of operators serves every kernel backend; the name asked for is an argument, and which one serves is settled
when the operator runs. A backend is a module with ``forward`` and ``backward`` as in ``torch_blocks``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from hf_flashmask.masks import ColumnMask

from . import key_order
from .backends import choose, choose_backward

_MODULES = {
    "torch": "hf_flashmask.attention.torch_blocks",
    "triton": "hf_flashmask.attention.triton",
    "hopper": "hf_flashmask.attention.hopper",
}


# (q, k, v, sinks) to out; None if it cannot.
Repeat = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor | None]

_library = torch.library.Library("hf_flashmask", "DEF")


def _operator(function: Callable[..., Any]) -> Any:
    """Registers a function that changes none of its arguments as an operator of its name.

    ``torch.library.custom_op`` would do too, but looks for aliases among the results in every call: 0.05 to 0.2 ms.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.hf_flashmask, name).default


@functools.cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(_MODULES[backend])


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The caller chose the dtypes; autocast must not lower the arithmetic inside."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def attention_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: ColumnMask,
    softmax_scale: float,
    softcap: float,
    sinks: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Repeat | None]:
    """``attention`` without the dispatcher, which takes the host as long as a short cache takes the device.

    Only where ``nothing_watches``. Also returns what repeats the call, where it is for few queries.
    """
    module = _module(chosen := choose(backend, q, k, v))
    with _without_autocast(q.device):
        if chosen == "triton" and q.shape[1] <= module.MAX_Q_LEN:
            out, lse, plan = module.start_few(q, k, v, mask, softmax_scale, softcap, sinks)
            return out, lse, None if plan is None else plan.again
        return *module.forward(q, k, v, mask, softmax_scale, softcap, sinks), None


def nothing_watches(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> bool:
    """Whether calling the operator could do no more than run it: no gradient, no tracing, no mode, no transform."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and (sinks is None or type(sinks) in (Tensor, torch.nn.Parameter))
        and q.device.type != "meta"
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._get_tracing_state() is None
    )


def refuse_transforms(*tensors: Tensor | None) -> None:
    """What an operator with a backward of its own would get wrong, or fail at with a word about its inside.

    Raises:
        NotImplementedError: inside ``torch.func.grad`` or ``jvp`` and what is made of them, or an input has a tangent.
    """
    if torch.compiler.is_compiling():
        return
    transforms: set[str] = set()
    if torch._C._functorch.maybe_current_level() is not None:
        transforms = {level.key().name for level in retrieve_all_functorch_interpreters()}
    if "Grad" in transforms:
        raise NotImplementedError(
            "torch.func.grad and what is made of it do not reach flashmask_attention; use torch.autograd.grad, or "
            "backend='reference'"
        )
    tangents = forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
    if tangents or "Jvp" in transforms:
        raise NotImplementedError(
            "flashmask_attention has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); use "
            "backend='reference'"
        )


@_operator
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    sinks: Tensor | None,
    backend: str,
    deterministic: bool,
    sort_keys: bool,
) -> tuple[Tensor, Tensor]:
    mask = ColumnMask(bounds, causal=causal, q_len=q.shape[1])
    if sort_keys:
        mask, k, v, _ = key_order.sort(mask, k, v)
    with _without_autocast(q.device):
        out, lse = _module(choose(backend, q, k, v)).forward(q, k, v, mask, softmax_scale, softcap, sinks)
    return out, lse


@torch.library.register_fake("hf_flashmask::attention", lib=_library)
def _(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, softmax_scale: float, softcap: float,
    sinks: Tensor | None, backend: str, deterministic: bool, sort_keys: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, q_len, heads_q, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, q_len, heads_q, v.shape[-1]), q.new_empty(batch, heads_q, q_len, dtype=lse_dtype)


@_operator
def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    sinks: Tensor | None,
    backend: str,
    deterministic: bool,
    sort_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = ColumnMask(bounds, causal=causal, q_len=q.shape[1])
    if sort_keys:
        mask, k, v, inverse = key_order.sort(mask, k, v)
    with _without_autocast(q.device):
        chosen = choose_backward(backend, q, k, v, deterministic=deterministic)
        dq, dk, dv, dsinks = _module(chosen).backward(do, dlse, q, k, v, out, lse, mask, softmax_scale, softcap, sinks)
    if sort_keys:
        dk, dv = key_order.move(dk, inverse), key_order.move(dv, inverse)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@torch.library.register_fake("hf_flashmask::attention_backward", lib=_library)
def _(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor,
    causal: bool, softmax_scale: float, softcap: float, sinks: Tensor | None, backend: str, deterministic: bool,
    sort_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, ctx.causal, ctx.softmax_scale, ctx.softcap, sinks, *how = inputs
    ctx.how = tuple(how)  # backend, deterministic, sort_keys
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, bounds, sinks)


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, bounds, sinks = ctx.saved_tensors
    if do is None and dlse is None:
        return (None,) * 11
    do = torch.zeros_like(out) if do is None else do
    if dlse is not None:
        # Of a row that sees nothing lse is constant, and what comes for it may be NaN: a loss's 0 times infinity.
        dlse = dlse.masked_fill(lse == -torch.inf, 0.0)
    dq, dk, dv, dsinks = attention_backward(
        do, dlse, q, k, v, out, lse, bounds, ctx.causal, ctx.softmax_scale, ctx.softcap, sinks, *ctx.how,
    )  # fmt: skip
    return dq, dk, dv, None, None, None, None, None if sinks is None else dsinks, None, None, None


def _twice(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "flashmask_attention cannot be differentiated twice; use backend='reference' for second derivatives"
    )


torch.library.register_autograd("hf_flashmask::attention", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("hf_flashmask::attention_backward", _twice, lib=_library)
