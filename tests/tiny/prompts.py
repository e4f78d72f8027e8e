"""Prompts from pieces, batches from prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tiny.parts import AFTER, AUDIO, PAD, VIDEO, Family, Piece

Inputs = dict[str, Tensor]

KINDS: dict[str, tuple[int | str, ...]] = {
    "image": ("image:0",),
    "video": ("video:0",),
    "two_images": ("image:1", 31, 32, "image:2"),
    "image_video": ("image:0", 33, 34, "video:0"),
    "two_videos": ("video:1", 31, 32, "video:2"),
    "audio": ("audio:0",),
    "two_audios": ("audio:1", 31, 32, "audio:2"),
    "audio_image": ("audio:0", 33, 34, "image:0"),
    "text": (35, 36, 37, 38),
}
_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "cross_attention_mask")


@dataclass(frozen=True)
class Sample:
    """One prompt: its ids and the arrays of its pieces, in order."""

    ids: tuple[int, ...]
    arrays: tuple[Mapping[str, Tensor], ...]


@dataclass(frozen=True)
class Batch:
    """A padded batch, the same prompts alone, and the column at which each prompt starts in its padded row."""

    inputs: Inputs
    singles: tuple[Inputs, ...]
    offsets: tuple[int, ...]
    side: str


def _piece(family: Family, name: str) -> Piece:
    kind, number = name.split(":")
    make = getattr(family, kind)
    if make is None:
        raise ValueError(f"this family has no {kind}")
    return make(int(number))


def kinds_of(family: Family) -> list[str]:
    """Return the kinds of prompt that the family takes."""
    out = []
    for kind, parts in KINDS.items():
        pieces = [p.split(":")[0] for p in parts if isinstance(p, str)]
        if kind not in family.lacks and all(getattr(family, p) is not None for p in pieces):
            out.append(kind)
    return out


def sample(family: Family, *parts: int | str, bare: bool = False, tail: Sequence[int] = AFTER) -> Sample:
    """Return the prompt before + parts + tail; a part is a token or a piece such as "image:0". Bare: parts only."""
    ids: list[int] = [] if bare else list(family.before)
    arrays = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        piece = _piece(family, part)
        ids += piece.ids
        arrays.append(piece.arrays)
    if not bare:
        ids += tail
    return Sample(tuple(ids), tuple(arrays))


def _join(pieces: list[Tensor]) -> Tensor:
    """Concatenate along dim 0; the other dims (crops, frames, height, width) are padded with zeros to the most."""
    most = [max(sizes) for sizes in zip(*(p.shape[1:] for p in pieces), strict=True)]
    out = []
    for p in pieces:
        room = [n for size, full in zip(p.shape[:0:-1], most[::-1], strict=True) for n in (0, full - size)]
        out.append(functional.pad(p, room))
    return torch.cat(out)


def _gather(family: Family, name: str, samples: Sequence[Sample]) -> Tensor:
    """Return one array of the batch: a row per piece, or per sample (a sample without a piece gets zeros)."""
    rows = [[a[name] for a in s.arrays if name in a] for s in samples]
    if name in family.per_sample:
        first = next(r[0] for r in rows if r)
        empty = first.new_zeros(1, 0, *first.shape[2:])
        rows = [[_join([p.transpose(0, 1) for p in r]).transpose(0, 1) if r else empty] for r in rows]
    if name in family.packed:
        return torch.cat([p for r in rows for p in r], -1)
    return _join([p for r in rows for p in r])


def collate(
    family: Family, samples: Sequence[Sample], side: str = "left", before: tuple[Inputs, Tensor] | None = None
) -> Inputs:
    """Return the model's inputs for these prompts, padded at one side.

    before: inputs of an earlier turn and its answer (1, A), which then stand in front of the only sample.
    """
    rows = [list(s.ids) for s in samples]
    if before is not None:
        old, answer = before
        rows = [old["input_ids"][0].tolist() + answer[0].tolist() + rows[0]]
        arrays = {k: v for k, v in old.items() if k not in _TEXT}
        samples = [Sample(tuple(rows[0]), (arrays, *samples[0].arrays))]
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, where] = torch.tensor(row)
        mask[b, where] = 1
    out: Inputs = {"input_ids": ids, "attention_mask": mask}
    if family.token_types:
        out["mm_token_type_ids"] = token_types(family, ids)
    for name in dict.fromkeys(k for s in samples for a in s.arrays for k in a):
        out[name] = _gather(family, name, samples)
    if family.derived is not None:
        out |= family.derived(ids, out)
    return out


def token_types(family: Family, ids: Tensor) -> Tensor:
    """Return 1 for image, 2 for video, 3 for sound, 0 for text tokens."""
    types = torch.zeros_like(ids)
    for visual in family.visual_ids:
        types[ids == visual] = {VIDEO: 2, AUDIO: 3}.get(visual, 1)
    return types


@dataclass(frozen=True)
class Turn:
    """The second turn: only what is new, and the whole conversation as one prompt."""

    new: Inputs
    whole: Inputs


def make_turn(family: Family, first: Inputs, answer: Tensor, parts: tuple[int | str, ...]) -> Turn:
    """Return the turn that follows `first` and its answer (1, A) with these tokens and pieces."""
    added = [sample(family, *parts, bare=True)]
    new, whole = collate(family, added), collate(family, added, before=(first, answer))
    if "cross_attention_mask" in whole:
        new["cross_attention_mask"] = whole["cross_attention_mask"][:, -new["input_ids"].shape[1] :]
    if family.types_from_start:
        new |= {k: whole[k] for k in ("token_type_ids", "mm_token_type_ids") if k in whole}
    return Turn(new, whole)


def make_batch(family: Family, kinds: tuple[str, ...], side: str) -> Batch:
    """Return the prompts of these kinds as one batch and alone; prompt b has 2 b more text tokens at its end."""
    samples = []
    for b, kind in enumerate(kinds):
        tail = (*AFTER, *range(40 + b, 40 + 3 * b))
        samples.append(sample(family, *KINDS[kind], tail=tail))
    joint = collate(family, samples, side)
    width = joint["input_ids"].shape[1]
    offsets = tuple(width - len(s.ids) if side == "left" else 0 for s in samples)
    return Batch(joint, tuple(collate(family, [s]) for s in samples), offsets, side)
