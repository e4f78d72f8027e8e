"""Render docs/families.md from the results of the family tests.

SQUEEZE_FAMILY_RESULTS=docs/results/families.json python -m pytest tests/families
python docs/make_families.py docs/results/families.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_squeeze.family.refused import REASONS
from mllm_squeeze.family.table import TABLE

HERE = Path(__file__).parent
PAGE = HERE / "families.md"
SHOWS = ("image", "video", "audio")
COLUMNS = (*SHOWS, "encoder", "scores", "keys", "projector", "layer", "layers", "cache", "batch", "turns")
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]

HEAD = """# Families

What was proved for each family, by `tests/families` on tiny random models of the real HuggingFace classes. A tick is a
test that passed; this page is made from the results (`docs/make_families.py`), nothing in it is written by hand.

| column | what was proved |
| --- | --- |
| image, video, audio | cuts of one and of several equal masking the same tokens, in prefill and each step of generate |
| encoder | merging inside the vision encoder (`tome`) |
| scores | cuts before the LLM by the attention of the vision encoder (`visionzip`) |
| keys | fewer image features that a Q-Former, or the text in cross-attention layers, attends to (steps at `keys`) |
| projector | cuts before the LLM by the features alone (`divprune`) |
| layer | a cut at one layer by the attention of the layer before (`fastv`), with sdpa and eager masks |
| layers | cuts at several layers (`pyramiddrop`) |
| cache | fewer entries seen while decoding (`decode_refresh`, as in `dycoke`) |
| batch | a row of a left-padded batch keeps the same tokens and says the same as alone |
| turns | a second turn on the reused cache says what one prompt with both says |

✓ proved, – refused with a reason (see below), blank: not applicable. All of it to 1e-5 in float32; `ratio=0` is
bit-equal, removal leaves nothing behind, and beams equal masked beams wherever the library itself deals them rightly.
"""

REFUSED = """
## Refused

Model types of transformers that have no row, as what they are leaves nothing to cut; `apply` and `check` say so.

| `model_type` | why |
| --- | --- |
"""

UNKNOWN = """
## A model that is not here

It is tried. If its decoder and placeholder ids are found by looking, the first call proves that a cut equals masking
the same tokens (two more passes through the text model, once); if it does not, the call raises and the model is as it
was. What a row adds is in [add_a_family.md](add_a_family.md).
"""


def render(results: Results) -> str:
    """Return the page."""
    names = sorted(TABLE)
    rows = [_row(name, results.get(name, {})) for name in names]
    lines = [HEAD, "| family (`model_type`) | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    return "\n".join([*lines, *rows, "", *_notes(names, results)]) + "\n" + _refused() + UNKNOWN


def _refused() -> str:
    return REFUSED + "".join(f"| {name} | {REASONS[name]} |\n" for name in sorted(REASONS))


def _row(name: str, cells: Mapping[str, Mapping[str, Any]]) -> str:
    marks = [_mark(cells.get(column, {})) for column in COLUMNS]
    if "all" in cells:
        marks = ["–" if not set(cells) - {"all"} else mark for mark in marks]
    return f"| {name} | " + " | ".join(marks) + " |"


def _mark(cell: Mapping[str, Any]) -> str:
    if cell.get("failed"):
        return "✗"
    if cell.get("passed"):
        return "✓"
    return "–" if cell.get("refused") else ""


def _notes(names: list[str], results: Results) -> list[str]:
    out = ["## Notes and reasons", ""]
    for name in names:
        cells = results.get(name, {})
        said = [TABLE[name].note] if name in TABLE and TABLE[name].note else []
        for column in ("all", *COLUMNS, "frames", "beams"):
            cell = cells.get(column, {})
            if cell.get("refused") and not cell.get("passed"):
                said.append(_reason(column, str(cell["refused"])))
        if said:
            out += [f"- **{name}**", *(f"  - {text}" for text in dict.fromkeys(said))]
    return out


def _reason(column: str, refused: str) -> str:
    """Return a reason without what is the same for all families, and without the advice."""
    text = refused.split("does not fit", 1)[-1].split("': ", 1)[-1] if "does not fit" in refused else refused
    text = text.split(" Use a method", 1)[0]
    return text if column in ("all", "frames") else f"{column}: {text}"


def main() -> None:
    """Write the page from the JSON that is named on the command line."""
    PAGE.write_text(render(json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
