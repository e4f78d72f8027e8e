"""Render docs/methods.md from the recipes and from what fits tiny models: python docs/make_methods.py"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import mllm_squeeze as squeeze
from mllm_squeeze import registry
from mllm_squeeze.recipe.recipe import PLACES

HERE = Path(__file__).parent
PAGE = HERE / "methods.md"
LEFT_OUT = HERE / "left_out.yaml"
FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3")
WHERE = {
    "encoder": "Inside the vision encoder",
    "keys": "On the image features that queries or the text attend to",
    "projector": "In front of the language model",
    "layer": "Inside the language model",
    "cache": "In the cache",
}

HEAD = """# Methods

What ships, by the place where a method acts first; within a place by what it goes by, in the words of the survey arXiv
2507.20198 (attention, similarity, transformation, query). Made from the recipes by `docs/make_methods.py`; nothing here
is written by hand. `mllm-squeeze methods` prints the same with filters, `mllm-squeeze describe NAME` a recipe.

- **counts**: "known", how many tokens stay follows from grid and budget; "vary", from the content; "own", the rule
  decides where no budget is given.
- **text**: whether the choice depends on the prompt.
- **reads**: signals beyond the tokens' own states, see [signals.md](signals.md).
"""

TICKS = """
## What fits what

✓ `apply` takes it with its defaults, and the tests prove a cut of its kind exact there; – it is refused, with a reason
and the closest methods that fit; T it asks for a `text_encoder=` first. All other families: `mllm-squeeze methods
--fits MODEL`, which takes a model type too.

"""

EACH = """
## Each method

What a recipe says of itself.
"""

GONE = """
## Not here

Methods that were looked at and left out, as they need what nobody can get, or are no training-free cut.

| method | paper | why |
| --- | --- | --- |
"""


def page() -> str:
    """Return docs/methods.md."""
    told = [squeeze.describe(path.stem) for path in sorted(registry.configs_dir().glob("*.yaml"))]
    told.sort(key=lambda t: (PLACES.index(t["facts"]["acts_in"][0]), t["mechanism"] or "", t["method"]))
    lines = [HEAD]
    for place, title in WHERE.items():
        here = [t for t in told if t["facts"]["acts_in"][0] == place]
        if here:
            lines += [f"## {title}", "", *_table(here), ""]
    return "\n".join(lines).rstrip() + "\n" + TICKS + _ticks(told) + EACH + "".join(_each(told)) + _gone()


def _table(told: list[dict[str, Any]]) -> Iterator[str]:
    yield "| method | goes by | acts at | counts | text | merges | reads | modalities | paper |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for t in told:
        facts, paper = t["facts"], t["paper"]
        counts = "own" if facts["decides"] else "known" if facts["known_count"] else "vary"
        signals = ", ".join(name for name in facts["signals"] if name not in ("Features", "Size"))
        modalities = "all" if len(facts["modalities"]) == 3 else ", ".join(facts["modalities"])
        cells = [
            f"**{t['method']}**",
            t["mechanism"] or "",
            "; ".join(facts["places"]),
            counts,
            "✓" if facts["reads_text"] else "",
            "✓" if facts["merges"] else "",
            signals + (" (`text_encoder=`)" if facts["text_encoder"] else ""),
            modalities,
            _paper(paper),
        ]
        yield f"| {' | '.join(cells)} |"


def _paper(paper: dict[str, Any] | None) -> str:
    if paper is None:
        return "baseline"
    link = f"[{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})" if paper["arxiv"] else ""
    return ", ".join(part for part in (link, paper["venue"]) if part)


def _ticks(told: list[dict[str, Any]]) -> str:
    found = {family: fitting(family) for family in FAMILIES}
    lines = [f"| method | {' | '.join(FAMILIES)} |", f"| --- |{' --- |' * len(FAMILIES)}"]
    for t in told:
        no = "T" if t["facts"]["text_encoder"] else "–"
        cells = ["✓" if t["method"] in found[family] else no for family in FAMILIES]
        lines.append(f"| {t['method']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@cache
def fitting(family: str) -> frozenset[str]:
    """Return the methods that fit a tiny model of a family."""
    tests = str(HERE.parent / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    import tiny

    verdicts = squeeze.check(tiny.load(family).model)["methods"]
    return frozenset(name for name, verdict in verdicts.items() if verdict == "fits")


def _each(told: list[dict[str, Any]]) -> Iterator[str]:
    for t in told:
        also = f" Also called {', '.join(t['aliases'])}." if t["aliases"] else ""
        title = f"*{t['paper']['title']}*. " if t["paper"] else ""
        defaults = ", ".join(f"`{name}: {value}`" for name, value in t["params"].items())
        yield f"\n### {t['method']}\n\n{title}{t['summary']}{also}\n\n{comment(t['method'])}\n\nDefaults: {defaults}.\n"


def comment(method: str) -> str:
    """Return the comment above a recipe as Markdown, one paragraph, its differences in another."""
    text = (registry.configs_dir() / f"{method}.yaml").read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines).replace(" Differs from the authors' code:", "\n\nDiffers from the authors' code:")


def _gone() -> str:
    entries = yaml.safe_load(LEFT_OUT.read_text(encoding="utf-8"))
    rows = [f"| {name} | {_paper({'venue': None, **entry})} | {entry['why']} |\n" for name, entry in entries.items()]
    return GONE + "".join(rows) if rows else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
