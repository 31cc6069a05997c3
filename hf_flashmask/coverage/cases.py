"""What is run of a model type, always against eager attention with the same weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from hf_flashmask import masks
from hf_flashmask.huggingface.attention import flashmask_attention_forward
from hf_flashmask.huggingface.naming import COMPUTES_ITSELF, NAME, unsupported

from . import build
from .outcome import MISMATCH, NOT_BUILDABLE, NOT_ROUTED, OK, REFUSED, Row, origin, ours, sentence

# Relative to the largest logit: float32 sums in another order, and what layers make of that.
TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
LENGTH = 12
DOCUMENTS = (5, 7)
PADDING = 4
NEW_TOKENS = 6

Given = dict[str, Any]


class _NotHere(Exception):
    """The case does not apply: the model has no such input, or eager cannot do it either."""


class _Count:
    """Calls of our attention function: none means that the model never asks."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        self.calls += 1
        return flashmask_attention_forward(*args, **kwargs)


def check(kind: str, model_type: str) -> Row:
    """Builds the type and runs every case. Errors of models become cells of the row."""
    row = Row(kind, model_type)
    try:
        config, eager, inputs = _reference(kind, model_type)
    except build.NotBuildable as error:
        row.status, row.reason = NOT_BUILDABLE, sentence(error)
        return row
    row.model = type(eager).__name__
    if reason := unsupported(type(eager)):
        row.status = NOT_ROUTED if COMPUTES_ITSELF in reason else REFUSED
        row.reason = sentence(Exception(reason))
        return row
    try:
        flash = build.build(config, kind, NAME)
    except Exception as error:
        row.status = REFUSED if ours(error) else MISMATCH
        row.reason = sentence(error)
        return row
    flash.load_state_dict(eager.state_dict())
    count = _Count()
    AttentionInterface.register(NAME, count)
    try:
        _run(row, _Pair(kind, eager, flash, inputs))
    finally:
        AttentionInterface.register(NAME, flashmask_attention_forward)
    row.settle()
    if row.status == OK and not count.calls:
        row.status, row.reason = NOT_ROUTED, "no layer of it asks Transformers' attention interface"
    return row


def _reference(kind: str, model_type: str) -> tuple[PretrainedConfig, PreTrainedModel, Given]:
    """The first candidate that runs with eager attention."""
    first_error: Exception | None = None
    for config in build.candidates(model_type):
        try:
            size = build.parameters_of(config, kind)
            if size > build.MOST_PARAMETERS:
                raise build.NotBuildable(f"the smallest found has {size / 1e6:.0f}M parameters")
            eager = build.build(config, kind, "eager")
            build.randomize(eager)
            inputs = _inputs(kind, eager)
            with torch.no_grad():
                if not torch.isfinite(_output(eager(**inputs))).all():
                    raise build.NotBuildable("eager gives values that are not finite")
            return config, eager, inputs
        except Exception as error:
            first_error = first_error or error
    assert first_error is not None
    where = "" if isinstance(first_error, build.NotBuildable) else f" ({origin(first_error)})"
    raise build.NotBuildable(f"{type(first_error).__name__}: {sentence(first_error)}{where}") from first_error


# ---- inputs and outputs ----------------------------------------------------------------------------------------


