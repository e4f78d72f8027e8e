"""Words and pictures in the space of a text encoder: what CLIP and SigLIP themselves compute of prompt and patches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from torch import Tensor

import mllm_squeeze as squeeze
import oracle
import tiny
from mllm_squeeze.errors import ConfigError, SqueezeError, SqueezeWarning, UnsupportedInputError, UnsupportedModelError
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.reducers.base import Place, Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Embedding, EncoderAttention, EncoderStates, Need
from mllm_squeeze.registry import register_reducer, unregister_reducer
from text_space import END, PLACES, START, WIDTH, encoder, pair, tokenizer
from tiny.parts import PAD, SPECIAL

VISUAL, TEXT = Embedding("visual", "clip"), Embedding("text", "clip")
SCORED = {"at": "projector", "keep": 5, "score": {"text_similarity": "clip"}, "select": "top_k"}


class Comparer(Reducer):
    """Keep the first tokens, and tell a test what was given."""

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    wanted: ClassVar[tuple[Need, ...]] = (VISUAL, TEXT)
    seen: ClassVar[list[VisualTokens]] = []

    def needs(self) -> tuple[Need, ...]:
        """Return what the test wants."""
        return self.wanted

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Keep the first tokens."""
        self.seen.append(tokens)
        number = torch.arange(tokens.mask.shape[1])
        return Reduction(tokens.mask & (number < tokens.budget[:, None]))


@pytest.fixture(autouse=True)
def comparer() -> Iterator[None]:
    """Register the reducer for a test."""
    register_reducer("comparer", Comparer)
    Comparer.wanted = (VISUAL, TEXT)
    Comparer.seen.clear()
    yield
    unregister_reducer("comparer")


def vector(kind: str, ids: Sequence[int]) -> Tensor:
    """Return what the text model gives for words of the LLM with these ids, (D,)."""
    framed = [START, *ids, END][:PLACES]
    framed[-1] = END
    padded = torch.tensor([framed + [PAD] * (PLACES - len(framed))])
    with torch.no_grad():
        found = pair(kind).get_text_features(padded, attention_mask=(torch.arange(PLACES) < len(framed))[None].long())
    return (found if isinstance(found, Tensor) else found.pooler_output)[0]


def probe(family: str, inputs: tiny.Inputs, given: Any, *needs: Need, **step: Any) -> tuple[VisualTokens, TokenLayout]:
    """Return what the reducer was given, and where the spans were."""
    t = tiny.load(family)
    Comparer.wanted = needs or Comparer.wanted
    recipe = {"method": "comparing", "steps": [{"reducer": "comparer", "at": "projector", "ratio": 0.5} | step]}
    with squeeze.applied(t.model, recipe, text_encoder=given) as handle, torch.no_grad():
        t.model(**inputs)
        layout = handle.layout
    assert layout is not None
    return Comparer.seen[-1], layout


def words_of(layout: TokenLayout, inputs: tiny.Inputs, sample: int) -> list[int]:
    """Return the ids of the words behind the first visual token that are no special tokens."""
    first = min(span.start for span in layout.spans if span.sample == sample)
    there = [n for n in range(first, layout.length) if layout.real[sample, n] and not layout.visual[sample, n]]
    return [int(n) for n in inputs["input_ids"][sample, there] if int(n) not in SPECIAL]


def states_of(t: tiny.TinyModel, block: str, inputs: tiny.Inputs) -> Tensor:
    """Return what a block of the vision tower gives, (tiles, N, C)."""
    seen: list[Tensor] = []
    hook = t.model.get_submodule(f"{t.family.tower}.{block}").register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        t.model.model.get_image_features(inputs["pixel_values"])
    hook.remove()
    return torch.cat(seen)


def projected(kind: str, states: Tensor) -> Tensor:
    """Return patch states in the space, one by one: CLIP projects them, SigLIP's head pools each by itself."""
    model: Any = pair(kind)
    with torch.no_grad():
        normed = model.vision_model.post_layernorm(states)
        if kind == "clip":
            return model.visual_projection(normed)
        return torch.stack([torch.cat([model.vision_model.head(one[None, None]) for one in tile]) for tile in normed])


FAMILIES = [("llava", "clip", "encoder.layers.1", 1), ("paligemma2", "siglip", "encoder.layers.2", 0)]
FAMILIES = [row for row in FAMILIES if tiny.available(row[0])]


