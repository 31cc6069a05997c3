"""A pytest plugin for Transformers' own tests: "sdpa" is flashmask, and what came of every test is written to a file.

``python -m pytest -p hf_flashmask.coverage.upstream_plugin --flashmask-as-sdpa tests/models/llama`` in a checkout of
Transformers; ``flashmask check --transformers-tests`` runs it with and without and compares.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .outcome import origin, ours, sentence

if TYPE_CHECKING:
    from torch import Tensor

# Whether the test under way has called flashmask's attention.
_reached = {"now": False}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flashmask")
    group.addoption("--flashmask-as-sdpa", action="store_true", help='register flashmask under the name "sdpa"')
    group.addoption("--flashmask-outcomes", type=Path, metavar="FILE", help="append a JSON line a test to this file")


def pytest_configure(config: pytest.Config) -> None:
    # Not earlier: the checkout's conftest decides which Transformers is imported.
    if config.getoption("--flashmask-as-sdpa"):
        _register(_flashmask_mask())


def _flashmask_mask() -> Any:
    from hf_flashmask.huggingface.masking import flashmask_mask

    return flashmask_mask


def _register(mask: Any) -> None:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    import hf_flashmask.huggingface
    from hf_flashmask.huggingface.attention import flashmask_attention_forward

    @functools.wraps(flashmask_attention_forward)
    def attention(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _reached["now"] = True
        return flashmask_attention_forward(*args, **kwargs)

    hf_flashmask.huggingface.register()
    AttentionInterface.register("sdpa", attention)
    AttentionMaskInterface.register("sdpa", mask)


@pytest.fixture(autouse=True)
def _masks_that_tests_look_into(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of masks compare tensors, so they are shown our masks as tensors."""
    if not request.config.getoption("--flashmask-as-sdpa") or request.path.name != "test_masking_utils.py":
        yield
        return
    import torch

    stock = _flashmask_mask()

    def dense(*, batch_size: int, **kwargs: Any) -> Tensor:
        return shown(stock(batch_size=batch_size, **kwargs), batch_size)

    @torch.compiler.disable  # what compiled tests compile is the making of masks
    def shown(mask: Any, batch_size: int) -> Tensor:
        return mask.to_dense().expand(batch_size, -1, -1, -1)

    _register(dense)
    yield
    _register(stock)


def pytest_runtest_setup() -> None:
    _reached["now"] = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    path = item.config.getoption("--flashmask-outcomes")
    failed = report.outcome == "failed"
    if path is not None and (report.when == "call" or report.outcome != "passed"):
        line = {
            "test": item.nodeid,
            "outcome": report.outcome,
            "refused": False,
            "reason": "",
            "reached": _reached["now"],
        }
        if failed and call.excinfo is not None:
            error = call.excinfo.value
            line["refused"] = ours(error)
            line["reason"] = f"{type(error).__name__}: {sentence(error)}" + (
                "" if ours(error) else f" ({origin(error)})"
            )
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return report