def _words(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(5, build.WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _inputs(kind: str, model: PreTrainedModel) -> Given:
    if kind in ("vision", "tower"):
        return _images(model)
    given: Given = {"input_ids": _words(2, LENGTH)}
    if kind == "seq2seq" and _takes(model, "decoder_input_ids"):  # the table also has decoders that hear
        given["decoder_input_ids"] = _words(2, 7, seed=2)
    if kind != "masked":
        given["use_cache"] = False
    return given


# Patches of the images of a tower that takes them in one row, two sizes.
_GRIDS = ((1, 4, 4), (1, 2, 6))


def _images(model: PreTrainedModel, which: slice = slice(None)) -> Given:
    config = model.config
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    generator = torch.Generator().manual_seed(1)
    if _takes(model, "grid_thw") or _takes(model, "image_grid_thw"):
        patch = config.patch_size**2 * channels * getattr(config, "temporal_patch_size", 1)
        sizes = [t * h * w for t, h, w in _GRIDS]
        patches = torch.randn(sum(sizes), patch, generator=generator).split(sizes)
        first = next(iter(inspect.signature(model.forward).parameters))
        grid = "grid_thw" if _takes(model, "grid_thw") else "image_grid_thw"
        return {first: torch.cat(patches[which]), grid: torch.tensor(_GRIDS[which])}
    size = getattr(config, "image_size", None) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape: tuple[int, ...] = (2, channels, height, width)
    if getattr(config, "num_frames", None):
        shape = (2, config.num_frames, channels, height, width)
    name = "pixel_values" if _takes(model, "pixel_values") else model.main_input_name
    return {name: torch.randn(*shape, generator=generator)}


def _output(result: Any) -> Tensor:
    """What is compared: logits, else the last hidden state."""
    for name in ("logits", "last_hidden_state", "pooler_output"):
        value = getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    values = result if isinstance(result, (tuple, list)) else list(result.values())
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest expected value, at least 1."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1)
    return float(difference) if torch.isfinite(difference) else float("inf")


def _verdict(difference: float, tolerance: float = TOLERANCE) -> str:
    return OK if difference <= tolerance else f"mismatch: off by {difference:.1e}"


# ---- cases -----------------------------------------------------------------------------------------------------


class _Pair:
    """The same weights twice, and the inputs that both take."""

    def __init__(self, kind: str, eager: PreTrainedModel, flash: PreTrainedModel, inputs: Given) -> None:
        self.kind, self.eager, self.flash, self.inputs = kind, eager, flash, inputs
        # Padding is then in the encoder, and every row of the output counts.
        self.cross = "decoder_input_ids" in inputs

    def expected(self, **changes: Any) -> Tensor:
        """Eager's output, or _NotHere where it cannot."""
        try:
            with torch.no_grad():
                return _output(self.eager(**{**self.inputs, **changes}))
        except Exception as error:
            raise _NotHere(f"eager fails: {sentence(error)}") from error

    @torch.no_grad()
    def actual(self, **changes: Any) -> Tensor:
        return _output(self.flash(**{**self.inputs, **changes}))

    def compare(self, kept: Tensor | None = None, **changes: Any) -> str:
        torch.manual_seed(0)  # models that draw numbers also in eval mode
        expected = self.expected(**changes)
        torch.manual_seed(0)
        actual = self.actual(**changes)
        if kept is not None and actual.shape[:2] == kept.shape:
            actual, expected = actual[kept.bool()], expected[kept.bool()]
        return _verdict(_difference(actual, expected))


def _run(row: Row, pair: _Pair) -> None:
    text = pair.kind not in ("vision", "tower")
    cases: dict[str, Callable[[_Pair], str]] = {"plain": _Pair.compare}
    if text:
        cases |= {"left": _left, "right": _right}
    if pair.kind in ("causal", "masked", "multimodal"):
        cases["packed"] = _packed
    if pair.kind in ("causal", "multimodal"):
        cases["mask4d"] = _mask4d
    if pair.kind in ("causal", "seq2seq", "multimodal"):
        cases |= {"dynamic": _dynamic, "static": _static}
        row.cache = _cache_layers(pair)
    if {"grid_thw", "image_grid_thw"} & set(pair.inputs):
        cases["packed"] = _packed_images
    cases["gradient"] = _gradient
    for name, case in cases.items():
        try:
            cell = case(pair)
            if cell.startswith("mismatch") and name in ("left", "dynamic", "static"):
                cell = _behind_padding(pair, case, cell)
            elif cell.startswith("mismatch") and name == "plain" and pair.kind == "causal" and _sees_ahead(pair):
                pair.eager.set_attn_implementation("sdpa")  # what follows is compared with it, too
                cell = "as sdpa: eager sees later tokens where no mask is given" if case(pair) == OK else cell
        except _NotHere as reason:
            cell = f"n/a: {sentence(reason)}"
        except Exception as error:
            cell = f"refused: {sentence(error)}" if ours(error) else f"error: {_told(error)}"
        setattr(row, name, cell)
        if name == "plain" and not cell.startswith((OK, "as sdpa")):
            return  # what follows would only repeat it


def _behind_padding(pair: _Pair, case: Callable[[_Pair], str], cell: str) -> str:
    """Recurrent layers read rows of padding, where eager has an average of values and sdpa and flashmask have 0."""
    reference = pair.eager.config._attn_implementation
    pair.eager.set_attn_implementation("sdpa")
    try:
        return "as sdpa: padding reaches its recurrent layers" if case(pair) == OK else cell
    finally:
        pair.eager.set_attn_implementation(reference)


def _sees_ahead(pair: _Pair) -> bool:
    """Whether eager's first token changes with the last one, as in models that leave causality to sdpa's flag."""
    ids = pair.inputs["input_ids"].clone()
    ids[:, -1] += 1
    return not torch.equal(pair.expected()[:, 0], pair.expected(input_ids=ids)[:, 0])


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {sentence(error)} ({origin(error)})"


def _padding(side: str) -> Tensor:
    kept = torch.ones(2, LENGTH, dtype=torch.int64)
    kept[1, :PADDING] = 0
    return kept if side == "left" else kept.flip(1)


def _left(pair: _Pair) -> str:
    kept = _padding("left")
    return pair.compare(None if pair.cross else kept, attention_mask=kept)


def _right(pair: _Pair) -> str:
    kept = _padding("right")
    return pair.compare(None if pair.cross else kept, attention_mask=kept)


def _packed(pair: _Pair) -> str:
    """Documents in one row are as alone, whatever eager makes of the row."""
    if not _takes(pair.eager, "position_ids"):
        raise _NotHere("takes no position_ids")
    ids = pair.inputs["input_ids"][:1]
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    # Positions are given here too: by themselves, RoBERTa's begin behind the padding id.
    parts = zip(ids.split(DOCUMENTS, 1), positions.split(DOCUMENTS, 1), strict=True)
    alone = torch.cat([pair.expected(input_ids=part, position_ids=at) for part, at in parts], 1)
    row = {"input_ids": ids, "position_ids": positions}
    eager = pair.expected(**row)
    worst = 0.0
    for options in ({}, {"use_cache": True}) if pair.kind != "masked" else ({},):
        actual = pair.actual(**row, **options)
        difference = _difference(actual, alone)
        if difference > TOLERANCE and _difference(actual, eager) <= TOLERANCE:
            return "leaks as eager: documents are not told apart outside attention, or not told to it"
        worst = max(worst, difference)
    return _verdict(worst)


def _packed_images(pair: _Pair) -> str:
    """Images in one row are as alone."""
    parts = []
    for i in range(len(_GRIDS)):
        parts.append(pair.expected(**_images(pair.eager, slice(i, i + 1))))
    actual = pair.actual()
    # Most give [patches, H], some [1, patches, H].
    return _verdict(_difference(actual, torch.cat(parts, actual.ndim - 2)))


def _mask4d(pair: _Pair) -> str:
    """Questions whose answers do not see each other, as an additive float mask."""
    mask = masks.share_question([[4, 2, 2], [2, 2]])
    visible = mask.to_dense().expand(2, 1, -1, -1)
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    return pair.compare(attention_mask=additive)


def _cache_layers(pair: _Pair) -> str:
    """Kinds of layers of the cache that generate makes."""
    try:
        cache = DynamicCache(config=pair.eager.config.get_text_config(decoder=True))
    except Exception:  # models with caches of their own
        return "own"
    kinds = {type(layer).__name__.removeprefix("Dynamic").removesuffix("Layer") for layer in cache.layers}
    return "+".join(sorted(kind or "Full" for kind in kinds)).lower() or "full"


def _dynamic(pair: _Pair) -> str:
    return _generate(pair)


def _static(pair: _Pair) -> str:
    if not pair.eager._can_compile_fullgraph:
        raise _NotHere("Transformers has no static cache for it")
    return _generate(pair, cache_implementation="static")


def _generate(pair: _Pair, **options: Any) -> str:
    """Greedy decoding behind left padding, past any window: the same tokens, and scores of every step."""
    given = {
        "input_ids": pair.inputs["input_ids"],
        "attention_mask": _padding("right" if pair.cross else "left"),
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "disable_compile": True,
        "return_dict_in_generate": True,
        "output_logits": True,
        **options,
    }
    eager: Any = pair.eager
    flash: Any = pair.flash
    try:
        expected = eager.generate(**given)
    except Exception as error:
        raise _NotHere(f"eager fails: {sentence(error)}") from error
    actual = flash.generate(**given)
    if not torch.equal(actual.sequences, expected.sequences):
        return "mismatch: other tokens"
    return _verdict(_difference(torch.stack(actual.logits), torch.stack(expected.logits)))


def _gradient(pair: _Pair) -> str:
    """Gradients of all parameters, beside right padding where there is text."""
    changes: Given = {}
    if "input_ids" in pair.inputs:
        changes["attention_mask"] = _padding("right")
    gradients = []
    for model in (pair.eager, pair.flash):
        model.zero_grad()
        torch.manual_seed(0)
        try:
            output = _output(model(**{**pair.inputs, **changes}))
            if changes and not pair.cross and output.shape[:2] == changes["attention_mask"].shape:
                output = output[changes["attention_mask"].bool()]
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
            (output * weights).mean().backward()
        except Exception as error:
            if model is pair.eager:
                raise _NotHere(f"eager fails: {sentence(error)}") from error
            raise
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    expected, actual = gradients
    norms = [float(torch.linalg.vector_norm(g)) for g in expected.values() if g is not None]
    if not norms:
        raise _NotHere("eager has no gradients")
    floor = 1e-3 * max(norms)  # a bias on keys has a gradient of nothing but rounding
    worst = 0.0
    for name, wanted in expected.items():
        got = actual[name]
        if wanted is None and got is None:
            continue
        # None beside a gradient counts as zero.
        off = float(torch.linalg.vector_norm(_minus(got, wanted)))
        worst = max(worst, off / max(0.0 if wanted is None else float(torch.linalg.vector_norm(wanted)), floor))
    return _verdict(worst, GRADIENT_TOLERANCE)


def _minus(a: Tensor | None, b: Tensor | None) -> Tensor:
    if a is None or b is None:
        present = b if a is None else a
        assert present is not None
        return present
    return a - b
