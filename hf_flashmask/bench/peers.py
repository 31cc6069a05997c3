"""What the kernel benchmark compares: ours, FlexAttention, sdpa, and plugins.

A plugin is a Python file with ``PEERS = {name: make}``. ``make(case)`` takes a ``KernelCase`` and returns a ``Peer``,
or None where the kernel has no such mask.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_flashmask.attention import flashmask_attention, key_order
from hf_flashmask.masks import ColumnMask

from .kernel_masks import KernelMask, MaskMod
from .records import Refusal, check_known

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class KernelCase:
    """One mask at one shape."""

    spec: KernelMask
    mask: ColumnMask  # on the device of q
    q: Tensor  # [B, S, H, D], as k, v and do
    k: Tensor
    v: Tensor
    do: Tensor
    backend: str = "triton"  # of ours

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def seq_len(self) -> int:
        return self.q.shape[1]

    @functools.cached_property
    def mask_mod(self) -> MaskMod:
        return self.spec.mask_mod(self.q.device)

    @functools.cached_property
    def heads_first(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, do as ``[B, H, S, D]``, contiguous."""
        q, k, v, do = (t.transpose(1, 2).contiguous() for t in (self.q, self.k, self.v, self.do))
        return q, k, v, do


class Peer(Protocol):
    """A kernel that has been given its inputs. Results are ``[B, S, H, D]``, views if need be.

    May also have ``prepare()``, which makes anew all that a kernel needs of a mask and is timed apart; ``mask_bytes``,
    the memory of that and of the mask itself; and ``before_bwd()``, called before every ``bwd()`` and not timed.
    """

    def fwd(self) -> Tensor: ...

    def bwd(self) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv, from a forward that has run before."""
        ...


Make = Callable[[KernelCase], Peer | None]


class Autograd:
    """Forward and backward of a differentiable function, each alone. The forward saves what training saves."""

    mask_bytes: int | None = None

    def __init__(
        self, attend: Attend, inputs: Sequence[Tensor], do: Tensor, *, heads_first: bool = False, retain: bool = True
    ) -> None:
        """
        Args:
            heads_first: ``attend`` takes and gives ``[B, H, S, D]``.
            retain: one forward serves every backward; False for functions whose backward uses up what was saved.
        """
        self._attend = attend
        self._q, self._k, self._v = (t.detach().requires_grad_() for t in inputs)
        self._do = do
        self._heads_first = heads_first
        self._retain = retain
        self._out: Tensor | None = None

    def _layout(self, t: Tensor) -> Tensor:
        return t.transpose(1, 2) if self._heads_first else t

    def fwd(self) -> Tensor:
        return self._layout(self._attend(self._q, self._k, self._v).detach())

    def before_bwd(self) -> None:
        """The forward of the next backward, unless there is one."""
        self._forward()

    def _forward(self) -> Tensor:
        if self._out is None:
            self._out = self._attend(self._q, self._k, self._v)
        return self._out

    def bwd(self) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (self._q, self._k, self._v)
        dq, dk, dv = torch.autograd.grad(self._forward(), inputs, self._do, retain_graph=self._retain)
        if not self._retain:
            self._out = None
        return self._layout(dq), self._layout(dk), self._layout(dv)


class Ours(Autograd):
    def __init__(self, case: KernelCase, sort_keys: bool = False) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flashmask_attention(q, k, v, case.mask, sort_keys=sort_keys, backend=case.backend)

        super().__init__(attend, (case.q, case.k, case.v), case.do)
        self.mask_bytes = _nbytes([case.mask.bounds])
        self.prepare: Callable[[], Any] | None = None
        if case.backend in ("triton", "hopper"):
            module = importlib.import_module(f"hf_flashmask.attention.{case.backend}")

            def prepare() -> int:
                # Bounds of its own every time: what was planned for some bounds is remembered.
                fresh = ColumnMask(case.mask.bounds.view_as(case.mask.bounds), causal=case.mask.causal)
                if sort_keys:
                    fresh = key_order.find(fresh).mask
                size: int = module.plan_bytes(fresh, case.q.shape[3], case.v.shape[3], case.q.dtype)
                return size

            self.prepare = prepare
            self.mask_bytes += prepare()


class Flex(Autograd):
    """FlexAttention, compiled for this shape and this mask; its block mask too."""

    def __init__(self, case: KernelCase) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()  # the limit on recompilations counts over all masks; beyond it there is no kernel
        create = torch.compile(create_block_mask, dynamic=False)
        compiled = torch.compile(flex_attention, dynamic=False)

        def prepare() -> Any:
            return create(case.mask_mod, None, None, case.seq_len, case.seq_len, device=case.q.device)

        block_mask = prepare()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return compiled(q, k, v, block_mask=block_mask)

        *inputs, do = case.heads_first
        # A compiled backward writes over tensors that the forward saved.
        super().__init__(attend, inputs, do, heads_first=True, retain=False)
        self.prepare = prepare
        self.mask_bytes = _nbytes([*block_mask.as_tuple(), *case.spec.tensors.values()])


class Sdpa(Autograd):
    """PyTorch's own attention, forced to one of its kernels."""

    def __init__(self, case: KernelCase, kernel: str) -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend, is_causal = getattr(SDPBackend, kernel), case.spec.is_causal

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=bool(is_causal))

        *inputs, do = case.heads_first
        super().__init__(attend, inputs, do, heads_first=True)


