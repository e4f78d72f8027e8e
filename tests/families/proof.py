"""What each family is tried on, and how a cut of it is proved: by masking, or where that has no meaning by leaving out.

Families whose layers all attend are proved against the dense model with the dropped columns closed. Recurrent layers
take no such mask; those families are proved against the dense model from which the rows really leave, without a cache.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import pytest
import torch
import transformers
from torch import Tensor

import matrix
import mllm_squeeze as squeeze
import oracle
import tiny
import ways
from mllm_squeeze.reducers.base import DecodeReducer
from mllm_squeeze.reducers.needs import Attention, Normed, Projection
from tiny.audio_line import AUDIO_LINE
from tiny.speech_line import SPEECH_LINE

STEPS = 3
# What the library breaks is told of this release on; older ones break more.
RECENT = matrix.RECENT
recent = pytest.mark.skipif(not RECENT, reason=f"what 5.23 breaks; here is transformers {transformers.__version__}")
# Models that cannot be squeezed at all, and a word of the reason.
REFUSED = {
    "blip_2_t5": "Encoder-decoder",
    "diffusion_gemma": "second stack",
    "minimax_m3_vl_sparse": "picks by their places in the cache",
    **dict.fromkeys(("dots3_note_indexed", "mistral_large4", "hy_v4_vl"), "an indexer picks the keys"),
    **dict.fromkeys(("qwen4_exp", "glm5_next"), "an indexer picks the keys"),
    **dict.fromkeys(("inkling_mm_model", "inkling2", "inkling2_loop"), "a recurrent state beside its attention"),
}
# Models whose pictures are keys beside the LLM's sequence; test_cross_*.py prove them.
KEYED = ("mllama",)
SERVED = tuple(name for name in tiny.FAMILIES if name not in (*REFUSED, *KEYED))
# The prompt looks ahead, so words that come later change what was said before: only generate() shows the same.
PREFIX = ("molmo2", "paligemma", "paligemma2")
# Prompts that transformers itself cannot repeat for beams: it raises, or deals several pieces to the wrong rows.
BEAMS_BROKEN = {
    *((family, "two_videos") for family in ("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga", "video_llama_3")),
    *((family, kind) for family in ("llama4", "fuyu") for kind in ("image", "two_images")),
    *((family, "two_audios") for family in (*AUDIO_LINE, *SPEECH_LINE)),
    ("voxtral", "audio"),
    ("granite4_vision", "two_images"),
    ("perception_lm", "two_videos"),
}
QUICK = ("llava", "qwen3_vl", "llama4", "phi4_multimodal", "gemma3_window", "gemma4", "lfm2_vl", "qwen3_5", "molmo2")
QUICK += ("paligemma2", "perception_lm", "blip_2", "voxtral", "mistral3")


def column(name: str) -> str:
    """Return the column of docs/families.md that a method proves: where it acts, or whence it reads."""
    way = matrix.method(name).way
    if "encoder" in way.places:
        return "encoder"
    if "encoder" in way.roads:
        return "scores"
    if way.reduces in ("video", "audio"):
        return way.reduces
    return "projector" if way.places[0] == "before" else way.places[0]


def places() -> dict[str, str]:
    """Return one method per column, and one that goes on while decoding, with its column."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in matrix.WAYS:
        groups.setdefault((column(name), matrix.method(name).decodes), []).append(name)
    return {ways.first(names): where for (where, _), names in groups.items()}


PLACES = places()
HERE = tuple(name for name in SERVED if tiny.available(name))
# Recurrent or convolutional layers between the attention layers.
HYBRID = tuple(name for name in HERE if oracle.recurrent(tiny.load(name).model))
# These classes keep no cache of a conversation, and their forward takes none.
OWN_GENERATE = tuple(name for name in HERE if matrix.row_of(name).own_generate)


def fits(name: str, method: str) -> bool:
    """Say whether a method must work on a family."""
    return reason(name, method) is None


@functools.cache
def reason(name: str, method: str) -> str | None:
    """Return why a method does not fit a family, in a word of the message; None where it must fit.

    By facts alone: the row of the family, what its config says of its layers, and what the method reads where.
    """
    found = matrix.misfit(method, name)
    if found:
        return found
    model, row = tiny.load(name).model, matrix.row_of(name)
    blended = isinstance(getattr(model.config, "vision_feature_layer", None), (list, tuple))
    if "encoder" in matrix.method(method).way.places and blended:
        return "inside the vision encoder"
    mixing = oracle.recurrent(model)
    for layer, reducer in ways.cut_layers(matrix.method(method), len(oracle.text_model(model).layers)):
        if layer > last_lender(model):
            return "borrow keys"
        if isinstance(reducer, DecodeReducer):
            if layer - 1 in mixing:
                return "while decoding, which has none"
            continue
        for need in reducer.needs():
            if isinstance(need, (Attention, Projection)):
                ahead = need.block == "next"
                read = layer if ahead else layer - 1 if need.block == -1 else need.block
                if read in mixing or (ahead and row.stacked):
                    return "previews layer" if ahead else "which has none"
            if isinstance(need, Normed) and row.stacked:
                return "reads normed"
    return None


