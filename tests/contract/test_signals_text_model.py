"""What a rule reads of the language model is what the dense eager model computes: by its maps, and by its modules."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import cache_role
import matrix
import mllm_squeeze as squeeze
import oracle
import tiny
from families import proof
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.reducers.base import Place, Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Attention, Embedding, Need, Normed, Projection, States
from mllm_squeeze.registry import register_reducer, unregister_reducer

# Plain; three axes of positions; windows and pictures whose tokens see each other both ways; a soft cap.
FAMILIES = [name for name in ("llava", "qwen2_5_vl", "gemma3_window", "paligemma2") if tiny.available(name)]
CUT = 3


class Probe(Reducer):
    """Keep the first tokens, and tell a test what was given."""

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    wanted: ClassVar[tuple[Need, ...]] = ()
    seen: ClassVar[list[VisualTokens]] = []

    def needs(self) -> tuple[Need, ...]:
        """Return what the test wants."""
        return self.wanted

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Keep the first tokens."""
        self.seen.append(tokens)
        number = torch.arange(tokens.mask.shape[1])
        return Reduction(tokens.mask & (number < tokens.budget[:, None]))


class Chooser(Probe):
    """Reads the second and third word."""

    def choose_rows(self, tokens: VisualTokens) -> Tensor:
        """Return the second and third word."""
        number = torch.arange(tokens.words.shape[1])
        return tokens.words & (number > 0) & (number < 3)


@pytest.fixture(autouse=True)
def reducers() -> Iterator[None]:
    """Register the reducers for a test."""
    register_reducer("probe", Probe)
    register_reducer("chooser", Chooser)
    yield
    unregister_reducer("probe")
    unregister_reducer("chooser")


@contextmanager
def attention(t: tiny.TinyModel, implementation: str) -> Iterator[None]:
    """Set an attention implementation for a while, where the text model has more than one."""
    if oracle.text_model(t.model).config._attn_implementation == implementation:
        yield
        return
    with matrix.attention(t.model, implementation):
        yield


def cells(*implementations: str) -> list[Any]:
    """Return families with the implementations that they have: a soft cap is eager's alone."""
    return [(name, how) for name in FAMILIES for how in implementations if name != "paligemma2" or how == "eager"]