@pytest.mark.parametrize(("family", "kind", "block", "special"), FAMILIES)
@pytest.mark.parametrize("prompt", ["image", "two_images", "batch"])
def test_both_sides_are_what_the_encoder_computes(
    family: str, kind: str, block: str, special: int, prompt: str
) -> None:
    t = tiny.load(family)
    one = prompt != "batch"
    inputs = t.inputs[prompt] if one else t.batch(("image", "text", "two_images"), "left").inputs
    tokens, layout = probe(family, inputs, encoder(kind))
    pictures = projected(kind, states_of(t, block, inputs)[:, special:])
    assert len(pictures) == len(layout.spans)
    for row, span in enumerate(layout.spans):
        torch.testing.assert_close(tokens[VISUAL][row][tokens.mask[row]], pictures[row], rtol=1e-5, atol=1e-5)
        wanted = vector(kind, words_of(layout, inputs, span.sample))
        torch.testing.assert_close(tokens[TEXT][row], wanted[None], rtol=1e-5, atol=1e-5)
    assert tokens[VISUAL].dtype == tokens[TEXT].dtype == torch.float32


def test_a_pair_of_two_models_is_the_whole_one() -> None:
    whole: Any = pair("clip")
    text = hf.CLIPTextModelWithProjection(
        hf.CLIPTextConfig(**whole.config.text_config.to_dict() | {"projection_dim": 20})
    )
    picture = hf.CLIPVisionModelWithProjection(
        hf.CLIPVisionConfig(**whole.config.vision_config.to_dict() | {"projection_dim": 20})
    )
    for part in (text, picture):
        missing = part.load_state_dict(whole.state_dict(), strict=False).missing_keys
        assert not missing
        part.eval()
    inputs = tiny.load("llava").inputs["image"]
    apart, _ = probe("llava", inputs, squeeze.TextEncoder((text, picture), tokenizer(False), tokenizer(True)))
    joined, _ = probe("llava", inputs, encoder())
    for need in (VISUAL, TEXT):
        torch.testing.assert_close(apart[need], joined[need])