def last_lender(model: Any) -> int:
    """Return the last layer at which a cut leaves no layer with borrowed keys of another length.

    The last `num_kv_shared_layers` take the keys of the last layer of their kind among those before them.
    """
    layers = len(oracle.text_model(model).layers)
    config = oracle.text_model(model).config
    own = layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    lenders = [max(n for n in range(own) if kinds[n] == kind) for kind in set(kinds[own:])]
    return min(lenders, default=layers)


def frames_unknown(t: tiny.TinyModel, kind: str, method: str) -> bool:
    """Say whether a rule cannot tell what it keeps of a prompt, as the grid of its frames is not known."""
    with whole(t, kind, matrix.CORE[0]) as (handle, inputs):
        forward(t, inputs)
        spans = handle.layout.spans
    try:
        for span in spans:
            ways.left_of(matrix.method(method), span)
    except squeeze.errors.UnsupportedInputError:
        return True
    return False


def pairs(methods: Sequence[str]) -> list[Any]:
    """Return (family, method) of those that fit."""
    out = []
    for name in HERE:
        out += [pytest.param(name, m, id=f"{name}-{m}", marks=marks(name)) for m in methods if fits(name, m)]
    return out


def families(names: Sequence[str] = SERVED) -> list[Any]:
    """Return pytest parameters, one per family; those that this installation lacks are skipped by name."""
    return [pytest.param(name, id=name, marks=marks(name)) for name in names]


def in_turn(cells: Sequence[Any], methods: Sequence[str] = ("divprune", "fastv")) -> list[Any]:
    """Return the parameters of `cells`, each with one of the methods: in a family by turns, which first by its name.

    For what hangs on the family and the place of a cut, but not on both together.
    """
    out: list[Any] = []
    seen: Counter[str] = Counter()
    for cell in cells:
        family = cell.values[0]
        method = methods[(crc32(family.encode()) + seen[family]) % len(methods)]
        seen[family] += 1
        out.append(pytest.param(*cell.values, method, id=f"{cell.id}-{method}", marks=cell.marks))
    return out


def marks(name: str) -> list[Any]:
    """Return the marks of a family: quick, and skipped where the library or a package is missing."""
    out = [pytest.mark.quick] if name in QUICK else []
    if not tiny.available(name):
        reason = f"transformers {transformers.__version__} has no {name}, or a package is missing that it needs"
        out.append(pytest.mark.skip(reason=reason))
    return out


# Llama 4 in a test of its own.
llama4 = pytest.mark.skipif(
    not tiny.available("llama4"), reason=f"transformers {transformers.__version__} cannot run llama4 on pictures"
)


def shown(name: str) -> list[str]:
    """Return the kinds of prompt of a family that show or play something."""
    return [kind for kind in tiny.kinds(name) if kind != "text"]


def first_kind(name: str, method: str) -> str:
    """Return the kind of prompt on which a method is tried first."""
    only, kinds = matrix.method(method).modalities, tiny.kinds(name)
    return only[0] if len(only) == 1 and only[0] in kinds else kinds[0]


@functools.cache
def misfit(name: str, method: str) -> str | None:
    """Return why the library says that a method does not fit a family, None where it fits."""
    try:
        squeeze.apply(tiny.load(name).model, method, **params(name, method)).remove()
    except squeeze.SqueezeError as error:
        return str(error)
    return None


def params(name: str, method: str, **changes: Any) -> dict[str, Any]:
    """Return the parameters with which a method is tried on a family: of few layers, some cannot be read."""
    return ways.changed(matrix.method(method).params, changes)