class Dense:
    """One dense eager pass: attention maps (B, H, T, T), and what modules got and gave, by layer and name."""

    def __init__(self, t: tiny.TinyModel, inputs: tiny.Inputs) -> None:
        self.states: dict[tuple[int, str], Tensor] = {}
        text = oracle.text_model(t.model)
        hooks = []
        for number, layer in enumerate(text.layers):
            hooks.append(layer.register_forward_hook(functools.partial(self._note, number, ""), with_kwargs=True))
            for name, module in layer.named_modules():
                hook = functools.partial(self._note, number, name)
                hooks += [module.register_forward_hook(hook, with_kwargs=True)] if name else []
        try:
            with attention(t, "eager"), torch.no_grad():
                width = inputs["input_ids"].shape[1]
                where = oracle.positions(t.model, inputs, 0)[..., :width]
                out = t.model(**inputs, position_ids=where, output_attentions=True, use_cache=True)
        finally:
            for hook in hooks:
                hook.remove()
        self.maps = [one.float() for one in out.attentions]
        self.cache = cache_role.of_output(out)

    def _note(self, number: int, name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        self.states[number, f"{name}<"] = given
        self.states[number, f"{name}>"] = output[0] if isinstance(output, tuple) else output


@functools.cache
def prompts(family: str, kind: str) -> tuple[tiny.Inputs, Dense]:
    """Return a prompt, or a padded batch of several, and the dense pass over it."""
    t = tiny.load(family)
    inputs = t.batch(("image", "two_images"), "left").inputs if kind == "batch" else t.inputs[kind]
    return inputs, Dense(t, inputs)


def probe(
    family: str, inputs: tiny.Inputs, needs: tuple[Need, ...], implementation: str = "", **step: Any
) -> tuple[VisualTokens, TokenLayout, Any]:
    """Return what a probe at a layer was given, where the spans were, and the handle's cuts."""
    t = tiny.load(family)
    Probe.wanted = Chooser.wanted = needs
    Probe.seen.clear()
    early, cache = step.pop("early", []), step.pop("cache", None)
    last = {"reducer": "probe", "at": {"layer": CUT}, "ratio": 0.5} | step
    recipe = {"method": "probing", "steps": [*early, last]}
    implementation = implementation or oracle.text_model(t.model).config._attn_implementation
    with attention(t, implementation), squeeze.applied(t.model, recipe) as handle:
        oracle.run(t.model, inputs, oracle.forced_tokens(inputs["input_ids"].shape[0], 0), cache)
        return Probe.seen[-1], handle.layout, handle.cuts


def words_of(layout: TokenLayout, sample: int) -> Tensor:
    """Return the columns of the words behind the first visual token."""
    behind = layout.real[sample] & ~layout.visual[sample]
    behind[: int(layout.visual[sample].nonzero()[0])] = False
    return behind.nonzero().flatten()


def compare(tokens: VisualTokens, need: Any, expected: list[Tensor]) -> None:
    """Compare states of the visual tokens, or of the words, with those expected of each span."""
    mask = tokens.words if need.of == "text" else tokens.mask
    for row, one in enumerate(expected):
        torch.testing.assert_close(tokens[need][row][mask[row]], one, rtol=1e-5, atol=1e-5, msg=says(need))


def join(scores: Tensor, how: str, axis: int) -> Tensor:
    """Join an axis as a need says it."""
    if how == "each":
        return scores
    return scores.amax(axis) if how == "max" else getattr(scores, how)(axis)


def expected_attention(
    need: Attention, maps: Tensor, visual: Tensor, words: Tensor, real: Any = slice(None), chosen: Any = ()
) -> Tensor:
    """Return, of the map (H, T, T) of one sample, what a need asks: literally, by rows, columns, heads, rows."""
    columns = visual if need.columns == "visual" else words
    if need.rows == "all":
        # Padding sees everything where it sees nothing.
        maps = maps[:, real][..., columns]
        scores = join(maps, need.heads, 0)
        if need.over_rows == "mean":
            return scores.sum(-2) / (maps > 0).any(0).sum(0)
        return join(scores, need.over_rows, -2)
    rows = {"last": torch.tensor([maps.shape[1] - 1]), "text": words, "visual": visual, "chosen": chosen}[need.rows]
    return join(join(maps[:, rows][..., columns], need.heads, 0), need.over_rows, -2)


def picked(tokens: VisualTokens, need: Attention, row: int) -> Tensor:
    """Return the scores of one span without padding, after a look at its rows: where there is no row, they are 0."""
    scores = tokens[need][row][..., (tokens.words if need.columns == "text" else tokens.mask)[row]]
    if need.over_rows != "each" or need.rows == "last":
        return scores
    there = (tokens.words if need.rows == "text" else tokens.mask)[row]
    assert not scores[..., ~there, :].any(), f"{need} has rows where there is none"
    return scores[..., there, :]


def says(need: Need) -> Any:
    """Return what tells the need in a message."""
    return lambda message: f"{need}: {message}"


ATTENTION = (
    *(Attention(block=block, rows="text") for block in (-1, -2, 0, "next")),
    *(Attention(rows=rows, block=block) for rows in ("last", "visual", "all") for block in (-1, "next")),
    *(Attention(rows="visual", heads=heads, over_rows=rows) for heads in ("max", "each") for rows in ("sum", "max")),
    *(Attention(rows="visual", heads=heads, over_rows="each") for heads in ("mean", "sum", "each")),
    Attention(rows="text", heads="each", over_rows="each"),
    Attention(rows="text", heads="max", over_rows="mean", columns="text"),
    Attention(rows="visual", columns="text", over_rows="max", block="next"),
    Attention(rows="all", heads="each"),
    Attention(rows="all", heads="max", over_rows="max", columns="text"),
    Attention(rows="all", heads="sum", over_rows="sum", block=1),
    Attention(rows="last", over_rows="each"),
)


@pytest.mark.parametrize("kind", ["two_images", "batch"])
@pytest.mark.parametrize(("family", "implementation"), cells("sdpa", "eager"))
def test_attention(family: str, kind: str, implementation: str) -> None:
    inputs, dense = prompts(family, kind)
    tokens, layout, _ = probe(family, inputs, ATTENTION, implementation)
    for need in ATTENTION:
        number = CUT if need.block == "next" else CUT + need.block if need.block < 0 else need.block
        expected = [
            expected_attention(
                need,
                dense.maps[number][span.sample],
                torch.tensor(span.columns),
                words_of(layout, span.sample),
                layout.real[span.sample],
            )
            for span in layout.spans
        ]
        for row, wanted in enumerate(expected):
            torch.testing.assert_close(picked(tokens, need, row), wanted, rtol=1e-5, atol=1e-5, msg=says(need))


@pytest.mark.parametrize("block", [-1, "next"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_chosen_rows(family: str, block: Any) -> None:
    needs = tuple(Attention(rows="chosen", block=block, over_rows=how) for how in ("mean", "sum", "max"))
    inputs, dense = prompts(family, "batch")
    tokens, layout, _ = probe(family, inputs, needs, reducer="chooser")
    for need in needs:
        expected = []
        for span in layout.spans:
            words = words_of(layout, span.sample)
            # Spans of a sample vote together.
            number = CUT if block == "next" else CUT - 1
            maps = dense.maps[number][span.sample]
            expected.append(expected_attention(need, maps, torch.tensor(span.columns), words, chosen=words[1:3]))
        for row, wanted in enumerate(expected):
            torch.testing.assert_close(picked(tokens, need, row), wanted, rtol=1e-5, atol=1e-5, msg=says(need))


PROJECTIONS = tuple(
    Projection(what=what, of=of, block=block, rope=rope, heads=heads)
    for what in ("key", "value", "query")
    for of, block, heads in (("visual", -1, "each"), ("text", -2, "concat"), ("visual", "next", "mean"))
    for rope in (True, False)
    if what != "query" or not rope
)


@pytest.mark.parametrize("kind", ["two_images", "batch"])
@pytest.mark.parametrize(("family", "implementation"), cells("sdpa", "eager"))
def test_projections(family: str, kind: str, implementation: str) -> None:
    """Behind the rotary embedding they are what a cache holds, in front of it what the module gives."""
    inputs, dense = prompts(family, kind)
    query = Projection(what="query", heads="each")
    tokens, layout, _ = probe(family, inputs, (*PROJECTIONS, query), implementation)
    attention = oracle.text_model(tiny.load(family).model).layers[0].self_attn
    for need in PROJECTIONS:
        number = CUT if need.block == "next" else CUT + need.block
        if need.rope:
            held = dense.cache.layers[number]
            # A layer with a window lets go of keys that were seen.
            if held.keys.shape[2] < layout.length:
                continue
            states = (held.keys if need.what == "key" else held.values).transpose(1, 2)
        else:
            states = dense.states[number, f"self_attn.{need.what[0]}_proj>"].unflatten(-1, (-1, attention.head_dim))
        states = states.mean(2) if need.heads == "mean" else states
        states = states.flatten(2) if need.heads == "concat" else states
        expected = [
            states[span.sample, words_of(layout, span.sample) if need.of == "text" else torch.tensor(span.columns)]
            for span in layout.spans
        ]
        compare(tokens, need, expected)
    _check_queries(tokens, query, Projection(heads="each"), layout, dense, attention)


def _check_queries(
    tokens: VisualTokens, query: Projection, key: Projection, layout: TokenLayout, dense: Dense, attention: Any
) -> None:
    """Queries and keys behind the rotary embedding give the map, up to what each row is divided by."""
    if getattr(attention, "attn_logit_softcapping", None):
        return
    for row, span in enumerate(layout.spans):
        columns = torch.tensor(span.columns)
        q, k = (tokens[need][row][: span.length].transpose(0, 1) for need in (query, key))
        logits = q @ k.repeat_interleave(q.shape[0] // k.shape[0], 0).transpose(1, 2) * attention.scaling
        maps = dense.maps[CUT - 1][span.sample][:, columns][..., columns]
        open_ = maps > 0
        share = logits.exp() * open_
        torch.testing.assert_close(share / share.sum(-1, keepdim=True), maps / maps.sum(-1, keepdim=True))


STATES = {
    "in": "<",
    "attention_in": "self_attn<",
    "attention_out": "self_attn>",
    "mlp_in": "mlp<",
    "mlp_out": "mlp>",
    "gate": "mlp.down_proj<",
}
SANDWICHED = {"attention_out": "post_attention_layernorm>", "mlp_out": "post_feedforward_layernorm>"}


@pytest.mark.parametrize("kind", ["two_images", "batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states(family: str, kind: str) -> None:
    inputs, dense = prompts(family, kind)
    pairs = ((-1, "visual"), (0, "text"))
    needs = [States(where=where, block=block, of=of) for where in STATES for block, of in pairs]
    others = [Normed("visual"), Normed("text"), Embedding("visual"), Embedding("text")]
    tokens, layout, _ = probe(family, inputs, (*needs, *others))
    norm = oracle.text_model(tiny.load(family).model).norm
    names = STATES | (SANDWICHED if "gemma" in family else {})
    for need in (*needs, *others):
        if isinstance(need, States):
            states = dense.states[CUT + need.block if need.block < 0 else need.block, names[need.where]]
        elif isinstance(need, Normed):
            states = norm(dense.states[CUT, "<"]).detach()
        else:
            states = dense.states[0, "<"]
        expected = [
            states[span.sample, words_of(layout, span.sample) if need.of == "text" else torch.tensor(span.columns)]
            for span in layout.spans
        ]
        compare(tokens, need, expected)


# What the layers of these do beside adding attention and MLP, or why they have no layers to read.
OTHER_LAYERS = {
    "gemma3n": "several streams",
    "gemma4": "a scale and an input of its own",
    "mllama": "pictures are keys",
    "muse_spark": "a gate of its own on both branches",
    **proof.REFUSED,
}


@pytest.mark.parametrize("family", [name for name in tiny.ALL_FAMILIES if name not in OTHER_LAYERS])
def test_what_a_layer_adds_makes_the_next_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Input, attention and MLP sum up to the next layer's input; of words, as some models add pictures in between."""
    t = tiny.load(family)
    layers = oracle.text_model(t.model).layers
    number = next(n for n, layer in enumerate(layers) if hasattr(layer, "self_attn"))
    # Some multiply what is added; tiny models do so by 1.
    if hasattr(layers[number], "residual_multiplier"):
        monkeypatch.setattr(layers[number], "residual_multiplier", 0.5)
    read = (("in", number), ("attention_out", number), ("mlp_out", number), ("in", number + 1))
    needs = tuple(States(where, of="text", block=block) for where, block in read)
    recipe = {"method": "probing", "steps": [{"reducer": "probe", "at": {"layer": number + 2}, "ratio": 0.5}]}
    Probe.wanted = needs
    with squeeze.applied(t.model, recipe), torch.no_grad():
        t.model(**t.inputs[next(iter(t.inputs))])
    tokens = Probe.seen[-1]
    first, attention, mlp, second = (tokens[need][tokens.words] for need in needs)
    torch.testing.assert_close(first + attention + mlp, second, rtol=1e-4, atol=1e-5)


FOLLOWED = (
    Attention(rows="last", block=-2),
    Attention(rows="visual", over_rows="each", heads="each", block=0),
    Attention(rows="text", block=0, columns="text", over_rows="each"),
    Projection("key", block=0),
    States("mlp_in", block=0),
    Embedding("visual"),
    Embedding("text"),
)
EARLY = [
    {"select": "even_sample", "at": {"layer": 2}, "ratio": 0.25},
    {"score": "random", "at": {"layer": CUT}, "ratio": 0.5},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_read_follows_cuts(family: str) -> None:
    """Two cuts, one of them at the same layer, come between what is read and its use; rows of a batch differ."""
    inputs, dense = prompts(family, "batch")
    tokens, layout, cuts = probe(family, inputs, FOLLOWED, early=EARLY, ratio=0.75)
    for row, span in enumerate(layout.spans):
        left = torch.tensor(sorted(set(cuts[1].kept[span.sample].tolist()) & set(span.columns)))
        assert 0 < len(left) < span.length
        words, sample = words_of(layout, span.sample), span.sample
        maps, mask, there = dense.maps, tokens.mask[row], tokens.words[row]
        expected = {
            FOLLOWED[0]: (maps[1][sample].mean(0)[-1, left], tokens[FOLLOWED[0]][row][mask]),
            FOLLOWED[1]: (
                maps[0][sample][:, left][..., left],
                tokens[FOLLOWED[1]][row][:, mask][..., mask],
            ),
            FOLLOWED[2]: (maps[0][sample].mean(0)[words][:, words], tokens[FOLLOWED[2]][row][there][:, there]),
            FOLLOWED[4]: (dense.states[0, "mlp<"][sample, left], tokens[FOLLOWED[4]][row][mask]),
            FOLLOWED[5]: (dense.states[0, "<"][sample, left], tokens[FOLLOWED[5]][row][mask]),
            FOLLOWED[6]: (dense.states[0, "<"][sample, words], tokens[FOLLOWED[6]][row][there]),
        }
        for need, (wanted, given) in expected.items():
            torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5, msg=says(need))


LATER = (
    Attention(rows="last"),
    Attention(rows="visual", block="next"),
    Attention(rows="text", block="next"),
    Attention(rows="all"),
)


@pytest.mark.parametrize(("family", "implementation"), cells("sdpa", "eager"))
def test_attention_behind_a_cut(family: str, implementation: str) -> None:
    """Of layers that run short it is what the dense model gives whose dropped tokens are closed to all others."""
    inputs, _ = prompts(family, "batch")
    t = tiny.load(family)
    tokens, layout, cuts = probe(family, inputs, LATER, implementation, early=EARLY[:1], ratio=0.5)
    with oracle.masked(t.model, inputs["input_ids"].shape[1], cuts[:1]):
        masked = Dense(t, inputs)
    for need in LATER:
        number = CUT if need.block == "next" else CUT - 1
        for row, span in enumerate(layout.spans):
            kept = cuts[0].kept[span.sample]
            left = torch.tensor(sorted(set(kept.tolist()) & set(span.columns)))
            maps = masked.maps[number][span.sample][:, kept][..., kept]
            where = {int(column): n for n, column in enumerate(kept)}
            visual = torch.tensor([where[int(column)] for column in left])
            words = torch.tensor([where[int(column)] for column in words_of(layout, span.sample)])
            wanted = expected_attention(need, maps, visual, words)
            torch.testing.assert_close(tokens[need][row][tokens.mask[row]], wanted, rtol=1e-5, atol=1e-5)


def test_projections_that_come_out_of_one_module() -> None:
    """Values are not rotated, so that what is taken of the joint output is what attention gets."""
    if not tiny.available("phi4_multimodal"):
        pytest.skip("this transformers does not have the family")
    needs = tuple(Projection("value", rope=rope, heads="each") for rope in (True, False))
    t = tiny.load("phi4_multimodal")
    query = Projection("query", rope=False)
    joint: list[Tensor] = []
    module = oracle.text_model(t.model).layers[CUT - 1].self_attn.qkv_proj
    hook = module.register_forward_hook(lambda module, args, output: joint.append(output))
    try:
        tokens, layout, _ = probe("phi4_multimodal", t.inputs["image"], (*needs, query))
    finally:
        hook.remove()
    torch.testing.assert_close(tokens[needs[1]], tokens[needs[0]])
    (span,) = layout.spans
    wanted = joint[0][0, torch.tensor(span.columns)][:, : tokens[query].shape[-1]]
    torch.testing.assert_close(tokens[query][0], wanted)


# All tokens

OF_ALL = (States("attention_in", of="all"), Projection("key", of="all", rope=False, heads="concat"))


@pytest.mark.parametrize("kind", ["image", "batch"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name in ("llava", "qwen2_5_vl")])
def test_signals_of_all_tokens(family: str, kind: str) -> None:
    """Those in front of the pictures too, padding told apart, and where the visual ones stand among them."""
    inputs, dense = prompts(family, kind)
    tokens, layout, _ = probe(family, inputs, OF_ALL)
    states, keys = (tokens[need] for need in OF_ALL)
    theirs = dense.states[CUT - 1, "self_attn<"], dense.states[CUT - 1, "self_attn.k_proj>"]
    for row, span in enumerate(layout.spans):
        for need, mine, whole in zip(OF_ALL, (states, keys), theirs, strict=True):
            among = tokens.among[need]
            assert torch.equal(among.present[row], layout.real[span.sample])
            assert among.place[row, : span.length].tolist() == list(span.columns)
            real = layout.real[span.sample]
            oracle.assert_close(mine[row][real], whole[span.sample][real], str(need))


def test_signals_of_all_tokens_are_those_of_their_time() -> None:
    """What was read in front of an earlier cut speaks of the tokens that were dropped since, too."""
    need = States("attention_in", of="all", block=0)
    inputs, dense = prompts("llava", "image")
    early = [{"at": {"layer": 1}, "ratio": 0.25, "select": "stride"}]
    tokens, layout, cuts = probe("llava", inputs, (need,), early=early)
    (span,), among = layout.spans, tokens.among[need]
    assert tokens[need].shape[1] == inputs["input_ids"].shape[1]
    left = [column for column in span.columns if column in set(cuts[0].kept[0].tolist())]
    assert among.place[0, : len(left)].tolist() == left
    oracle.assert_close(tokens[need][0], dense.states[0, "self_attn<"][0], "of all, then")