class Doubled:
    """A space of a researcher's own."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def text(self, words: Sequence[str]) -> Tensor:
        """Return the number of words."""
        self.asked.append(list(words))
        return torch.tensor([[len(one.split())] * WIDTH for one in words])

    def image(self, states: Tensor) -> Tensor:
        """Return twice the states."""
        return 2 * states


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl"])
def test_an_encoder_of_ones_own_gets_the_states_of_the_tower(family: str) -> None:
    inputs = tiny.load(family).inputs["two_images"]
    own = Doubled()
    given = squeeze.TextEncoder(own, tokenizer(False))
    tokens, layout = probe(family, inputs, given, VISUAL, TEXT, EncoderStates(), Embedding("visual", "clip", True))
    torch.testing.assert_close(tokens[VISUAL], 2 * tokens[EncoderStates()])
    torch.testing.assert_close(tokens[Embedding("visual", "clip", True)], tokens[VISUAL])
    count = len(words_of(layout, inputs, 0))
    assert count and bool((tokens[TEXT] == count).all())
    assert own.asked == [[" ".join(f"w{n:03}" for n in words_of(layout, inputs, 0))]]


def test_words_are_encoded_once_for_all_steps_and_beams() -> None:
    t = tiny.load("llava")
    own = Doubled()
    steps = [{"reducer": "comparer", "at": {"layer": layer}, "keep": keep} for layer, keep in ((1, 9), (2, 4))]
    given = squeeze.TextEncoder(own, tokenizer(False))
    with squeeze.applied(t.model, {"method": "comparing", "steps": steps}, text_encoder=given):
        t.model.generate(**t.inputs["image"], max_new_tokens=3, num_beams=2, do_sample=False)
    assert len(own.asked) == 1 and len(own.asked[0]) == 1
    first, second = Comparer.seen[-2:]
    assert first[VISUAL].shape[1] == 25 and second[VISUAL].shape[1] == 9
    torch.testing.assert_close(second[VISUAL], first[VISUAL][:, :9])


def test_a_question_is_taken_out_of_the_whole_prompt() -> None:
    inputs = tiny.load("llava").inputs["image"]
    told: list[str] = []

    def question(prompt: str) -> str:
        told.append(prompt)
        return "w040 w041"

    tokens, _ = probe("llava", inputs, encoder(question=question))
    assert told == ["w001 w011 w012 w013 w014 w015 w016 w017 w018 w019"]
    torch.testing.assert_close(tokens[TEXT][0, 0], vector("clip", [40, 41]), rtol=1e-5, atol=1e-5)


def test_a_prompt_without_words_has_a_vector_of_zeros() -> None:
    t = tiny.load("llava")
    inputs = t.batch(("image", "two_images"), "left").inputs
    tokens, _ = probe("llava", inputs, encoder(question=lambda prompt: "" if "w031" in prompt else "w040"))
    assert bool((tokens[TEXT][0] != 0).all())
    assert not tokens[TEXT][1:].any()


def test_what_is_too_long_is_told_once() -> None:
    inputs = tiny.load("llava").inputs["image"]
    long = encoder(question=lambda prompt: "w040 " * PLACES)
    with pytest.warns(SqueezeWarning, match=f"takes {PLACES} tokens of a prompt, and this one has {PLACES + 2}"):
        tokens, _ = probe("llava", inputs, long)
    torch.testing.assert_close(tokens[TEXT][0, 0], vector("clip", [40] * PLACES), rtol=1e-5, atol=1e-5)


def test_a_method_of_parts_keeps_what_is_like_the_words() -> None:
    t = tiny.load("llava")
    inputs = t.inputs["image"]
    with squeeze.applied(t.model, {"method": "alike", "steps": [SCORED]}, text_encoder=encoder()) as handle:
        oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
        layout, kept, said = handle.layout, handle.cuts[0].kept[0].tolist(), str(handle.report())
    pictures = projected("clip", states_of(t, "encoder.layers.1", inputs)[:, 1:])[0]
    alike = torch.cosine_similarity(pictures, vector("clip", words_of(layout, inputs, 0))[None])
    columns = torch.tensor(layout.spans[0].columns)
    assert set(columns[alike.topk(5).indices].tolist()) == set(kept) & set(columns.tolist())
    assert "own space" not in said


def test_the_report_says_that_the_models_own_space_stood_in() -> None:
    t = tiny.load("llava")
    step = SCORED | {"score": {"text_similarity": {"space": "clip", "fallback": True}}}
    own = SCORED | {"score": {"text_similarity": "llm"}}
    said = []
    for one in (step, own):
        with squeeze.applied(t.model, {"method": "alike", "steps": [one]}) as handle, torch.no_grad():
            t.model(**t.inputs["image"])
        said.append((str(handle.report()), handle.report().as_dict()["signals"], handle.cuts[0].kept[0].tolist()))
    line = "words and pictures compared in the language model's own space: no text_encoder was given"
    assert line in said[0][0].splitlines() and said[0][1] == (line,)
    assert line not in said[1][0] and said[1][1] == ()
    assert said[0][2] == said[1][2]


def refused(family: str, given: Any, says: str, kind: type[SqueezeError], recipe: Any = None) -> None:
    """Apply, which must be refused, and find the model as it was."""
    t = tiny.load(family)
    with pytest.raises(kind, match=says):
        squeeze.apply(t.model, recipe or {"method": "alike", "steps": [SCORED]}, text_encoder=given)
    squeeze.apply(t.model, "random", ratio=0.5).remove()


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    refused("llava", None, "text_encoder=, a CLIP or SigLIP model", UnsupportedModelError)
    wide = squeeze.TextEncoder(pair("clip", 48), tokenizer(False), tokenizer(True))
    refused(
        "llava", wide, "takes patches of 48 channels, and the vision tower of 'llava'.*gives 32", UnsupportedModelError
    )
    nowhere = squeeze.TextEncoder(str(tmp_path / "nowhere"), tokenizer(False))
    refused("llava", nowhere, "nowhere' cannot be loaded, it has no tokenizer", UnsupportedModelError)
    empty = squeeze.TextEncoder(str(tmp_path), tokenizer(False), tokenizer(True))
    refused("llava", empty, f"text_encoder='{tmp_path}' cannot be loaded", UnsupportedModelError)
    refused("llava", pair("clip"), "no tokenizer of this model lies on this machine", ConfigError)
    lone = squeeze.TextEncoder(pair("clip"), tokenizer(False))
    refused("llava", lone, "own_tokenizer=", ConfigError)
    refused("llava", squeeze.TextEncoder(3, tokenizer(False)), "got a int", ConfigError)
    refused("llava", encoder(tokenizer="words"), "got a str", ConfigError)
    one_side: Any = pair("clip")
    text = squeeze.TextEncoder(one_side.text_model, tokenizer(False), tokenizer(True))
    refused("llava", text, "does not put words and pictures into one space", UnsupportedModelError)
    with torch.device("meta"):
        hollow = hf.CLIPModel(one_side.config)
    given = squeeze.TextEncoder(hollow, tokenizer(False), tokenizer(True))
    refused("llava", given, "it is on the meta device, or offloaded", UnsupportedModelError)
    refused("llava", encoder(), "'fastv' compares nothing in the space of one", ConfigError, "fastv")


def test_a_prompt_of_embeddings_has_no_words() -> None:
    t = tiny.load("llava")
    inputs = dict(t.inputs["image"])
    inputs["inputs_embeds"] = t.model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(UnsupportedInputError, match="Call the model with input_ids"):
        probe("llava", inputs, encoder())


@pytest.mark.parametrize(("side", "says"), [("text", r"text gives one vector"), ("image", r"image gives one vector")])
def test_an_encoder_that_gives_something_else_is_named(side: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doubled, side, lambda self, given: torch.zeros(3))
    with pytest.raises(ConfigError, match=rf"Doubled\.{says}.*got a tensor \(3,\)"):
        probe("llava", tiny.load("llava").inputs["image"], squeeze.TextEncoder(Doubled(), tokenizer(False)))


def test_a_folder_is_loaded_on_the_place_of_the_model(tmp_path: Path) -> None:
    pair("clip").save_pretrained(tmp_path)  # type: ignore[operator]
    tokenizer(True).save_pretrained(tmp_path)
    inputs = tiny.load("llava").inputs["image"]
    named, _ = probe("llava", inputs, squeeze.TextEncoder(tmp_path, tokenizer(False)))
    given, _ = probe("llava", inputs, encoder())
    for need in (VISUAL, TEXT):
        torch.testing.assert_close(named[need], given[need])


def test_the_tokenizer_beside_the_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tiny.load("llava")
    tokenizer(False).save_pretrained(tmp_path)
    t.model.config.save_pretrained(tmp_path)
    monkeypatch.setattr(t.model.config, "_name_or_path", str(tmp_path))
    given = squeeze.TextEncoder(pair("clip"), own_tokenizer=tokenizer(True))
    found, _ = probe("llava", t.inputs["image"], given)
    told, _ = probe("llava", t.inputs["image"], encoder())
    torch.testing.assert_close(found[TEXT], told[TEXT])


@pytest.mark.parametrize("same", [True, False])
def test_a_tower_with_other_weights_is_told(same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tiny.load("llava")
    tower = next(one for one in t.model.get_submodule(t.family.tower).modules() if hasattr(one, "patch_embedding"))
    mine: Any = pair("clip")
    theirs = mine.vision_model.embeddings.patch_embedding.weight
    if same:
        monkeypatch.setattr(tower.patch_embedding.weight, "data", theirs.bfloat16().float())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        probe("llava", t.inputs["image"], encoder())
    found = [one for one in told if "other weights than the picture side" in str(one.message)]
    assert len(found) == (0 if same else 1)


def test_features_of_another_encoder_are_refused() -> None:
    t = tiny.load("llava")
    inputs = dict(t.inputs["image"])
    recipe = {"method": "comparing", "steps": [{"reducer": "comparer", "at": "projector", "ratio": 0.5}]}
    with squeeze.applied(t.model, recipe, text_encoder=encoder()), torch.no_grad():
        features = {"image": t.model.model.get_image_features(inputs["pixel_values"])}
        inputs.pop("pixel_values")
        t.model(**inputs, mm_encoder_outputs=features)
    other = squeeze.TextEncoder(Doubled(), tokenizer(False))
    with (
        squeeze.applied(t.model, recipe, text_encoder=other),
        torch.no_grad(),
        pytest.raises(UnsupportedInputError, match="Encode the pictures anew"),
    ):
        t.model(**inputs, mm_encoder_outputs=features)


EACH = Embedding("visual", "clip", raw=True), Embedding("text", "clip", raw=True)


def each_token(ids: Sequence[int]) -> Tensor:
    """Return what CLIP's text tower makes of each token of words with these ids, projected, (M, D)."""
    model: Any = pair("clip")
    framed = torch.tensor([[START, *ids, END]])
    with torch.no_grad():
        return model.text_projection(model.text_model(framed).last_hidden_state)[0]


