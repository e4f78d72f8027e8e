"""Render docs/families.md from the results of the family tests, and from what the self-check says of other types.

SQUEEZE_FAMILY_RESULTS=docs/results/families.json python -m pytest tests/families
python docs/make_families.py --types     # try the types of the installed transformers that have neither row nor reason
python docs/make_families.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_squeeze.family.refused import REASONS
from mllm_squeeze.family.table import TABLE
from mllm_squeeze.upstream.model_types import multimodal_types

HERE = Path(__file__).parent
PAGE = HERE / "families.md"
RESULTS = HERE / "results" / "families.json"
TRIED = HERE / "results" / "types.json"
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

OTHERS = """
## Types without a row

All other types that transformers {release} names in its mappings of multimodal models, with what `mllm-squeeze check
TYPE` says of each as its config is by default. With those above that is every type of the release; a new one is noticed
by a test, which says the same of it (`make newest`).

| `model_type` | what the self-check says |
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
    return "\n".join([*lines, *rows, "", *_notes(names, results)]) + "\n" + _refused() + _others() + UNKNOWN


def without_a_line() -> set[str]:
    """Return the types of the installed transformers that the page does not name."""
    return multimodal_types() - set(TABLE) - set(REASONS) - set(json.loads(TRIED.read_text())["types"])


def verdict(name: str) -> str:
    """Return what the self-check says of a type, as its config is by default."""
    from mllm_squeeze import api
    from mllm_squeeze.cli import load
    from mllm_squeeze.errors import SqueezeError

    try:
        found = api.check(load.skeleton(name), run=True)
    except SqueezeError as error:
        return f"refused: {str(error).split(' Give the folder')[0].split(' Allowed:')[0]}"
    fitting = sum(said == "fits" for said in found["methods"].values())
    return f"{found['self_check']['text']}; {fitting} of {len(found['methods'])} methods fit"


def try_types() -> None:
    """Write what the self-check says of each type that has neither a row nor a reason."""
    import transformers

    others = sorted(multimodal_types() - set(TABLE) - set(REASONS))
    tried = {"release": transformers.__version__, "types": {name: verdict(name) for name in others}}
    TRIED.write_text(json.dumps(tried, indent=1) + "\n")


def _others() -> str:
    tried = json.loads(TRIED.read_text())
    lines = [f"| {name} | {said} |\n" for name, said in sorted(tried["types"].items())]
    return OTHERS.format(release=tried["release"]) + "".join(lines)


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
    """Write the page, or what it says of types without a row."""
    if "--types" in sys.argv[1:]:
        try_types()
    PAGE.write_text(render(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
