"""What is known of transformers' attention holds, or is refused with what broke; the model is then left as it was."""

from __future__ import annotations

import copy
import gc
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils, modeling_utils
from transformers.models.llama import modeling_llama

import mllm_squeeze as squeeze
import snapshot
import tiny
from families import proof
from mllm_squeeze.engine.encoder.read import received
from mllm_squeeze.engine.signals.rows import score_rows
from mllm_squeeze.errors import UnsupportedInputError, UnsupportedModelError
from mllm_squeeze.family.structure import find_attention, find_parts
from mllm_squeeze.upstream import attention
from mllm_squeeze.upstream.attention import kind, using
from mllm_squeeze.upstream.attention_call import AttentionCall
from mllm_squeeze.upstream.attention_contract import check_attention
from mllm_squeeze.upstream.attention_tap import TAP, Tap

REGISTRY = modeling_utils.ALL_ATTENTION_FUNCTIONS


def attention_modules(t: tiny.TinyModel) -> list[nn.Module]:
    """Return the attention modules that a method could tap, of the decoder and of the vision tower."""
    parts = find_parts(t.model)
    found = [find_attention(layer) for layer in [*parts.layers, *(parts.blocks or [])]]
    return [module for module in found if module is not None and hasattr(module, "config")]


@pytest.fixture
def llava() -> Iterator[tiny.TinyModel]:
    # Squeezed models of other tests that are gone, but for the collector.
    gc.collect()
    yield tiny.fresh("llava")
    assert TAP not in REGISTRY