@pytest.mark.parametrize("prompt", ["image", "batch"])
def test_single_words_and_patches_are_projected_as_they_are(prompt: str) -> None:
    t = tiny.load("llava")
    inputs = t.inputs["image"] if prompt == "image" else t.batch(("image", "two_images"), "left").inputs
    tokens, layout = probe("llava", inputs, encoder(), *EACH)
    states, model = states_of(t, "encoder.layers.1", inputs)[:, 1:], pair("clip")
    for row, span in enumerate(layout.spans):
        mine, wanted = tokens[EACH[1]][row], each_token(words_of(layout, inputs, span.sample))
        torch.testing.assert_close(mine[: len(wanted)], wanted, rtol=1e-5, atol=1e-5)
        assert not mine[len(wanted) :].any()
        with torch.no_grad():
            pictures = model.visual_projection(states[row])  # type: ignore[operator]
        torch.testing.assert_close(tokens[EACH[0]][row][tokens.mask[row]], pictures, rtol=1e-5, atol=1e-5)


def test_a_prompt_without_words_has_no_single_ones() -> None:
    inputs = tiny.load("llava").inputs["image"]
    tokens, _ = probe("llava", inputs, encoder(question=lambda prompt: ""), *EACH)
    assert not tokens[EACH[1]].any()


