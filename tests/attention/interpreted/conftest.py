"""Tests that run in Triton's interpreter, on small tiles: started by ../test_triton_interpreter.py.

The interpreter has to be chosen before kernels are imported, and for a whole process, so without it there is nothing to
collect here. By hand: ``TRITON_INTERPRET=1 python -m pytest tests/attention/interpreted``.
"""

import os

import pytest

from tests.attention.triton_checks import poison

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


@pytest.fixture
def kernels(monkeypatch):
    """``kernels(**options)`` sets the configuration of all kernels, and ``forward=``, ``dq=``, ``dkdv=`` of one."""
    from hf_flashmask.attention.triton import configs, launch

    monkeypatch.setattr(launch, "BOUNDS_BLOCK", 32)

    def use(block_m=16, block_n=16, *, tma=False, merge=False, in_registers=False, **shapes):
        def candidates(kernel, *_):
            return [configs.Config(*shapes.get(kernel, (block_m, block_n)), 4, 2, 2, merge, in_registers)]

        monkeypatch.setattr(configs, "candidates", candidates)
        monkeypatch.setattr(configs, "uses_tma", lambda *args: tma)

    use()
    return use
