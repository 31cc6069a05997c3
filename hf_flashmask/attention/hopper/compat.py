"""What is called differently in the Triton releases we support, 3.6 to 3.9. All else we use has not changed."""

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# 3.8 renamed them; the old names are still there and raise.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@builtin
def _tma_add(desc, coord, src, _semantic=None):
    """The operation has been there since 3.6, a name for it since 3.8."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


tma_add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _tma_add


@builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):
    """Shared memory as another type; a public method since 3.9."""
    method = memory.reinterpret if hasattr(memory, "reinterpret") else memory._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)
