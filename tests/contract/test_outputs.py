"""Outputs keep transformers' contract: full-length logits, labels, logits_to_keep, hidden states, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

import matrix
import oracle
import tiny
from mllm_squeeze import errors

METHODS = matrix.EVERYWHERE


def squeezed(family: str, method: str, kind: str = "image", **settings: Any) -> tuple[tiny.TinyModel, Any, Any]:
    """Return the model, its output without gradients, and the cuts."""
    t = tiny.load(family)
    with matrix.applied(t.model, method) as handle, torch.no_grad():
        out = t.model(**t.inputs[kind], **settings)
        return t, out, handle.cuts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_logits_to_keep(family: str, method: str) -> None:
    _, full, _ = squeezed(family, method)
    _, last, _ = squeezed(family, method, logits_to_keep=1)
    _, some, _ = squeezed(family, method, logits_to_keep=5)
    _, picked, _ = squeezed(family, method, logits_to_keep=torch.tensor([0, 7, 9]))
    # A head that multiplies fewer rows may round otherwise, with or without a squeeze.
    oracle.assert_close(last.logits, full.logits[:, -1:], "one", 1e-6)
    oracle.assert_close(some.logits, full.logits[:, -5:], "five", 1e-6)
    oracle.assert_close(picked.logits, full.logits[:, [0, 7, 9]], "by index", 1e-6)


@pytest.mark.parametrize("method", ["random", "fastv", "pyramiddrop"])
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_cut_columns_carry_the_state_they_had(family: str, method: str) -> None:
    """Their logits are the head on the final norm of the state at the layer of the cut, as the dense model has it."""
    t, out, cuts = squeezed(family, method)
    text, head = oracle.text_model(t.model), t.model.get_output_embeddings()
    inputs, repack = t.inputs["image"], method == "pyramiddrop" and not hasattr(t.model.model, "get_rope_index")
    width = inputs["input_ids"].shape[1]
    with oracle.masked(t.model, width, cuts, repack=repack), oracle.capture(t.model, range(4)) as states:
        oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
    alive = torch.ones(width, dtype=torch.bool)
    for cut in cuts:
        here = torch.zeros(width, dtype=torch.bool)
        here[cut.kept[0]] = True
        gone = alive & ~here
        assert gone.any()
        with torch.no_grad():
            expected = head(text.norm(states[cut.layer][:, gone]))
        oracle.assert_close(out.logits[:, gone], expected, f"cut at layer {cut.layer}")
        alive &= here


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_hidden_states_are_as_short_as_what_ran(family: str, method: str) -> None:
    t, out, cuts = squeezed(family, method, output_hidden_states=True, use_cache=True)
    width = t.inputs["image"]["input_ids"].shape[1]
    states = out.hidden_states
    assert len(states) == 5
    for i in range(4):
        done = [c for c in cuts if c.layer < i]
        now = [c for c in cuts if c.layer == i]
        # What layer i is given is recorded before or behind the cut at its own input.
        allowed = {len(c.kept[0]) for c in done[-1:] + now} or {width}
        allowed |= {width} if now and not done else set()
        assert states[i].shape[1] in allowed, f"layer {i}"
    assert states[-1].shape[1] == width
    oracle.assert_close(t.model.get_output_embeddings()(states[-1]).detach(), out.logits, "last hidden state")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_asking_for_hidden_states_changes_no_logit(family: str, method: str) -> None:
    _, plain, _ = squeezed(family, method)
    _, recorded, _ = squeezed(family, method, output_hidden_states=True)
    assert torch.equal(plain.logits, recorded.logits)


@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_attention_maps_are_as_short_as_what_ran(family: str) -> None:
    t = tiny.load(family)
    with matrix.attention(t.model, "eager"):
        _, out, cuts = squeezed(family, "fastv", output_attentions=True)
    width, short = t.inputs["image"]["input_ids"].shape[1], len(cuts[0].kept[0])
    assert [a.shape[-2:] for a in out.attentions] == [(n, n) for n in (width, width, short, short)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_a_tuple_holds_the_same(family: str, method: str) -> None:
    _, out, _ = squeezed(family, method)
    _, parts, _ = squeezed(family, method, return_dict=False)
    assert torch.equal(parts[0], out.logits)


def loss_and_gradients(t: tiny.TinyModel, checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the text behind the picture and the gradients of embeddings and tower."""
    inputs = t.inputs["image"]
    labels = inputs["input_ids"].masked_fill(t.visual(inputs), -100)
    t.model.zero_grad()
    if checkpointing:
        t.model.gradient_checkpointing_enable()
        t.model.train()
    out = t.model(**inputs, labels=labels, use_cache=False)
    out.loss.backward()
    wanted = {"embeddings": t.model.get_input_embeddings().weight}
    tower = t.model.get_submodule(t.family.tower)
    wanted |= {name: p for name, p in tower.named_parameters() if p.ndim >= 2 and p.grad is not None}
    return out.loss.detach(), {name: p.grad.clone() for name, p in wanted.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_labels_give_a_loss_with_gradients(family: str, method: str) -> None:
    t = tiny.fresh(family)
    inputs = t.inputs["image"]
    with matrix.applied(t.model, method):
        loss, gradients = loss_and_gradients(t, checkpointing=False)
        with torch.no_grad():
            logits = t.model(**inputs).logits
    target = inputs["input_ids"].masked_fill(t.visual(inputs), -100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], target[0], ignore_index=-100)
    oracle.assert_close(loss, expected, "loss")
    assert len(gradients) > 1
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), name
    assert gradients["embeddings"].abs().sum() > 0
    assert sum(g.abs().sum() for name, g in gradients.items() if name != "embeddings") > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_gradient_checkpointing_gives_the_same_gradients(family: str, method: str) -> None:
    """Older releases of transformers run hooks inside of what is recomputed; there it is refused."""
    t = tiny.fresh(family)
    with matrix.applied(t.model, method):
        loss, gradients = loss_and_gradients(t, checkpointing=False)
        if "__call__" in GradientCheckpointingLayer.__dict__:
            with pytest.raises(errors.UnsupportedInputError, match="gradient_checkpointing_disable"):
                loss_and_gradients(t, checkpointing=True)
            return
        again, checkpointed = loss_and_gradients(t, checkpointing=True)
    oracle.assert_close(again, loss, "loss")
    assert gradients.keys() == checkpointed.keys()
    for name, gradient in gradients.items():
        oracle.assert_close(checkpointed[name], gradient, name)


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_the_gradient_equals_that_of_the_masked_model(family: str) -> None:
    t = tiny.fresh(family)
    inputs, width = t.inputs["image"], t.inputs["image"]["input_ids"].shape[1]

    def gradient() -> Tensor:
        t.model.zero_grad()
        logits = t.model(**inputs, use_cache=False).logits[:, -4:]
        torch.nn.functional.cross_entropy(logits[0], torch.tensor([50, 51, 52, 53])).backward()
        found: Tensor = t.model.get_input_embeddings().weight.grad
        return found.clone()

    with matrix.applied(t.model, "fastv") as handle:
        mine = gradient()
        cuts = handle.cuts
    with oracle.masked(t.model, width, cuts):
        expected = gradient()
    oracle.assert_close(mine, expected, "gradient of the embeddings")
