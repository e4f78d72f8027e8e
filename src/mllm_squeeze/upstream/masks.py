"""The forms in which a layer is told which keys each query sees, and what "closed" is in each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream.versions import how_to_go_on

# "keys": 2-D, which keys are real. "square": 4-D, keys by queries. "by kind": one mask for each kind of layer, as
# generate() makes them for caches of fixed size. "block": flex attention's own class.
Form = Literal["none", "keys", "square", "by kind", "block"]

# What is added to a logit to close a key: finfo.min, -inf, or a number such as -1e9. From here on softmax gives 0.
_CLOSED_FROM = -1e4


def form(mask: Any) -> Form:
    """Return the form of an attention mask.

    Raises:
        UnsupportedInputError: a form that nobody has looked at; nothing is guessed about what it closes.
    """
    if mask is None:
        return "none"
    if isinstance(mask, Tensor):
        if mask.ndim == 2 and not mask.is_complex():
            return "keys"
        if mask.ndim == 4 and (mask.dtype == torch.bool or mask.is_floating_point()):
            return "square"
        raise _unknown(f"a {mask.dtype} tensor of shape {tuple(mask.shape)}")
    if isinstance(mask, Mapping):
        return "by kind"
    if any(cls.__name__ == "BlockMask" for cls in type(mask).__mro__):
        return "block"
    raise _unknown(f"a {type(mask).__module__}.{type(mask).__qualname__}")


def closed_value(dtype: torch.dtype) -> bool | float:
    """Return what closes a key in a 4-D mask of a dtype: False, or the lowest number, which is added to the logit.

    Raises:
        UnsupportedInputError: neither bool nor floating point, so that no value closes.
    """
    if dtype == torch.bool:
        return False
    if not dtype.is_floating_point:
        raise _unknown(f"a {dtype} tensor")
    return torch.finfo(dtype).min


def close(mask: Tensor, where: Tensor) -> Tensor:
    """Return a 4-D mask that is also closed where a bool tensor, broadcast to it, says so."""
    return mask.masked_fill(where, closed_value(mask.dtype))


def open_to(mask: Tensor, where: Tensor) -> Tensor:
    """Return a 4-D mask that is also open where a bool tensor, broadcast to it, says so."""
    return mask.masked_fill(where, True if closed_value(mask.dtype) is False else 0.0)


def is_open(mask: Tensor) -> Tensor:
    """Return bool, of the mask's shape: where a mask of keys, or of keys by queries, lets attention through.

    A 2-D mask of numbers is 1 for real tokens and 0 for padding.

    Raises:
        UnsupportedInputError: a mask of another form, or a 2-D one with other numbers (packed rows, an additive mask).
    """
    kind = form(mask)
    if kind not in ("keys", "square"):
        raise _unknown(f"a mask of the form '{kind}'")
    if mask.dtype == torch.bool:
        return mask
    if kind == "square":
        return mask > _CLOSED_FROM
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise UnsupportedInputError(
            "A 2-D attention_mask holds other numbers than 0 and 1, so it cannot be read as real tokens and padding. "
            "Packed rows cannot be squeezed: pass a padded batch, with 1 for real tokens and 0 for padding."
        )
    return mask.bool()


def require_unbiased(mask: Tensor) -> None:
    """Check that a mask only opens and closes, where what it adds to open logits is not taken into account.

    Reads the device where the mask is made of numbers.

    Raises:
        UnsupportedInputError: it adds something to logits that it leaves open.
    """
    if mask.dtype != torch.bool and mask.is_floating_point() and bool(((mask != 0) & (mask > _CLOSED_FROM)).any()):
        raise UnsupportedInputError(
            "The attention mask adds numbers to logits that it leaves open (a bias by position or by size), and the "
            "scores that the method reads would leave them out. Use a method that reads no attention, or pass a mask "
            "of bools."
        )


def widest(masks: Mapping[str, Any]) -> Any:
    """Return, of one mask for each kind of layer, the one over the most keys; None where none is a tensor."""
    tensors = (mask for mask in masks.values() if isinstance(mask, Tensor))
    return masks.get("full_attention", max(tensors, key=lambda mask: mask.shape[-1], default=None))


def _unknown(what: str) -> UnsupportedInputError:
    return UnsupportedInputError(
        f"Got {what} as an attention mask. Known are None, a 2-D mask of real tokens, a 4-D mask of bools or of "
        "numbers that are added to the logits, a dict of these by the kind of layer, and a BlockMask. If you made it "
        f"yourself, pass a 2-D mask. {how_to_go_on()}"
    )