def _sdpa(kernel: str, case: KernelCase) -> Peer | None:
    return None if case.spec.is_causal is None else Sdpa(case, kernel)


def _nbytes(parts: Sequence[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in parts if isinstance(t, Tensor))


def _on_hopper(make: Make, case: KernelCase) -> Peer | None:
    """The same through Hopper's own kernels; none on other devices."""
    hopper = case.q.device.type == "cuda" and torch.cuda.get_device_capability(case.q.device) == (9, 0)
    return make(dataclasses.replace(case, backend="hopper")) if hopper else None


def _sorted(case: KernelCase) -> Peer | None:
    """Ours with sorted keys, moving them included; none of masks of which that hides no more tiles."""
    before, after = (mask.tile_sparsity() for mask in (case.mask, key_order.find(case.mask).mask))
    return Ours(case, sort_keys=True) if after > before else None


BUILT_IN: dict[str, Make] = {
    "flashmask": Ours,
    "flashmask_sorted": _sorted,
    "flashmask_hopper": functools.partial(_on_hopper, Ours),
    "flashmask_hopper_sorted": functools.partial(_on_hopper, _sorted),
    "flex": Flex,
    "sdpa_flash": functools.partial(_sdpa, "FLASH_ATTENTION"),
    "sdpa_cudnn": functools.partial(_sdpa, "CUDNN_ATTENTION"),
}


def load(plugins: Sequence[Path] = (), names: Sequence[str] | None = None) -> dict[str, Make]:
    """The built-in peers and those of plugin files; only ``names``, where given.

    Raises:
        Refusal: a plugin has no PEERS or takes a name that is taken, or there is no peer of a name.
    """
    peers = dict(BUILT_IN)
    for number, path in enumerate(plugins):
        spec = importlib.util.spec_from_file_location(f"flashmask_bench_plugin_{number}", path)
        if spec is None or spec.loader is None or not path.exists():
            raise Refusal(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = getattr(module, "PEERS", None)
        if not isinstance(found, dict) or not found:
            raise Refusal(f"{path} must define PEERS = {{name: make}}")
        if taken := sorted(found.keys() & peers.keys()):
            raise Refusal(f"{path} defines peers that there are already: {', '.join(taken)}")
        peers |= found
    if names is None:
        return peers
    check_known("peers", names, peers)
    return {name: peers[name] for name in names}
