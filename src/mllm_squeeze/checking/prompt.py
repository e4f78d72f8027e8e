"""The prompt on which a text model is tried: words, a picture, words, the last of which can be decoded one by one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm_squeeze.family.handlers.deepstack import has_deepstack
from mllm_squeeze.family.handlers.inner_features import has_inner_features
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import Span, Tile, TokenLayout
from mllm_squeeze.upstream import injections
from mllm_squeeze.upstream.names import EMBEDDINGS, MASK, POSITIONS
from mllm_squeeze.upstream.shrink import VOCABULARY

BEFORE, SIDE, AFTER = 4, 4, 8
LENGTH = BEFORE + SIDE**2 + AFTER
# Words in front of the picture that are padding in the second row of a batch.
PADDING = 3


@dataclass(frozen=True)
class TrialPrompt:
    """One prompt in one or two rows, of which the second is padded on the left.

    given: arguments of the text model for all tokens; without a mask where none is padded.
    """

    rows: int
    given: Mapping[str, Any]

    @property
    def real(self) -> Tensor:
        """Bool (rows, LENGTH), False for padding."""
        real = torch.ones(self.rows, LENGTH, dtype=torch.bool)
        real[1:, :PADDING] = False
        return real

    def layout(self, width: int = LENGTH) -> TokenLayout:
        """Return where the picture of each row is, among the first `width` tokens."""
        tiles = (Tile(1, SIDE, SIDE),)
        spans = tuple(Span(row, "image", row, ((BEFORE, SIDE**2),), tiles) for row in range(self.rows))
        return TokenLayout(self.rows, width, spans, self.real[:, :width])

    def swapped(self) -> dict[str, Any]:
        """Return the arguments with the rows of words, mask and positions the other way round."""
        axes = {EMBEDDINGS: 0, MASK: 0, POSITIONS: -2, injections.PER_LAYER: 0}
        return {name: value.flip(axes[name]) if name in axes else value for name, value in self.given.items()}

    def columns(self, start: int, stop: int) -> dict[str, Any]:
        """Return the arguments of a pass over some of the tokens, those before them seen by its cache."""
        return injections.columns(self.given, start, stop)


def trial_prompt(parts: ModelParts, rows: int = 1) -> TrialPrompt:
    """Return a prompt of random words in one row, or in two; the same words in each, at places of their own."""
    decoder: Any = parts.decoder
    device = next(decoder.embed_tokens.parameters()).device
    ids = _words(parts).expand(rows, -1).to(device)
    with torch.no_grad():
        states = decoder.embed_tokens(ids)
    prompt = TrialPrompt(rows, {})
    # generate() gives positions as well.
    given: dict[str, Any] = {EMBEDDINGS: states, POSITIONS: _positions(parts.position_axes, prompt.real).to(device)}
    if rows > 1:
        given[MASK] = prompt.real.long().to(device)
    visual = prompt.layout().visual.to(device)
    features = [states[:, -(SIDE**2) :].flip(1).flatten(0, 1), states[:, : SIDE**2].flip(1).flatten(0, 1)]
    if has_deepstack(decoder):
        given.update(zip(injections.DEEPSTACK_ARGUMENTS, (visual, features), strict=True))
    if has_inner_features(decoder):
        # The first behind the cut, where the engine has to shorten it.
        inner = min(layer_to_cut(parts) + 1, len(parts.layers) - 1)
        given[injections.INNER_MASK] = visual[..., None]
        given[injections.INNER_FEATURES] = {0: features[0], inner: features[1]}
    own = getattr(parts.text_config, "hidden_size_per_layer_input", None)
    if own and injections.PER_LAYER in inspect.signature(decoder.forward).parameters:
        given[injections.PER_LAYER] = _per_layer(decoder, ids, states)
    return TrialPrompt(rows, given)


def layer_to_cut(parts: ModelParts) -> int:
    """Return the layer to cut at: 1, so that one layer sees all, unless the model is too short for that."""
    return min(1, len(parts.layers) - 1, *parts.kv_sources.values())


def _words(parts: ModelParts) -> Tensor:
    config = parts.text_config
    # Gemma 3n has a second table, for fewer words; some releases of transformers look up the others in it as well.
    second = getattr(config, "vocab_size_per_layer_input", None) or VOCABULARY
    words = min(int(config.vocab_size), int(second), VOCABULARY)
    return torch.randint(words, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def _positions(axes: int, real: Tensor) -> Tensor:
    """Return positions (B, T), or (axes, B, T) as M-RoPE gives them to a picture, behind padding.

    What axes there are beside time, height and width counts pictures.
    """
    behind = real.long().sum(1, keepdim=True) - LENGTH
    if axes == 1:
        return (torch.arange(LENGTH) + behind).clamp(min=0)
    cells = torch.tensor(Tile(1, SIDE, SIDE).coordinates()).T + BEFORE
    cells = torch.cat([cells, cells.new_zeros(axes - len(cells), cells.shape[1])])
    before, after = torch.arange(BEFORE).expand(axes, -1), torch.arange(AFTER).expand(axes, -1) + BEFORE + SIDE
    return (torch.cat([before, cells, after], dim=1)[:, None] + behind).clamp(min=0)


def _per_layer(decoder: Any, ids: Tensor, states: Tensor) -> Tensor:
    look_up = decoder.get_per_layer_inputs
    # Gemma 4 takes the embeddings as well; some releases of transformers insist on them.
    more = (states,) if EMBEDDINGS in inspect.signature(look_up).parameters else ()
    with torch.no_grad():
        found: Tensor = look_up(ids, *more)
    return found
