"""A pytest plugin: TRL's tests with our attention, or with our attention and shared prompts; every result recorded.

Given to pytest as ``-p hf_flashmask.coverage.upstream_trl.plugin --judge MODE --judge-out FILE``, in the folder that
``standins`` filled. Losses of all training steps are recorded too, since these tests mostly ask whether parameters
moved. Everything is put back when pytest ends.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

STOCK, ATTENTION, SHARED = MODES = ("stock", "attention", "shared")
TRAINERS = ("DPO", "Reward", "KTO", "GRPO", "RLOO")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("judge", "TRL's tests as a judge of hf-flashmask")
    group.addoption("--judge", choices=MODES, help="whose attention, and whether trainers share prompts")
    group.addoption("--judge-out", type=Path, help="file that gets a line of JSON for every test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--judge"):
        config.pluginmanager.register(Judge(config.getoption("--judge"), config.getoption("--judge-out")), "judge")


class Judge:
    def __init__(self, mode: str, out: Path) -> None:
        self._mode = mode
        self._out = out
        self._undo: list[Any] = []
        self._result: dict[str, Any] = {}
        self._step_loss = 0.0

    # ---- before and after all tests ----

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        from transformers import Trainer
        from trl.trainer.base_config import _BaseConfig

        import hf_flashmask  # noqa: F401  (registers "flashmask")

        self._replace(Trainer, "training_step", self._recording(Trainer.training_step))
        self._replace(_BaseConfig, "__post_init__", _in_float32(_BaseConfig.__post_init__))
        if self._mode != STOCK:
            self._take_attention()
        if self._mode == SHARED:
            self._share_prompts()

    def pytest_sessionfinish(self) -> None:
        while self._undo:
            self._undo.pop().stop()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        patcher = mock.patch.object(owner, name, value, create=True)
        patcher.start()
        self._undo.append(patcher)

    def _take_attention(self) -> None:
        """Models that ask for sdpa or for nothing get flashmask, if it can serve them."""
        from transformers import AttentionInterface, PreTrainedModel

        from hf_flashmask.huggingface import NAME, naming
        from hf_flashmask.huggingface.attention import flashmask_attention_forward

        stock = PreTrainedModel.get_correct_attn_implementation

        @functools.wraps(stock)
        def get_correct_attn_implementation(model: Any, requested: str | None, *args: Any, **kwargs: Any) -> str:
            if requested in (None, "sdpa") and naming.unsupported(type(model)) is None:
                requested = NAME
            return stock(model, requested, *args, **kwargs)

        @functools.wraps(flashmask_attention_forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._result["calls"] = self._result.get("calls", 0) + 1
            return flashmask_attention_forward(*args, **kwargs)

        self._replace(PreTrainedModel, "get_correct_attn_implementation", get_correct_attn_implementation)
        AttentionInterface.register(NAME, counted)
        self._undo.append(_Call(lambda: AttentionInterface.register(NAME, flashmask_attention_forward)))

    def _share_prompts(self) -> None:
        """The five trainers, all with padding_free=True where a test does not say otherwise."""
        from hf_flashmask import patches

        patches.enable()
        self._undo.append(_Call(patches.disable))
        for name in TRAINERS:
            config = getattr(importlib.import_module(f"trl.trainer.{name.lower()}_config"), f"{name}Config")
            self._replace(config, "__init__", _padding_free(config.__init__))
            trainer = getattr(importlib.import_module(f"trl.trainer.{name.lower()}_trainer"), f"{name}Trainer")
            self._replace(trainer, "__init__", self._keeping_handles(trainer.__init__))

    def _keeping_handles(self, stock: Any) -> Any:
        @functools.wraps(stock)
        def __init__(trainer: Any, *args: Any, **kwargs: Any) -> None:
            stock(trainer, *args, **kwargs)
            self._result.setdefault("handles", []).extend(getattr(trainer, "shared_prompts", ()))

        return __init__

    def _recording(self, stock: Any) -> Any:
        """Micro-batches of a step are added up: with shared prompts GRPO and RLOO put other rows into each of them."""

        @functools.wraps(stock)
        def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            loss = stock(trainer, *args, **kwargs)
            self._step_loss += float(loss)
            if trainer.accelerator.sync_gradients:
                self._result["losses"].append(self._step_loss)
                self._step_loss = 0.0
            return loss

        return training_step

    # ---- each file, each test ----

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makemodule(self, module_path: Path) -> None:
        for source in (module_path.parent / "testing_utils.py", module_path):
            if source.is_file():
                for module, name in _imported_from_trl(source.read_text(encoding="utf-8")):
                    if not hasattr(module, name):
                        self._replace(module, name, _absent(module.__name__, name))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """An interrupted run goes on after the last test that it recorded."""
        if self._out.exists():
            recorded = {json.loads(line)["test"] for line in self._out.read_text(encoding="utf-8").splitlines()}
            items[:] = [item for item in items if _test_name(item) not in recorded]
        for item in items:
            if (missing := _without_stand_in(item)) is not None:
                item.add_marker(pytest.mark.skip(reason=f"no stand-in: {missing}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        import numpy
        import torch

        self._result = {"test": _test_name(item), "outcome": "passed", "message": "", "losses": []}
        self._step_loss = 0.0
        random.seed(0)
        numpy.random.seed(0)  # noqa: NPY002 (what the tests themselves may draw from)
        torch.manual_seed(0)
        result = yield
        handles = self._result.pop("handles", [])
        self._result["shared"] = any(0 < h.merged_tokens < h.rows_tokens for h in handles)
        with self._out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(self._result) + "\n")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed" and self._result.get("outcome") == "passed":
            self._result["outcome"] = report.outcome
            if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                self._result["message"] = report.longrepr[2]
            else:
                crash = getattr(report.longrepr, "reprcrash", None)
                self._result["message"] = crash.message if crash is not None else str(report.longrepr)[-500:]


class _Call:
    """Something to call in the end, beside patchers."""

    def __init__(self, stop: Any) -> None:
        self.stop = stop


def _in_float32(stock: Any) -> Any:
    """TRL trains in bfloat16 unless told otherwise, whose rounding would hide what we look for."""

    @functools.wraps(stock)
    def __post_init__(config: Any) -> None:
        if config.bf16 is None:
            config.bf16 = False
        stock(config)

    return __post_init__


def _padding_free(stock: Any) -> Any:
    @functools.wraps(stock)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("padding_free", True)
        stock(self, *args, **kwargs)

    return __init__


def _imported_from_trl(source: str) -> Iterator[tuple[Any, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl":
            try:
                module = importlib.import_module(str(node.module))
            except ImportError:  # the test's own import says so
                continue
            for alias in node.names:
                yield module, alias.name


def _absent(module: str, name: str) -> Any:
    """What a test of another release imports and the installed one lacks: a test that uses it is skipped."""

    def absent(*_: Any, **__: Any) -> Any:
        if name.startswith("is_") and name.endswith("_available"):
            return False
        pytest.skip(f"the installed TRL has no {module}.{name}")

    return absent


def _test_name(item: pytest.Item) -> str:
    return f"{item.path.name}::{item.nodeid.split('::', 1)[1]}"


def _without_stand_in(item: pytest.Item) -> str | None:
    """What a test wants that nothing stands in for: models that see, images, code from the hub."""
    function = getattr(item, "function", None)
    if function is None:
        return None
    source = inspect.getsource(function)
    body = source[source.index("def ") :] + str(getattr(getattr(item, "callspec", None), "params", ""))
    for name in ("ForConditionalGeneration", "zen-image", "zen-multi-image", "tiny-RemoteForCausalLM"):
        if name in body:
            return name
    return None
