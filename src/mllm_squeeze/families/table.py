"""One short row per HuggingFace `model_type`: only what looking at the model cannot tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Road = Literal["identity", "anyres", "block_merge", "pixel_shuffle", "none"]
Grid = Literal["square", "thw", "anyres", "unknown"]


@dataclass(frozen=True)
class FamilyRow:
    """What a family does between its pixels and its text model.

    model_type: `config.model_type`. modalities: what it takes. grid: rule that gives the rectangle of each span. road:
    how tower tokens become LLM tokens, so that a tower score can travel the same way. tower: "batched" (tiles, N, D),
    "packed" (sum, D) or "padded". cls: where the tower puts its CLS token. group_adjacent: feature items that stand
    next to each other without text between them are tiles of one picture. per_token: the projector maps one tower token
    to one LLM token. saliency: config path of the list of full-attention tower blocks, "" for the second to last block.
    timestamps: text stands between the frames of a video. notes: what a user should know.
    """

    model_type: str
    modalities: tuple[str, ...]
    grid: Grid = "square"
    road: Road = "identity"
    tower: Literal["batched", "packed", "padded"] = "batched"
    cls: Literal["none", "first", "last"] = "none"
    group_adjacent: bool = False
    per_token: bool = False
    saliency: str = ""
    timestamps: bool = False
    notes: tuple[str, ...] = field(default=())


_ROWS = (
    FamilyRow("llava", ("image",), cls="first", per_token=True),
    FamilyRow("llava_next", ("image",), grid="anyres", road="anyres", cls="first", per_token=True),
    FamilyRow("llava_next_video", ("image", "video"), grid="anyres", road="anyres", cls="first", per_token=True),
    FamilyRow("llava_onevision", ("image", "video"), grid="anyres", road="anyres", per_token=True),
    FamilyRow("qwen2_vl", ("image", "video"), grid="thw", road="block_merge", tower="packed"),
    FamilyRow(
        "qwen2_5_vl",
        ("image", "video"),
        grid="thw",
        road="block_merge",
        tower="packed",
        saliency="fullatt_block_indexes",
    ),
    FamilyRow("qwen3_vl", ("image", "video"), grid="thw", road="block_merge", tower="packed", timestamps=True),
    FamilyRow("internvl", ("image",), road="pixel_shuffle", cls="first", group_adjacent=True),
)

TABLE: dict[str, FamilyRow] = {row.model_type: row for row in _ROWS}
