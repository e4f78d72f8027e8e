"""Golden cases of methods for videos with sound, whose tokens stand among each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from golden.case import Case
from golden.readings import reads
from mllm_squeeze import ops
from mllm_squeeze.layout import Tile
from mllm_squeeze.recipe.build import build_reducer
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.base import Signals, VisualTokens
from mllm_squeeze.reducers.needs import Features, Runs, SoundAttention


@reads("omnizip")
def omnizip(case: Case) -> dict[str, Any]:
    sound, video = (case["ids"] == case[name] for name in ("audio_id", "video_id"))
    pieces = [*pieces_of(sound), video.nonzero().flatten()]
    recipe = load_recipe(
        "omnizip",
        sound=case["audio_dropped"],
        video=case["video_dropped"],
        context=case["contextual"],
        members=case["members"],
    )
    tokens = as_spans(case["embeds"], case["audio_saliency"], pieces, Tile(*case["grid"].tolist()))
    found = build_reducer(recipe.steps[0]).reduce(tokens)
    keep = torch.ones(len(case["ids"]), dtype=torch.bool)
    states, merged = case["embeds"].clone(), found.states(tokens.features)
    for row, piece in enumerate(pieces):
        keep[piece] = found.keep[row, : len(piece)]
        states[piece] = merged[row, : len(piece)]
    changed = keep & (states != case["embeds"]).any(1)
    return {
        "keep": keep.nonzero().flatten(),
        "keep_audio": keep[sound].nonzero().flatten(),
        "keep_video": keep[video].nonzero().flatten(),
        "merged_rows": changed.nonzero().flatten(),
        "merged_values": states[changed],
    }


def pieces_of(here: Tensor) -> list[Tensor]:
    """Return the places of each unbroken run, from bool (T,)."""
    place = here.nonzero().flatten()
    breaks = (place.diff() > 1).nonzero().flatten() + 1
    return list(place.tensor_split(breaks.tolist()))


def as_spans(states: Tensor, heard: Tensor, pieces: list[Tensor], tile: Tile) -> VisualTokens:
    """Return what a rule sees of a prompt: spans of sound, and at last the video, with what its runs are.

    states: (T, D). heard: of all sound in order. pieces: the places of each span's tokens.
    """
    lengths = tuple(len(piece) for piece in pieces)
    width = max(lengths)
    grid = torch.full((len(pieces), width, 4), -1)
    grid[-1, : lengths[-1]] = torch.tensor([(0, *cell) for cell in tile.coordinates()])
    runs = torch.zeros(len(pieces), width, dtype=torch.long)
    runs[-1, 1 : lengths[-1]] = (pieces[-1].diff() > 1).cumsum(0)
    sounds = [*heard.split(list(lengths[:-1])), torch.zeros(lengths[-1])]

    def padded(rows: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return VisualTokens(
        mask=mask,
        budget=torch.tensor(lengths),
        counts=lengths,
        grid=grid,
        origin=ops.positions(mask).expand_as(mask),
        lengths=lengths,
        current=lengths,
        tiles=((),) * (len(pieces) - 1) + ((tile,),),
        sample=(0,) * len(pieces),
        modality=("audio",) * (len(pieces) - 1) + ("video",),
        signals=Signals(
            {
                Features(): padded([states[piece] for piece in pieces]),
                SoundAttention(): padded(sounds),
                Runs(): runs,
            }
        ),
        asked=False,
    )
