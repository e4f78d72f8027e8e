"""Of every family whose encoder is read, the patches behind each LLM token are those that its feature depends on.

Each patch carries its own number as a one-hot vector to the LLM's tokens, and gradients through what comes behind the
last block say which patches make a token: both name the same ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_squeeze as squeeze
import tiny
from families import proof
from mllm_squeeze.engine.encoder.call import item_lengths
from mllm_squeeze.family.handlers.sub_images import by_runs, lay_out
from mllm_squeeze.family.structure import ModelParts, find_parts
from mllm_squeeze.family.table import TABLE
from mllm_squeeze.family.tower_to_llm import to_llm_tokens, why_not
from mllm_squeeze.upstream.outputs import projected
from mllm_squeeze.upstream.prompts import EmbedderCall, flat, vision_inputs

READ = tuple(
    name
    for name in proof.HERE
    if (parts := find_parts(tiny.load(name).model)).blocks is not None
    and why_not(parts) is None
    and parts.row.tower_to_llm != "none"
)
# Encoded inside the text model, without a feature method.
INSIDE = tuple(name for name in READ if find_parts(tiny.load(name).model).embedder is not None)
# Before 5.23 the feature method of the one wants arguments that only its model gives it, and the other has videos of
# another number of patches, which is refused.
OLDER = {("llama4", "image"), ("llama4", "two_images"), ("gemma4", "video")}
# Images and videos go through towers of their own, and only that of images is read.
TWO_TOWERS = ("video_llava",)


def cells(families: Sequence[str] = READ) -> list[Any]:
    """Return (family, kind) of all prompts that show one modality."""
    out = []
    for name in families:
        parts = find_parts(tiny.load(name).model)
        for kind in ("image", "two_images", "video"):
            modality = "video" if kind == "video" else "image"
            known = hasattr(parts.base, f"get_{modality}_features") and not (kind == "video" and name in TWO_TOWERS)
            if kind in tiny.kinds(name) and known and (proof.RECENT or (name, kind) not in OLDER):
                out.append(pytest.param(name, kind, marks=proof.marks(name)))
    return out


@contextmanager
def leaf_behind(block: nn.Module) -> Iterator[list[Tensor]]:
    """Make what a block gives a leaf that gradients can be taken of."""
    leaves: list[Tensor] = []

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        leaves.append(states.detach().clone().requires_grad_())
        return (leaves[-1], *output[1:]) if isinstance(output, tuple) else leaves[-1]

    hook = block.register_forward_hook(replace, prepend=True)
    try:
        yield leaves
    finally:
        hook.remove()


def one_hot(parts: ModelParts, leaf: Tensor) -> Tensor:
    """Return the number of each patch of the tower, (tiles, N, P) or (sum, P)."""
    patches = parts.patches(leaf if leaf.ndim == 3 else leaf[None])
    tiles, count = patches.shape[:2]
    numbers = torch.eye(tiles * count).view(tiles, count, -1)
    return numbers.flatten(0, 1) if parts.row.tower == "packed" else numbers


def assert_makers(parts: ModelParts, tokens: Tensor, leaf: Tensor, carried: Tensor) -> None:
    """Compare the patches that were carried to each token with those that its feature depends on."""
    assert len(tokens) == len(carried)
    seen = 0
    for token, mine in zip(tokens, carried, strict=True):
        # Channels count differently, as a norm makes their plain sum a constant.
        weighed = (token * torch.linspace(1, 2, len(token))).sum()
        (found,) = torch.autograd.grad(weighed, leaf, retain_graph=True, allow_unused=True)
        gradient = torch.zeros_like(leaf) if found is None else found
        gradient = gradient if gradient.ndim == 3 else gradient[None]
        makers = parts.patches(gradient).abs().sum(-1).flatten() > 0
        assert torch.equal(makers, mine > 0)
        seen += int(makers.any())
        # What a token gets is the mean of its patches; separators get nothing.
        torch.testing.assert_close(mine.sum(), makers.any().float())
    assert seen


@pytest.mark.parametrize(("family", "kind"), cells())
def test_a_token_stands_for_the_patches_that_make_it(family: str, kind: str) -> None:
    t = tiny.load(family)
    parts, modality = find_parts(t.model), "video" if kind == "video" else "image"
    method: Callable[..., Any] = getattr(parts.base, f"get_{modality}_features")
    given = {k: v for k, v in t.inputs[kind].items() if k in inspect.signature(method).parameters}
    assert parts.blocks is not None and parts.feature_block is not None
    with leaf_behind(parts.blocks[parts.feature_block]) as leaves:
        output = method(**given)
    (leaf,) = leaves
    lengths, features = item_lengths(output, parts.row.late), projected(output, parts.row.late)
    assert lengths is not None and features is not None
    inputs = vision_inputs(modality, flat(method, (), given))
    carried = to_llm_tokens(parts, modality, inputs, lengths, one_hot(parts, leaf), 0.0)
    assert_makers(parts, torch.cat([item.reshape(-1, item.shape[-1]) for item in features]), leaf, torch.cat(carried))


@pytest.mark.parametrize("kind", ["image", "two_images"])
@pytest.mark.parametrize("family", INSIDE)
def test_pictures_that_the_text_model_encodes(family: str, kind: str) -> None:
    t = tiny.load(family)
    parts, inputs = find_parts(t.model), t.inputs[kind]
    assert parts.blocks is not None and parts.feature_block is not None and parts.embedder is not None
    seen: list[Any] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        seen.append((EmbedderCall.read(module, args, kwargs), output))

    hook = parts.embedder.register_forward_hook(keep, with_kwargs=True)
    try:
        with leaf_behind(parts.blocks[parts.feature_block]) as leaves:
            t.model(**{k: v.clone() for k, v in inputs.items()})
    finally:
        hook.remove()
    ((call, embedded),), (leaf,) = seen, leaves
    items = lay_out(t.model.config, call, one_hot(parts, leaf), 0.0)
    carried = by_runs(call.ids, parts.ids["image"], items)
    assert_makers(parts, embedded[call.ids == parts.ids["image"]], leaf, torch.cat(carried))
    with squeeze.applied(t.model, "visionzip", keep=12) as handle:
        proof.forward(t, inputs)
        assert [len(item) for item in carried] == [span.length for span in handle.layout.spans]


def test_whether_an_encoder_is_read_follows_from_its_row() -> None:
    """Where nobody has looked the row says so; a new row is noticed here."""
    looked = {name: row for name, row in TABLE.items() if row.verified and set(row.modalities) != {"audio"}}
    # What encoder-decoders attend to is cut by its features alone.
    looked = {name: row for name, row in looked.items() if not row.encoded}
    unknown = {name for name, row in looked.items() if row.tower_to_llm == "none"}
    # Their encoders are timm models, their pictures no part of the LLM's sequence, or framed by tokens of their own.
    assert unknown == {"gemma3n", "perception_lm", "fast_vlm", "mllama", "hunyuan_vl", "muse_glimmer", "muse_spark"}


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("perception_lm", "TimmWrapperModel. has no list of attention blocks"),
        ("fast_vlm", "TimmWrapperModel. has no list of attention blocks"),
        ("gemma3n", "TimmWrapperModel. has no list of attention blocks"),
        ("idefics2", "a query that looks at all patches"),
        ("blip_2", "a query that looks at all patches"),
        ("got_ocr2", "convolutions whose windows overlap"),
        ("chameleon", "convolutions whose windows overlap"),
        ("fuyu", "no encoder looks at them"),
    ],
)
def test_what_cannot_be_read_says_why(family: str, reason: str) -> None:
    if not tiny.available(family):
        pytest.skip(f"this installation has no {family}")
    with pytest.raises(squeeze.SqueezeError, match=reason):
        squeeze.apply(tiny.load(family).model, "visionzip")
