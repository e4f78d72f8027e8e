"""Render docs/parts.md and docs/signals.md from the code: python docs/make_reference.py"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from mllm_squeeze import registry
from mllm_squeeze.parts.base import KINDS, Part
from mllm_squeeze.reducers import needs

HERE = Path(__file__).parent
MADE = "Made from the code by `docs/make_reference.py`; nothing in it is written by hand.\n"

PARTS_HEAD = f"""# Parts

A step without `reducer:` is a pipeline of parts. They run in this order: `segment` puts tokens into groups, `score`
gives each token a number, `budget` says how many each group keeps, `select` picks them, `merge` says what becomes of
the others. What a step leaves out is `segment: whole`, `budget: even`, `select: top_k`, and no merge.

A part is written as a word (`select: top_k`), as `{{name: {{parameter: value}}}}`, or as `{{name: value}}` where one
parameter is its main one (in bold below). {MADE}"""

SIGNALS_HEAD = f"""# Signals

What a rule may read. A signal arrives under the need that asked for it, `tokens[Attention(rows="last")]`, and so does
it in `squeeze.choose(..., signals={{Attention(rows="last"): tensor}})`; there its name will do where a step reads one
signal of that name. S is spans, N visual tokens of the longest span, T words behind the first visual token; `choose`
takes a single span without the axis S. {MADE}"""

KIND_SAYS = {
    "score": "A number per token; higher stays.",
    "segment": "Groups of tokens.",
    "budget": "How many tokens each group keeps.",
    "select": "Which tokens are picked.",
    "merge": "What becomes of the tokens that were not picked.",
}


def parts_page() -> str:
    """Return docs/parts.md."""
    lines = [PARTS_HEAD]
    for kind in KINDS:
        lines += [f"## {kind}", "", KIND_SAYS[kind], ""]
        for name in registry.part_names(kind):
            lines += _part(name, registry.part_class(kind, name))
    return "\n".join(lines).rstrip() + "\n"


def signals_page() -> str:
    """Return docs/signals.md."""
    lines = [SIGNALS_HEAD]
    for need in signal_types():
        says, parameters = described(need)
        default = need()
        lines += [f"## {need.__name__}", "", says, ""]
        lines += [f"Name: `{default.name}`. Read by rules {_places(need.places)}.", ""]
        lines += _table([(f.name, _shown(f.default), parameters.get(f.name, "")) for f in dataclasses.fields(need)])
    return "\n".join(lines).rstrip() + "\n"


def signal_types() -> list[type[needs.Need]]:
    """Return the needs that a rule can name, in the order of their file."""
    every = [value for value in vars(needs).values() if isinstance(value, type) and issubclass(value, needs.Need)]
    bases = {base for kind in every for base in kind.__mro__[1:]}
    return [kind for kind in every if kind not in bases]


def described(cls: type) -> tuple[str, dict[str, str]]:
    """Return what a class says of itself, and of each of its parameters, by its docstring: `name: what it is`."""
    text = inspect.getdoc(cls) or ""
    names = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {})}
    says: list[str] = []
    parameters: dict[str, str] = {}
    last = None
    for line in text.splitlines():
        named = re.match(r"([a-z_]+(?:, [a-z_]+)*): (.*)", line)
        if named and set(named[1].split(", ")) <= names:
            last = named[1].split(", ")
            parameters.update(dict.fromkeys(last, named[2]))
        elif line.startswith("    ") and last:
            parameters.update({name: f"{parameters[name]} {line.strip()}" for name in last})
        else:
            last = None
            says.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(says).strip()), parameters


def _part(name: str, cls: type[Part]) -> Iterator[str]:
    says, parameters = described(cls)
    yield from (f"### {name}", "", says, "")
    notes = []
    if cls.places != Part.places:
        notes.append(f"Acts {_places(cls.places)}.")
    if cls.modalities != Part.modalities:
        notes.append(f"For {', '.join(sorted(cls.modalities))}.")
    if getattr(cls, "decides", False):
        notes.append("Decides itself how many tokens stay; the step needs no budget.")
    elif not cls.known_count:
        notes.append("How many tokens stay follows from the content.")
    if notes:
        yield from (" ".join(notes), "")
    rows = []
    for field, info in cls.model_fields.items():
        shown = "required" if info.default is PydanticUndefined else _shown(info.default)
        rows.append((f"**{field}**" if field == cls.main else field, shown, parameters.get(field, "")))
    yield from _table(rows)


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    if not rows:
        return []
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [
        "| parameter | default | what it is |",
        "| --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in cells),
        "",
    ]


def _places(places: frozenset[str]) -> str:
    words = {"encoder": "inside the vision encoder", "projector": "at the projector", "layer": "at a decoder layer"}
    told = [words[place] for place in ("encoder", "projector", "layer") if place in places]
    return ", ".join(told[:-1]) + (" and " if told[:-1] else "") + told[-1]


def _shown(value: Any) -> str:
    if isinstance(value, Part):
        return (
            f"`{next(n for n in registry.part_names(value.kind) if registry.part_class(value.kind, n) is type(value))}`"
        )
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def pages() -> dict[Path, str]:
    """Return the text of each page."""
    return {HERE / "parts.md": parts_page(), HERE / "signals.md": signals_page()}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
