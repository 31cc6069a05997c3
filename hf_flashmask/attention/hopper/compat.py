"""What is called differently in the Triton releases we support, 3.6 to 3.9. All else we use has not changed."""

from triton.experimental.gluon.language.nvidia.hopper import tma

# 3.8 renamed them; the old names are still there and raise.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