@contextmanager
def whole(t: tiny.TinyModel, kind: str, method: str, **changes: Any) -> Iterator[tuple[Any, tiny.Inputs]]:
    """Apply a method; yields the handle, and inputs of their own."""
    inputs = {k: v.clone() for k, v in t.inputs[kind].items()}
    with squeeze.applied(t.model, method, **params(t.name, method, **changes)) as handle:
        yield handle, inputs


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Run the text model with eager attention for a while; towers keep theirs, as some refuse to be set back."""
    configs = {id(c): c for c in (oracle.text_model(model).config, model.config.get_text_config())}.values()
    before = [c._attn_implementation_internal for c in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def repacks(handle: Any) -> bool:
    """Say whether survivors stand at consecutive positions: the recipe says so, and positions rotate on one axis.

    Where layers borrow the keys of others, positions are kept as well.
    """
    text = oracle.text_model(handle.model)
    if getattr(text.config, "num_kv_shared_layers", 0):
        return False
    rope = getattr(text.config, "rope_parameters", None) or {}
    axes = any("mrope_section" in (said or {}) for said in (rope, *rope.values()) if isinstance(said, dict))
    return handle.recipe.positions == "repack" and hasattr(text, "rotary_emb") and not axes


def forward(t: tiny.TinyModel, inputs: tiny.Inputs, **extra: Any) -> Tensor:
    """Return the logits of a forward with inputs of its own."""
    with torch.no_grad():
        return t.model(**{k: v.clone() for k, v in inputs.items()}, **extra).logits


def generate(t: tiny.TinyModel, inputs: tiny.Inputs, forced: Tensor, **extra: Any) -> Tensor:
    """Return the raw logits (B, n + 1, V) of generate() while it is made to choose the forced tokens (B, n)."""
    return oracle.generate(t.model, {k: v.clone() for k, v in inputs.items()}, forced, **extra)


def followed(t: tiny.TinyModel, inputs: tiny.Inputs, tokens: Tensor) -> tiny.Inputs:
    """Return the prompt with these tokens (1, n) behind it."""
    return t.turn(inputs, tokens[:, :-1], int(tokens[0, -1])).whole


def squeeze_and_prove(t: tiny.TinyModel, kind: str, method: str, **changes: Any) -> Any:
    """Run squeezed, compare all logits of survivors and decode steps with the dense reference; return the handle."""
    forced = oracle.forced_tokens(1, STEPS)
    with whole(t, kind, method, **changes) as (handle, inputs):
        with oracle.capture(t.model, range(len(oracle.text_model(t.model).layers))) as states:
            prefill = forward(t, inputs)
        cuts = handle.cuts
        decode = generate(t, inputs, forced)
        assert [c.kept[0].tolist() for c in handle.cuts] == [c.kept[0].tolist() for c in cuts]
    assert cuts, "nothing was cut"
    merged = matrix.merged(method, cuts, states)
    compare(t, inputs, prefill, decode, cuts, merged, repacks(handle), forced, matrix.method(method).decodes)
    return handle


def compare(
    t: tiny.TinyModel,
    inputs: tiny.Inputs,
    prefill: Tensor,
    decode: Tensor,
    cuts: Sequence[oracle.CutLike],
    merged: dict[int, Tensor] | None,
    repack: bool,
    forced: Tensor,
    decodes: bool = False,
) -> None:
    """Compare prefill (1, T, V) and generate (1, n + 1, V) with the dense reference; not decode where it cuts on."""
    alive = oracle.survivors(inputs, cuts)
    if oracle.recurrent(t.model):
        short = oracle.dropped_logits(t.model, inputs, cuts, repack, merged)
        oracle.assert_close(prefill[alive], short[0], "prefill")
        whole = oracle.dropped_logits(t.model, followed(t, inputs, forced), cuts, repack, merged)
        expected = whole[:, -forced.shape[1] - 1 :]
    else:
        with oracle.masked(t.model, inputs["input_ids"].shape[1], cuts, merged, repack):
            oracle.assert_close(prefill[alive], forward(t, inputs)[alive], "prefill")
            expected = generate(t, inputs, forced)
    if decodes:
        decode, expected = decode[:, :1], expected[:, :1]
    for n in range(decode.shape[1]):
        oracle.assert_close(decode[:, n], expected[:, n], f"step {n}")


def expected_count(length: int, ratio: float) -> int:
    """Return the tokens that stay of one image, video or sound."""
    return ways.kept_of(length, 1 - ratio)


def check_cuts(t: tiny.TinyModel, inputs: tiny.Inputs, handle: Any) -> None:
    """Text is never cut, padding never kept, columns ascend, and every cut is a subset of the one before."""
    for b, row in enumerate(handle.layout.visual):
        before = set(inputs["attention_mask"][b].nonzero().flatten().tolist())
        text = before - set(row.nonzero().flatten().tolist())
        for cut in handle.cuts:
            kept = cut.kept[b].tolist()
            assert kept == sorted(set(kept))
            assert text <= set(kept) <= before, f"text was cut at layer {cut.layer}"
            before = set(kept)