class Single(Doubled):
    """A space of one's own that tells words apart."""

    def tokens(self, words: Sequence[str]) -> Tensor:
        """Return a row of ones for each word."""
        most = max(len(one.split()) for one in words)
        return torch.stack([(torch.arange(most) < len(one.split())).float()[:, None].expand(-1, 3) for one in words])

    def patches(self, states: Tensor) -> Tensor:
        """Return the first channels."""
        return states[..., :3]


def test_an_encoder_of_ones_own_may_tell_words_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny.load("qwen2_5_vl").inputs["image"]
    given = squeeze.TextEncoder(Single(), tokenizer(False))
    tokens, layout = probe("qwen2_5_vl", inputs, given, *EACH, EncoderStates())
    torch.testing.assert_close(tokens[EACH[0]], tokens[EncoderStates()][..., :3])
    assert tokens[EACH[1]].shape[1] == len(words_of(layout, inputs, 0))
    for side, says in (("tokens", "a vector for each token of each text"), ("patches", "one vector for each patch")):
        with monkeypatch.context() as patch:
            patch.setattr(Single, side, lambda self, given: torch.zeros(3))
            with pytest.raises(ConfigError, match=rf"Single\.{side} gives {says}.*got a tensor \(3,\)"):
                probe("qwen2_5_vl", inputs, given, *EACH)


@pytest.mark.parametrize("given", [squeeze.TextEncoder(Doubled(), tokenizer(False)), encoder("siglip")])
def test_single_words_are_refused_where_there_are_none(given: Any) -> None:
    refused("llava", given, "compares single words with patches.*space: llm", UnsupportedModelError, "visiontrim")


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_visiontrim_cuts_a_model(family: str) -> None:
    t = tiny.load(family)
    for changes in ({}, {"variant": "paper"}, {"space": "llm"}):
        given = None if changes.get("space") else encoder()
        with squeeze.applied(t.model, "visiontrim", keep=6, text_encoder=given, **changes) as handle, torch.no_grad():
            t.model(**t.inputs["image"])
            left = handle.report().as_dict()
            assert handle.layout is not None
            columns = torch.tensor(handle.layout.spans[0].columns)
            assert len(set(handle.cuts[0].kept[0].tolist()) & set(columns.tolist())) == 6, left


WHOLE = Embedding("visual", "clip", pooled=True)