class TestContract:
    # Models that are refused have no layers to cut.
    @pytest.mark.parametrize("family", [family for family in tiny.ALL_FAMILIES if family not in proof.REFUSED])
    def test_every_family_keeps_it(self, family: str) -> None:
        modules = attention_modules(tiny.load(family))
        assert modules
        for module in modules:
            for implementation in ("sdpa", "eager"):
                with using(module.config, implementation):
                    assert check_attention(module.config, module) == []

    def test_it_takes_next_to_no_time(self, llava: tiny.TinyModel) -> None:
        from timeit import timeit

        module = attention_modules(llava)[0]
        check_attention(module.config, module)
        assert min(timeit(lambda: check_attention(module.config, module), number=100) for _ in range(5)) / 100 < 1e-4

    def test_a_module_that_computes_attention_by_itself(self, llava: tiny.TinyModel) -> None:
        class Own(nn.Module):
            def __init__(self, config: Any) -> None:
                super().__init__()
                self.config = config

            def forward(self, hidden: Tensor) -> Tensor:
                return nn.functional.scaled_dot_product_attention(hidden, hidden, hidden)

        module = Own(attention_modules(llava)[0].config)
        assert [b.what for b in check_attention(module.config, module)] == ["Own.forward"]
        with pytest.raises(UnsupportedModelError, match="Own.forward.*ALL_ATTENTION_FUNCTIONS"):
            Tap(module, lambda: None)

    def test_a_subclass_that_wraps_forward(self, llava: tiny.TinyModel) -> None:
        class Wrapped(modeling_llama.LlamaAttention):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs)

        module = Wrapped(attention_modules(llava)[0].config, 0)
        with using(module.config, "eager"):
            assert check_attention(module.config, module) == []

    def test_a_file_with_a_registry_of_its_own(self, llava: tiny.TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
        """The tap goes where the module looks, and comes out of there again."""
        own = type(REGISTRY)()
        monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", own)
        seen: list[int] = []
        tap = Tap(find_parts(llava.model).layers[0].self_attn, lambda: lambda call: bool(seen.append(1)))
        assert TAP in own and TAP not in REGISTRY
        with torch.no_grad():
            llava.model(**llava.inputs["image"])
        tap.close()
        assert seen == [1]
        assert TAP not in own


class TestDrift:
    """Each is refused at apply, names what broke, and leaves the model as it was."""

    def refused(self, t: tiny.TinyModel, match: str, method: str = "fastv") -> None:
        before = snapshot.snapshot(t.model)
        with pytest.raises(squeeze.SqueezeError, match=match):
            squeeze.apply(t.model, method)
        assert snapshot.differences(before, snapshot.snapshot(t.model)) == []

    @pytest.mark.parametrize("method", ["get_interface", "__delitem__", "__setitem__"])
    def test_a_registry_without_a_method(
        self, llava: tiny.TinyModel, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        for base in type(REGISTRY).__mro__:
            if method in vars(base) and base is not object and base.__module__.startswith("transformers"):
                monkeypatch.setattr(base, method, None)
        self.refused(llava, f"AttentionInterface.{method}")

    def test_a_registry_that_takes_other_arguments(
        self, llava: tiny.TinyModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(REGISTRY), "get_interface", lambda self, name: self[name])
        self.refused(llava, "get_interface.*name and default")

    def test_no_registry(self, llava: tiny.TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS")
        monkeypatch.delattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS")
        self.refused(llava, "ALL_ATTENTION_FUNCTIONS")

    def test_no_maker_of_masks(self, llava: tiny.TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(masking_utils, "flash_attention_mask")
        self.refused(llava, "flash_attention_mask")

    def test_eager_attention_is_gone(self, llava: tiny.TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(modeling_llama, "eager_attention_forward")
        squeeze.apply(llava.model, "fastv").remove()
        with using(llava.model.model.language_model.config, "eager"):
            self.refused(llava, "eager_attention_forward in the module of LlamaAttention")

    def test_eager_attention_takes_other_parameters(
        self, llava: tiny.TinyModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def other(
            module: Any, key: Tensor, query: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
        ) -> Any: ...

        monkeypatch.setattr(modeling_llama, "eager_attention_forward", other)
        with using(llava.model.model.language_model.config, "eager"):
            self.refused(llava, "expected the parameters module, query, key, value, mask")

    def test_a_config_that_keeps_the_implementation_elsewhere(self, llava: tiny.TinyModel) -> None:
        module = attention_modules(llava)[0]

        class Other(type(module.config)):  # type: ignore[misc]
            _attn_implementation = "sdpa"

        config = copy.copy(module.config)
        config.__class__ = Other
        assert "to be read from _attn_implementation_internal" in str(check_attention(config, module)[0])
        bare = types.SimpleNamespace(hidden_size=8)
        assert "no such attributes" in str(check_attention(bare, module)[0])

    def test_removal_works_when_the_registry_changes_meanwhile(
        self, llava: tiny.TinyModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = snapshot.snapshot(llava.model)
        handle = squeeze.apply(llava.model, "fastv")
        with monkeypatch.context() as patch:
            patch.setattr(type(REGISTRY), "get_interface", None)
            handle.remove()
        assert snapshot.differences(before, snapshot.snapshot(llava.model)) == []


class Drifted(type(REGISTRY)):  # type: ignore[misc]
    """The registry of a release whose modules hand their arguments on under other names, or more of them."""

    def __init__(self, names: dict[str, str], added: dict[str, Any]) -> None:
        super().__init__()
        self.names, self.added = names, added

    def get_interface(self, name: str, default: Any) -> Any:
        function = super().get_interface(name, default)

        def called(module: nn.Module, *tensors: Any, **given: Any) -> Any:
            renamed = {self.names.get(word, word): value for word, value in given.items()}
            return function(module, *tensors, **{**renamed, **self.added})

        return called


class TestKeywords:
    """An argument of the attention function that could change scores is never left out of them in silence."""

    @pytest.fixture
    def drift(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def set_in(names: dict[str, str], added: dict[str, Any]) -> None:
            monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Drifted(names, added))

        return set_in

    def run(self, t: tiny.TinyModel, method: str) -> None:
        with squeeze.applied(t.model, method), torch.no_grad():
            t.model(**t.inputs["image"])

    def test_the_stand_in_is_as_before(self, llava: tiny.TinyModel, drift: Any) -> None:
        drift({}, {})
        self.run(llava, "fastv")

    @pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm"])
    @pytest.mark.parametrize(
        ("names", "added"),
        [
            ({"scaling": "scale"}, {}),
            ({}, {"logit_cap": 30.0}),
            ({}, {"s_aux": torch.zeros(4)}),
            ({}, {"position_bias": torch.zeros(1, 4, 1, 1)}),
            ({}, {"cu_seq_lens_q": torch.tensor([0, 3])}),
        ],
        ids=["scale", "logit_cap", "s_aux", "position_bias", "cu_seq_lens_q"],
    )
    def test_a_method_that_reads_scores_refuses(
        self, llava: tiny.TinyModel, drift: Any, method: str, names: dict[str, str], added: dict[str, Any]
    ) -> None:
        drift(names, added)
        before = snapshot.snapshot(llava.model)
        name = next(iter([*names.values(), *added]))
        with pytest.raises(UnsupportedModelError, match=f"LlamaAttention calls its attention with '{name}'"):
            self.run(llava, method)
        assert snapshot.differences(before, snapshot.snapshot(llava.model)) == []

    @pytest.mark.parametrize("method", ["divprune", "dart"])
    def test_one_that_reads_none_does_not_care(self, llava: tiny.TinyModel, drift: Any, method: str) -> None:
        drift({"scaling": "scale"}, {"logit_cap": 30.0})
        self.run(llava, method)

    def test_what_is_not_given_is_no_change(self, llava: tiny.TinyModel, drift: Any) -> None:
        drift({}, {"sinks": None, "of_a_later_release": None})
        self.run(llava, "fastv")

    def test_a_scale_that_is_not_handed_on(self) -> None:
        call = random_call()
        call.module.scaling = 0.5
        with pytest.raises(UnsupportedModelError, match="scaling=0.5"):
            call.require_plain_scores()
        call.replace(scaling=0.5).require_plain_scores()

    def test_tensors_under_other_names(self) -> None:
        call = random_call()
        tensors = {"query": call.query, "key": call.key, "value": call.value}
        read = AttentionCall.read(call.module, (), {**tensors, "attention_mask": None, "scaling": 0.5})
        assert read.query is call.query and read.scaling == 0.5
        with pytest.raises(UnsupportedModelError, match="expected query, key, value, attention_mask"):
            AttentionCall.read(call.module, (), {**tensors, "mask": None})


def random_call(**changes: Any) -> AttentionCall:
    query, key, value = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    return AttentionCall(nn.Module(), query, key, value, None).replace(**changes)


def dense(call: AttentionCall, allowed: Tensor) -> Tensor:
    """Return the attention map, mean over heads."""
    logits = call.query @ call.key.transpose(-1, -2) * call.logit_scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1).mean(1)


class TestScores:
    CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()
    ROWS = torch.tensor([[5]])
    ONE = torch.ones(1, 1)

    @pytest.mark.parametrize("closed", [torch.finfo(torch.float32).min, float("-inf"), -1e9])
    def test_whatever_number_closes(self, closed: float) -> None:
        allowed = self.CAUSAL.clone()
        allowed[:, 0] = False
        allowed[0, 0] = True
        call = random_call(mask=torch.zeros(1, 1, 6, 6).masked_fill(~allowed, closed))
        torch.testing.assert_close(score_rows(call, self.ROWS, self.ONE), dense(call, allowed)[:, 5])
        torch.testing.assert_close(received(call), dense(call, allowed).sum(1) * 2)

    def test_a_bias_is_refused(self) -> None:
        for read in (lambda c: score_rows(c, self.ROWS, self.ONE), received):
            with pytest.raises(UnsupportedInputError, match="bias"):
                read(random_call(mask=torch.full((1, 1, 6, 6), 0.5)))

    @pytest.mark.parametrize("mask", [torch.ones(1, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.long), object(), {}])
    def test_a_new_form_is_refused(self, mask: Any) -> None:
        for read in (lambda c: score_rows(c, self.ROWS, self.ONE), received):
            with pytest.raises(UnsupportedInputError, match="attention mask"):
                read(random_call(mask=mask))

    def test_a_window_without_a_square_mask(self) -> None:
        """FlashAttention is told the window by a number."""
        near = self.CAUSAL & ~torch.ones(6, 6, dtype=torch.bool).tril(-3)
        call = random_call(window=3)
        torch.testing.assert_close(score_rows(call, self.ROWS, self.ONE), dense(call, near)[:, 5])
        torch.testing.assert_close(received(call.replace(is_causal=True)), dense(call, near).sum(1) * 2)
        around = near | near.T
        torch.testing.assert_close(score_rows(call, self.ROWS, self.ONE, causal=False), dense(call, around)[:, 5])
        torch.testing.assert_close(received(call), dense(call, around).sum(1) * 2)

    def test_the_call_says_whether_it_is_causal(self) -> None:
        everything = torch.ones_like(self.CAUSAL)
        rows = torch.tensor([[2]])
        call = random_call(is_causal=False)
        torch.testing.assert_close(score_rows(call, rows, self.ONE), dense(call, everything)[:, 2])
        call = random_call(is_causal=True)
        torch.testing.assert_close(score_rows(call, rows, self.ONE, causal=False), dense(call, self.CAUSAL)[:, 2])

    def test_a_softcap(self) -> None:
        call = random_call(softcap=0.3, scaling=2.0)
        torch.testing.assert_close(score_rows(call, self.ROWS, self.ONE), dense(call, self.CAUSAL)[:, 5])
        torch.testing.assert_close(received(call), dense(call, torch.ones_like(self.CAUSAL)).sum(1) * 2)


def test_a_model_that_goes_takes_its_tap_with_it() -> None:
    gc.collect()
    model = tiny.fresh("llava").model
    squeeze.apply(model, "fastv")
    assert TAP in REGISTRY
    del model
    gc.collect()
    assert TAP not in REGISTRY


class TestKinds:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("eager", "eager"),
            ("sdpa", "sdpa"),
            ("flash_attention_2", "flash"),
            ("flash_attention_3", "flash"),
            ("flex_attention", "flex"),
            ("paged|eager", "other"),
            ("my_flash_kernel", "other"),
        ],
    )
    def test_by_what_makes_its_masks(self, name: str, expected: str) -> None:
        assert kind(name) == expected
        assert attention.is_flash(name) is (expected == "flash")

    def test_a_kernel_that_takes_the_masks_of_flash(self) -> None:
        """A kernel of the hub is registered under its own name, with the masks of FlashAttention."""
        makers = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
        makers["someone/fast-kernel"] = makers["flash_attention_2"]
        try:
            assert kind("someone/fast-kernel") == "flash"
        finally:
            del makers["someone/fast-kernel"]

    def test_none_is_eager(self, llava: tiny.TinyModel) -> None:
        config = copy.copy(attention_modules(llava)[0].config)
        config._attn_implementation_internal = None
        assert attention.implementation(config) == "eager"

    def test_using_puts_back(self, llava: tiny.TinyModel) -> None:
        config = attention_modules(llava)[0].config
        with using(config, "eager"):
            assert config._attn_implementation == "eager"
        with pytest.raises(KeyboardInterrupt), using(config, "eager"):
            raise KeyboardInterrupt
        assert config._attn_implementation == "sdpa"
