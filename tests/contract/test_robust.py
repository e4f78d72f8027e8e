"""What people do to a model while a method is applied: switch attention, copy, save, interrupt, quantise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matrix
import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny

METHODS = matrix.EVERYWHERE
# What bfloat16 rounds otherwise on a shorter sequence (0.012 seen); one other token cut moves logits by 0.026 or more.
HALF = 0.02
# Activations of 8 bits on a scale that cut rows have a part in (0.14 seen): no proof, but nonsense would be seen.
SHARED_SCALE = 0.25
CELLS = [(f, m) for f in matrix.REPRESENTATIVE for m in METHODS]


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_attention_switched_while_applied(family: str, method: str) -> None:
    """set_attn_implementation() takes effect while applied, also where attention is read, and outlives remove()."""
    t = tiny.fresh(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 3)
    with matrix.applied(t.model, method):
        expected = oracle.run(t.model, inputs, forced)
        t.model.set_attn_implementation("eager")
        got = oracle.run(t.model, inputs, forced)
        oracle.assert_close(got.prefill, expected.prefill, "prefill")
        oracle.assert_close(got.decode, expected.decode, "decode")
    configs = [m.config for m in t.model.modules() if hasattr(m, "config")]
    assert {c._attn_implementation for c in configs} == {"eager"}
    with torch.no_grad():
        assert t.model(**inputs, output_attentions=True).attentions[0] is not None


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_embeddings_in_place_of_ids(family: str, method: str) -> None:
    """With inputs_embeds the library finds placeholders by their embedding; so does the handle."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 0)
    embeds = t.model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {k: v for k, v in inputs.items() if k != "input_ids"}
    where = oracle.positions(t.model, inputs, 0)
    with matrix.applied(t.model, method), torch.no_grad():
        expected = oracle.run(t.model, inputs, forced)
        got = t.model(**given, inputs_embeds=embeds, position_ids=where, use_cache=True)
    assert torch.equal(got.logits, expected.prefill)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_a_model_that_assists_itself(family: str, method: str) -> None:
    """Two caches of one squeezed model in one generate."""
    t = tiny.load(family)
    settings: dict[str, Any] = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    with matrix.applied(t.model, method):
        greedy = t.model.generate(**t.inputs["image"], **settings)
        assisted = t.model.generate(**t.inputs["image"], **settings, assistant_model=t.model)
    assert torch.equal(greedy.sequences, assisted.sequences)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("where", ["text model", "layer", "tower"])
@pytest.mark.parametrize("method", ["fastv", "visionzip"])
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_an_interrupt(family: str, method: str, where: str) -> None:
    """Ctrl-C in the middle of a forward: torch runs no hooks for it, and yet nothing is left behind."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 3)
    text = oracle.text_model(t.model)
    module = {"text model": text, "layer": text.layers[3], "tower": t.model.get_submodule(t.family.tower)}[where]
    embeds = t.model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        dense = text(inputs_embeds=embeds).last_hidden_state
    before = snapshot.snapshot(t.model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with matrix.applied(t.model, method):
        good = oracle.run(t.model, inputs, forced)
        hook = module.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            t.model(**inputs)
        hook.remove()
        with torch.no_grad():
            alone = text(inputs_embeds=embeds).last_hidden_state
        assert torch.equal(alone, dense), "the text model alone still thinks of the picture of the interrupted call"
        again = oracle.run(t.model, inputs, forced)
        assert torch.equal(again.prefill, good.prefill)
        assert torch.equal(again.decode, good.decode)
    snapshot.assert_same(before, snapshot.snapshot(t.model))


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_a_hook_of_the_user_that_raises_first(family: str, method: str) -> None:
    """The user's hook was there before ours: it raises before ours ran, ours must not undo what they never did."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 2)

    def fail(*_: Any) -> None:
        if broken:
            raise RuntimeError("planned")

    broken = False
    for module in (t.model.model, oracle.text_model(t.model), oracle.text_model(t.model).layers[2]):
        hook = module.register_forward_pre_hook(fail)
        try:
            with matrix.applied(t.model, method):
                good = oracle.run(t.model, inputs, forced)
                broken = True
                with pytest.raises(RuntimeError, match="planned"):
                    t.model(**inputs)
                broken = False
                again = oracle.run(t.model, inputs, forced)
        finally:
            hook.remove()
        assert torch.equal(good.prefill, again.prefill)
        assert torch.equal(good.decode, again.decode)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_a_deep_copy_of_the_model(family: str, method: str) -> None:
    """A copy would share the hooks of the original: an error says to remove first. Copies made before are free."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 2)
    dense = oracle.run(t.model, inputs, forced)
    before = snapshot.snapshot(t.model)
    with matrix.applied(t.model, method):
        squeezed = oracle.run(t.model, inputs, forced)
        with pytest.raises(squeeze.SqueezeError, match=f"{method}.*remove"):
            copy.deepcopy(t.model)
        again = oracle.run(t.model, inputs, forced)
    assert torch.equal(again.prefill, squeezed.prefill)
    snapshot.assert_same(before, snapshot.snapshot(t.model))
    twin = copy.deepcopy(t.model)
    with matrix.applied(t.model, method):
        assert torch.equal(oracle.run(twin, inputs, forced).prefill, dense.prefill)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_saved_while_applied(family: str, method: str, tmp_path: Path) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 2)
    dense = oracle.run(t.model, inputs, forced)
    with matrix.applied(t.model, method):
        t.model.save_pretrained(tmp_path)
    loaded = type(t.model).from_pretrained(tmp_path).eval()
    assert "squeeze" not in (tmp_path / "config.json").read_text()
    oracle.assert_close(oracle.run(loaded, inputs, forced).prefill, dense.prefill, "loaded")


class EightBit(nn.Module):
    """A linear layer that is none of torch's, with weights of 8 bits; a row of its answer hangs on that row alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.bits = (weight / self.scale).round().to(torch.int8)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer says of x (..., in)."""
        return nn.functional.linear(x, self.bits.to(x.dtype) * self.scale, self.bias)


