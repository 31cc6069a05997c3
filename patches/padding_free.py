"""``padding_free=True`` for a trainer of TRL: its config takes the flag, its models share prompts.

Read in TRL 1.16.0. There the flag exists in DPOConfig, whose trainer warns and pads all the same, and in SFTConfig,
which needs no patch. This can go when TRL's trainers merge rows that begin alike themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_flashmask.prefix_sharing import SharedPrompts, share_prompts
from hf_flashmask.prefix_sharing.supported import adapter_obstacle

from .replacing import Replacement, check_parameters

_HELP = (
    "Whether to compute what rows of a batch begin with once, without padding. Needs attn_implementation='flashmask'."
)
_FUSED_HEAD = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")
# The models that the trainer under construction has been given or has made, in shared form; None outside of one.
_sharing: ContextVar[list[SharedPrompts] | None] = ContextVar("hf_flashmask_padding_free", default=None)


@dataclass(frozen=True)
class PaddingFree:
    """Where a trainer and its config live, and the parameters that its ``__init__`` had when it was read.

    ``fused_head`` says that it calls ``add_fused_lm_head`` on the policy and on a reference model before it uses them.
    """

    trainer_module: str
    trainer: str
    config_module: str
    config: str
    parameters: tuple[str, ...]
    fused_head: bool

    def replacements(self) -> Iterator[Replacement]:
        """
        Raises:
            RuntimeError: something has other parameters than expected.
        """
        module = importlib.import_module(self.trainer_module)
        trainer = getattr(module, self.trainer)
        check_parameters(trainer.__init__, self.parameters)
        yield from _with_flag(getattr(importlib.import_module(self.config_module), self.config))
        yield Replacement(trainer, "__init__", _sharing_init(trainer.__init__))
        if self.fused_head:
            check_parameters(module.add_fused_lm_head, _FUSED_HEAD)
            yield Replacement(module, "add_fused_lm_head", _sharing_head(module.add_fused_lm_head))


def _with_flag(config: type) -> Iterator[Replacement]:
    """The dataclass itself gets the field, so that whoever imported it earlier has it too, and with it the dataclasses
    that were made from it, which have the fields of their base as they were then."""
    for made in _made_from(config):
        if "padding_free" not in made.__dataclass_fields__:  # type: ignore[attr-defined]
            yield from _with_field(made)
    yield from _with_field(config)


def _made_from(config: type) -> Iterator[type]:
    made: type
    for made in config.__subclasses__():
        # One that is no dataclass itself takes all from its base.
        if "__dataclass_fields__" in vars(made):
            yield made
        yield from _made_from(made)


def _with_field(config: type) -> Iterator[Replacement]:
    flag = dataclasses.field(default=False, metadata={"help": _HELP})
    extended: type = dataclass(
        type(config)(config.__name__, (config,), {"__annotations__": {"padding_free": bool}, "padding_free": flag})
    )
    # What the decorator generates from the list of fields.
    for name in ("__init__", "__repr__", "__eq__", "__match_args__", "__dataclass_fields__"):
        if _generated(name, vars(config).get(name)):
            yield Replacement(config, name, vars(extended)[name])
    yield Replacement(config, "__annotations__", {**vars(config).get("__annotations__", {}), "padding_free": bool})
    yield Replacement(config, "padding_free", False)


def _generated(name: str, attribute: Any) -> bool:
    """Whether a dataclass has it from the decorator, and not from its author."""
    function = getattr(attribute, "__wrapped__", attribute) if name == "__repr__" else attribute
    return attribute is not None and (not callable(function) or function.__code__.co_filename == "<string>")


def _sharing_init(stock: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        config = given.get("args")
        if config is None or not config.padding_free:
            stock(self, *args, **kwargs)
            return
        _refuse_adapter(given.get("peft_config"))
        shared: list[SharedPrompts] = []
        token = _sharing.set(shared)
        # DPOTrainer would warn that it ignores the flag.
        config.padding_free = False
        try:
            # Models that are there already are refused before a dataset is tokenized for them.
            for name in ("model", "ref_model"):
                if isinstance(given.get(name), nn.Module):
                    _share(given[name], shared)
            stock(self, *args, **kwargs)
            _share(self.model, shared)
            _refuse_router_loss(self)
        except BaseException:
            for handle in shared:
                handle.release()  # what was shared before stays so
            raise
        finally:
            config.padding_free = True
            _sharing.reset(token)
        self.shared_prompts = tuple(shared)

    return __init__


def _sharing_head(stock: Callable[..., None]) -> Callable[..., None]:
    """A reference model that the trainer made is met here first, before log-probabilities are precomputed with it."""

    @functools.wraps(stock)
    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
        stock(model, *args, **kwargs)
        shared = _sharing.get()
        if shared is not None:
            _share(model, shared)

    return add_fused_lm_head


def _share(model: Any, shared: list[SharedPrompts]) -> None:
    try:
        handle = share_prompts(model)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"padding_free=True: {error}") from error
    if handle in shared:
        handle.release()
    else:
        shared.append(handle)


def _refuse_adapter(peft_config: Any) -> None:
    if obstacle := adapter_obstacle(peft_config):
        raise NotImplementedError(f"padding_free=True: {type(peft_config).__name__} {obstacle}, or padding_free=False")


def _refuse_router_loss(trainer: Any) -> None:
    if getattr(trainer, "aux_loss_enabled", False):
        raise NotImplementedError(
            f"padding_free=True: {type(trainer.model).__name__} is trained with a balancing loss over router logits, "
            "which would count a shared prompt once; set router_aux_loss_coef=0.0"
        )
