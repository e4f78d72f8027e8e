"""A mask is read as what it is, in every form that transformers makes; a form that nobody has looked at is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, masking_utils

import mllm_squeeze as squeeze
from mllm_squeeze.engine.keys.kept import KeptKeys, take_columns
from mllm_squeeze.engine.sequence.shorten import Rows, shorten_mask, shorten_padding
from mllm_squeeze.upstream import masks

PADDING = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
LOWEST = torch.finfo(torch.float32).min


def made(implementation: str, padding: Tensor | None, dtype: torch.dtype = torch.float32) -> Any:
    """Return the mask that the installed transformers gives the layers of a decoder."""
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    config._attn_implementation_internal = implementation
    state = torch.zeros(2, 4, 8, dtype=dtype)
    cache = {next(n for n in ("cache", "past_key_values") if n in _parameters()): None}
    return masking_utils.create_causal_mask(config=config, inputs_embeds=state, attention_mask=padding, **cache)


def _parameters() -> set[str]:
    code: Any = masking_utils.create_causal_mask
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    return set(code.__code__.co_varnames)


def some_rows(key_valid: Tensor | None = None, query_valid: Tensor | None = None) -> Rows:
    """Return a call of four tokens of which the second is cut."""
    left = torch.tensor([[0, 2, 3], [0, 2, 3]])
    return Rows(left, left, query_valid, key_valid, past=0, width=4)


ALLOWED = torch.ones(4, 4, dtype=torch.bool).tril() & PADDING.bool()[:, None, None]


class TestForms:
    @pytest.mark.parametrize(
        ("implementation", "form"),
        [("sdpa", "square"), ("eager", "square"), ("flash_attention_2", "keys"), ("flex_attention", "block")],
    )
    def test_what_transformers_makes(self, implementation: str, form: str) -> None:
        if implementation == "flex_attention":
            # Its own function compiles the mask; the class is what counts.
            from torch.nn.attention.flex_attention import create_block_mask

            mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, device="cpu")
        else:
            mask = made(implementation, PADDING)
        assert masks.form(mask) == form

    def test_none_and_a_dict(self) -> None:
        assert masks.form(made("sdpa", None)) == "none"
        assert masks.form({"full_attention": None}) == "by kind"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_where_those_are_open(self, implementation: str, dtype: torch.dtype) -> None:
        mask = made(implementation, PADDING, dtype)
        assert torch.equal(masks.is_open(mask), ALLOWED)
        if implementation == "eager":
            assert mask.dtype == dtype
            assert mask[0, 0, 0, 3] == masks.closed_value(dtype)

    @pytest.mark.parametrize("closed", [LOWEST, float("-inf"), -1e9, -10000.0])
    def test_whatever_number_closes(self, closed: float) -> None:
        mask = torch.zeros(2, 1, 4, 4).masked_fill(~ALLOWED, closed)
        assert torch.equal(masks.is_open(mask), ALLOWED)
        masks.require_unbiased(mask)

    def test_a_mask_of_keys_in_any_dtype(self) -> None:
        for dtype in (torch.bool, torch.long, torch.int32, torch.float32):
            assert torch.equal(masks.is_open(PADDING.to(dtype)), PADDING.bool())

    @pytest.mark.parametrize(
        "mask",
        [
            torch.ones(2, 4, 4, dtype=torch.bool),
            torch.ones(2, 4, 4, 4, 4),
            torch.ones(2, 1, 4, 4, dtype=torch.long),
            torch.ones(4, dtype=torch.bool),
            [PADDING],
            "causal",
            object(),
        ],
        ids=["3d", "5d", "integers", "1d", "list", "str", "object"],
    )
    def test_another_form_is_refused(self, mask: Any) -> None:
        with pytest.raises(squeeze.SqueezeError, match="as an attention mask"):
            masks.form(mask)
        with pytest.raises(squeeze.SqueezeError, match="as an attention mask"):
            shorten_mask(mask, some_rows(), "sdpa")

    @pytest.mark.parametrize("mask", [torch.tensor([[1, 1, 2, 2]]), torch.tensor([[0.0, 0.0, LOWEST, LOWEST]])])
    def test_other_numbers_in_a_mask_of_keys_are_refused(self, mask: Tensor) -> None:
        for read in (masks.is_open, lambda m: shorten_mask(m, some_rows(), "flash_attention_2")):
            with pytest.raises(squeeze.SqueezeError, match="other numbers than 0 and 1"):
                read(mask)
        with pytest.raises(squeeze.SqueezeError, match="other numbers than 0 and 1"):
            shorten_padding(mask, some_rows())

    @pytest.mark.parametrize("bias", [1.0, -0.5, -100.0])
    def test_a_bias_is_told_from_closed(self, bias: float) -> None:
        mask = torch.full((1, 1, 4, 4), bias)
        assert masks.is_open(mask).all()
        with pytest.raises(squeeze.SqueezeError, match="bias"):
            masks.require_unbiased(mask)

    @pytest.mark.parametrize("mask", [{"full_attention": None}, {}])
    def test_is_open_takes_one_mask(self, mask: Any) -> None:
        with pytest.raises(squeeze.SqueezeError, match="by kind"):
            masks.is_open(mask)

    def test_the_widest_of_several_kinds(self) -> None:
        narrow, wide = torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 5)
        assert masks.widest({"sliding_attention": narrow, "chunked_attention": wide}) is wide
        assert masks.widest({"sliding_attention": wide, "full_attention": narrow}) is narrow
        assert masks.widest({"sliding_attention": None}) is None

    @pytest.mark.parametrize("mask", [torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool)])
    def test_close_and_open(self, mask: Tensor) -> None:
        where = torch.eye(2, dtype=torch.bool)
        closed = masks.close(mask, where)
        assert torch.equal(masks.is_open(closed), ~where[None, None])
        assert torch.equal(masks.open_to(closed, where), mask)
        assert closed.dtype == mask.dtype

    def test_integers_have_no_closed_value(self) -> None:
        with pytest.raises(squeeze.SqueezeError, match="int64"):
            masks.closed_value(torch.long)


class TestShortening:
    @pytest.mark.parametrize("closed", [LOWEST, float("-inf"), -1e9])
    def test_numbers_that_close_stay_what_they_are(self, closed: float) -> None:
        mask = torch.zeros(2, 1, 4, 4).masked_fill(~ALLOWED, closed)
        short = shorten_mask(mask, some_rows(), "eager")
        assert torch.equal(short, mask[:, :, [0, 2, 3]][..., [0, 2, 3]])

    def test_a_bias_stays_what_it_is(self) -> None:
        mask = torch.arange(16.0).view(1, 1, 4, 4)
        assert torch.equal(
            shorten_mask(mask, some_rows(), "eager"), mask[:, :, [0, 2, 3]][..., [0, 2, 3]].expand(2, -1, -1, -1)
        )

    def test_eager_attention_gets_a_mask_that_is_added(self) -> None:
        """A decoder that looks both ways has none; rows that keep different numbers need one."""
        valid = torch.tensor([[True, True, True], [True, True, False]])
        short = shorten_mask(None, some_rows(valid, valid), "eager", causal=False)
        assert short.is_floating_point()
        assert torch.equal(masks.is_open(short)[1, 0], torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool())
        logits = torch.randn(2, 1, 3, 3)
        got = (logits + short).softmax(-1)
        expected = logits.masked_fill(~masks.is_open(short), -torch.inf).softmax(-1)
        torch.testing.assert_close(got, expected)

    def test_no_mask_under_an_unknown_implementation(self) -> None:
        rows = some_rows()
        assert shorten_mask(None, rows, "my_kernel") is None
        valid = torch.tensor([[True, True, True], [True, True, False]])
        with pytest.raises(squeeze.SqueezeError, match="'my_kernel'.*AttentionMaskInterface.register"):
            shorten_mask(None, some_rows(valid, valid), "my_kernel")

    def test_an_unknown_implementation_whose_masks_are_known(self) -> None:
        """Whose masks are made by a function of transformers, those are known."""
        makers = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
        makers["my_kernel"] = masking_utils.sdpa_mask
        valid = torch.tensor([[True, True, True], [True, True, False]])
        try:
            assert shorten_mask(None, some_rows(valid, valid), "my_kernel").dtype == torch.bool
        finally:
            del makers["my_kernel"]

    def test_flex_is_refused(self) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, device="cpu")
        with pytest.raises(squeeze.SqueezeError, match="BlockMask"):
            shorten_mask(mask, some_rows(), "flex_attention")


class TestKeys:
    def test_a_mask_of_bools_over_the_keys_of_pictures(self) -> None:
        open_ = torch.tensor([[[[True, False, True], [False, True, False]]]])
        rows = torch.ones(1, 1, 2, 1)
        kept = KeptKeys(torch.tensor([[0, 2]]), None, 3)
        mask, left = take_columns(open_, rows, kept)
        assert torch.equal(mask, torch.tensor([[[[True, True], [True, True]]]]))
        assert left.flatten().tolist() == [1, 0]

    @pytest.mark.parametrize("closed", [LOWEST, float("-inf"), -1e9])
    def test_a_mask_of_numbers_over_the_keys_of_pictures(self, closed: float) -> None:
        mask = torch.tensor([[[[0.0, closed, 0.0], [closed, 0.0, closed]]]])
        kept = KeptKeys(torch.tensor([[0, 2]]), None, 3)
        short, left = take_columns(mask, torch.ones(1, 1, 2, 1), kept)
        assert short.eq(0).all()
        assert left.flatten().tolist() == [1, 0]

    def test_a_mask_of_integers_is_refused(self) -> None:
        kept = KeptKeys(torch.tensor([[0, 2]]), None, 3)
        with pytest.raises(squeeze.SqueezeError, match="as an attention mask"):
            take_columns(torch.ones(1, 1, 2, 3, dtype=torch.long), None, kept)
        with pytest.raises(squeeze.SqueezeError, match="batch, 1, words, keys"):
            take_columns(torch.ones(1, 3), None, kept)