def eight_bit(layers: nn.ModuleList) -> nn.ModuleList:
    """Put layers of 8 bits in the place of all linear ones."""
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, EightBit(child))
    return layers


def dynamic(layers: nn.ModuleList) -> nn.ModuleList:
    """Return the layers with torch's own: activations are rounded on a scale that all rows of a call share."""
    return torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize(("quantise", "tolerance"), [(eight_bit, oracle.TOLERANCE), (dynamic, SHARED_SCALE)])
@pytest.mark.parametrize(("family", "method"), CELLS)
def test_quantised_linears(family: str, method: str, quantise: Any, tolerance: float) -> None:
    """Methods call modules, they read no weights: the masked model with the same layers says the same."""
    t = tiny.fresh(family)
    text = oracle.text_model(t.model)
    text.layers = quantise(text.layers)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 3)
    with matrix.applied(t.model, method) as handle:
        with oracle.capture(t.model, range(4)) as states:
            squeezed = oracle.run(t.model, inputs, forced)
        generated = oracle.generate(t.model, inputs, forced)
        cuts, repack = handle.cuts, matrix.repacks(handle)
    assert cuts
    expected = oracle.masked_logits(t.model, inputs, cuts, forced, matrix.merged(method, cuts, states), repack)
    oracle.assert_close(squeezed.prefill[:, -1], expected.prefill[:, -1], "prefill", tolerance)
    oracle.assert_close(squeezed.decode, expected.decode, "decode", tolerance)
    oracle.assert_close(generated[:, 1:], squeezed.decode, "generate")


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_autocast(family: str, method: str) -> None:
    """The masked model under autocast says the same, but for the roundings of bfloat16."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with matrix.applied(t.model, method) as handle:
            with oracle.capture(t.model, range(4)) as states:
                squeezed = oracle.run(t.model, inputs, forced)
            cuts, repack = handle.cuts, matrix.repacks(handle)
        assert cuts
        expected = oracle.masked_logits(t.model, inputs, cuts, forced, matrix.merged(method, cuts, states), repack)
    alive = oracle.survivors(inputs, cuts)
    oracle.assert_close(squeezed.prefill[alive], expected.prefill[alive], "prefill", HALF)
    oracle.assert_close(squeezed.decode, expected.decode, "decode", HALF)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_generate_records_hidden_states(family: str, method: str) -> None:
    t = tiny.load(family)
    settings: dict[str, Any] = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    with matrix.applied(t.model, method):
        plain = t.model.generate(**t.inputs["image"], **settings)
        recorded = t.model.generate(**t.inputs["image"], **settings, output_hidden_states=True)
    assert torch.equal(torch.stack(plain.logits), torch.stack(recorded.logits))
    assert len(recorded.hidden_states) == 3


@pytest.mark.quick
def test_names_stay_what_they_are() -> None:
    """`squeeze.families` is a function and goes on being one; it is also the name of a subpackage."""
    for _ in range(2):
        assert "llava" in squeeze.families()
        assert "fastv" in squeeze.methods()
        with matrix.applied(tiny.load("llava").model, "fastv"):
            pass