@pytest.mark.parametrize(("family", "kind", "block", "special"), FAMILIES)
@pytest.mark.parametrize("prompt", ["image", "two_images"])
def test_a_whole_picture_is_what_the_encoder_makes_of_it(
    family: str, kind: str, block: str, special: int, prompt: str
) -> None:
    """CLIP projects the CLS token, SigLIP's head pools all patches."""
    t = tiny.load(family)
    model: Any = pair(kind)
    tokens, layout = probe(family, t.inputs[prompt], encoder(kind), WHOLE, TEXT)
    with torch.no_grad():
        normed = model.vision_model.post_layernorm(states_of(t, block, t.inputs[prompt]))
        wanted = model.visual_projection(normed[:, 0]) if special else model.vision_model.head(normed)
    assert len(wanted) == len(layout.spans)
    for row in range(len(wanted)):
        for vector_of_token in tokens[WHOLE][row][tokens.mask[row]]:
            torch.testing.assert_close(vector_of_token, wanted[row], rtol=1e-5, atol=1e-5)


def test_each_frame_of_a_video_has_its_vector() -> None:
    t = tiny.load("llava_onevision")
    inputs = t.inputs["video"]
    recipe = {"reducer": "comparer", "at": "projector", "ratio": 0.5, "separators": "keep"}
    tokens, layout = probe("llava_onevision", inputs, encoder("siglip"), WHOLE, TEXT, **recipe)
    (tile,) = layout.spans[0].tiles
    frames = tokens[WHOLE][0][tokens.mask[0]].unflatten(0, (tile.frames, -1))
    torch.testing.assert_close(frames, frames[:, :1].expand_as(frames))
    assert tile.frames > 1 and not torch.allclose(frames[0, 0], frames[1, 0], atol=1e-4)


def test_the_pooling_head_of_the_encoder_stands_in_for_the_towers() -> None:
    t = tiny.load("paligemma2")
    model: Any = pair("siglip")
    seen = EncoderAttention("feature", rows="probe", heads="mean")
    tokens, _ = probe("paligemma2", t.inputs["image"], encoder("siglip"), WHOLE, TEXT, seen)
    with torch.no_grad():
        normed = model.vision_model.post_layernorm(states_of(t, "encoder.layers.2", t.inputs["image"]))
        head = model.vision_model.head
        _, weights = head.attention(head.probe.expand(len(normed), -1, -1), normed, normed)
    torch.testing.assert_close(tokens[seen][0][tokens.mask[0]], weights[0, 0], rtol=1e-5, atol=1e-5)


class Pooled(Doubled):
    """A space that knows whole pictures too."""

    def picture(self, states: Tensor) -> Tensor:
        """Return the sum of the states."""
        return states.sum(1)


def test_an_encoder_of_ones_own_may_pool() -> None:
    inputs = tiny.load("llava_onevision").inputs["video"]
    recipe = {"reducer": "comparer", "at": "projector", "ratio": 0.5, "separators": "keep"}
    given = squeeze.TextEncoder(Pooled(), tokenizer(False))
    tokens, layout = probe("llava_onevision", inputs, given, WHOLE, TEXT, EncoderStates(), **recipe)
    assert len(tokens[WHOLE][0].unique(dim=0)) == layout.spans[0].tiles[0].frames


def test_where_no_vector_of_a_picture_is_to_be_had() -> None:
    step = {"at": "projector", "keep": 5, "score": {"text_similarity": {"space": "clip", "of": "pictures"}}}
    recipe = {"method": "alike", "steps": [step]}
    refused("paligemma2", encoder("clip"), "has no head that pools patches", UnsupportedModelError, recipe)
    bare = squeeze.TextEncoder(Doubled(), tokenizer(False))
    refused("paligemma2", bare, "has no head that pools patches", UnsupportedModelError, recipe)
    refused("qwen2_5_vl", bare, "packs the patches of all frames into one row", UnsupportedModelError, recipe)
    Pooled.picture, kept = lambda self, states: states, Pooled.picture  # type: ignore[method-assign]
    try:
        with pytest.raises(ConfigError, match=r"Pooled\.picture gives one vector for each picture"):
            probe(
                "paligemma2",
                tiny.load("paligemma2").inputs["image"],
                squeeze.TextEncoder(Pooled(), tokenizer(False)),
                WHOLE,
                TEXT,
            )
    finally:
        Pooled.picture = kept  # type: ignore[method-assign]
