"""Proof, on the first call, that a cut of a model nobody has tried equals masking the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_squeeze.engine.plan import Plan, PlannedCut
from mllm_squeeze.engine.session import Session
from mllm_squeeze.engine.spans import Features
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import Tile, TokenLayout
from mllm_squeeze.reducers.base import Place, Reducer, Reduction, VisualTokens

# Relative error that rounding alone explains, by the bytes of one number.
_TOLERANCE = {8: 1e-6, 4: 1e-3, 2: 5e-2}


class _EveryOther(Reducer):
    places: ClassVar[frozenset[Place]] = frozenset({"layer", "projector"})

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        return (current + 1) // 2

    def reduce(self, tokens: VisualTokens) -> Reduction:
        return Reduction(tokens.mask & (tokens.origin % 2 == 0))


def probe_session(
    parts: ModelParts, layer: int, layout: TokenLayout, features: Mapping[str, Features], device: torch.device
) -> Session:
    """Return a session that drops every other visual token at one layer."""
    cut = PlannedCut(0, "self-check", layer, _EveryOther(ratio=0.5))
    session = Session(Plan((cut,), repack=False), parts, layout, features, layout.length, 0)
    session.prepare(device)
    return session


def masked_run(parts: ModelParts, session: Session, layer: int, kwargs: dict[str, Any]) -> Tensor:
    """Return the text model's output with the tokens that the session dropped masked, from one layer on.

    Raises:
        UnsupportedModelError: a layer mixes tokens without attention, so masking them has no meaning.
    """
    kept = torch.zeros_like(session.real)
    assert session.index is not None
    kept = kept.scatter(1, session.index, True) if session.valid is None else _scatter(kept, session)
    hooks = []
    for number in range(layer, len(parts.layers)):
        if not parts.has_entries(number):
            raise UnsupportedModelError(
                f"Layer {number} of '{parts.row.model_type}' mixes tokens without attention, so a cut cannot be "
                "checked against masking. Add a row for the family: docs/add_a_family.md."
            )
        hooks.append(parts.layers[number].register_forward_pre_hook(_closing(kept), with_kwargs=True))
    try:
        return _last_hidden(parts.decoder(**kwargs))
    finally:
        for hook in hooks:
            hook.remove()


def compare(parts: ModelParts, session: Session, short: Tensor, masked: Tensor) -> None:
    """Check that survivors come out alike.

    Raises:
        UnsupportedModelError: they do not, so this family needs more than its structure tells.
    """
    assert session.index is not None
    index = session.index.unsqueeze(-1).expand(-1, -1, short.shape[-1])
    ours, theirs = short.gather(1, index).float(), masked.gather(1, index).float()
    if session.valid is not None:
        ours, theirs = ours[session.valid], theirs[session.valid]
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
    if not error <= _TOLERANCE.get(short.element_size(), 5e-2):
        raise UnsupportedModelError(
            f"'{parts.row.model_type}' is not a known family. Its decoder was found at '{parts.path(parts.decoder)}' "
            f"with {len(parts.layers)} layers, but a cut differs from masking the same tokens by {error:.1e} "
            "(relative). It needs a handler: see docs/add_a_family.md. The model was left as it was."
        )


def _scatter(kept: Tensor, session: Session) -> Tensor:
    assert session.index is not None
    assert session.valid is not None
    sample = torch.arange(kept.shape[0], device=kept.device)[:, None].expand_as(session.index)
    kept[sample[session.valid], session.index[session.valid]] = True
    return kept


def _closing(kept: Tensor) -> Any:
    def close(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        length = hidden.shape[1]
        mask = kwargs.get("attention_mask")
        itself = torch.eye(length, dtype=torch.bool, device=hidden.device)
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None, None]
        open_ = kept.to(hidden.device)[:, None, None, :] | itself
        closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask.masked_fill(~open_, closed)}

    return close


def _last_hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return found
