"""The command that lists the methods by where they act and what they go by; imports torch only to ask a model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from mllm_squeeze import registry
from mllm_squeeze.cli import output
from mllm_squeeze.errors import SqueezeError
from mllm_squeeze.recipe.recipe import PLACES, describe

_OTHER = "none"


def methods(
    place: Annotated[
        Literal["encoder", "keys", "projector", "layer", "cache"] | None,
        typer.Option(help="Only those that act there; layer 0 is in front of the LLM, as the projector is."),
    ] = None,
    mechanism: Annotated[
        Literal["attention", "similarity", "transformation", "query", "none"] | None,
        typer.Option(help="Only those that go by this (arXiv 2507.20198)."),
    ] = None,
    modality: Annotated[
        Literal["image", "video", "audio"] | None, typer.Option(help="Only those that reduce such tokens.")
    ] = None,
    text: Annotated[
        bool | None, typer.Option("--text/--no-text", help="Only those that read the prompt, or not.")
    ] = None,
    known_count: Annotated[
        bool | None,
        typer.Option(
            "--known-count/--no-known-count", help="Only those whose counts follow from grid and budget, or not."
        ),
    ] = None,
    merges: Annotated[bool | None, typer.Option("--merges/--no-merges", help="Only those that merge, or not.")] = None,
    fits: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Only those that fit a model: what `check` takes, like qwen2_5_vl."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods: where they act, what they go by, what they need, where they come from."""
    wanted = {"mechanism": mechanism, "reads_text": text, "known_count": known_count, "merges": merges}
    asked = {name: value for name, value in wanted.items() if value is not None}
    rows = [_summary(name) for name in registry.method_names()]
    if asked or place or modality:
        rows = [row for row in rows if "error" not in row and _matches(row, asked, place, modality)]
    if fits is not None:
        verdicts = _verdicts(fits)
        rows = [row for row in rows if verdicts.get(row["method"]) == "fits"]
    if as_json:
        output.as_json(rows)
    elif rows:
        output.console().print(_table(rows))
    else:
        output.console().print("No method is all of that. Leave out one of the options.")


def _summary(name: str) -> dict[str, Any]:
    try:
        told = describe(name)
    except SqueezeError as error:
        # One broken recipe of another package must not hide the others.
        return {"method": name, "error": str(error)}
    said = {key: told[key] for key in ("summary", "aliases", "paper")}
    return {"method": name, **said, "mechanism": told["mechanism"] or _OTHER, **told["facts"]}


def _matches(row: dict[str, Any], asked: dict[str, Any], place: str | None, modality: str | None) -> bool:
    return (
        all(row[name] == value for name, value in asked.items())
        and (place is None or place in row["acts_in"])
        and (modality is None or modality in row["modalities"])
    )


def _verdicts(model: str) -> dict[str, str]:
    from mllm_squeeze import api
    from mllm_squeeze.cli import load

    with output.waiting(f"building {model}"):
        found: dict[str, str] = api.check(load.skeleton(model))["methods"]
    return found


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("method", "goes by", "acts at", "counts", "text", "modalities", "arXiv"):
        table.add_column(header, no_wrap=header != "acts at")
    for _, group in groupby(sorted(rows, key=_order), key=lambda row: _order(row)[0]):
        for row in group:
            table.add_row(Text(row["method"], style="bold"), *_cells(row))
        table.add_section()
    return table


def _order(row: dict[str, Any]) -> tuple[int, str, str]:
    """By the first place, then by mechanism; those that cannot be read come last."""
    first = PLACES.index(row["acts_in"][0]) if "error" not in row else len(PLACES)
    return first, str(row.get("mechanism")), row["method"]


def _cells(row: dict[str, Any]) -> Iterator[Text]:
    if "error" in row:
        yield Text("")
        yield Text(row["error"], style="red")
        return
    modalities = "all" if len(row["modalities"]) == 3 else row["modalities"]
    arxiv = row["paper"] and row["paper"]["arxiv"]
    mechanism = None if row["mechanism"] == _OTHER else row["mechanism"]
    counts, text = "known" if row["known_count"] else "vary", "read" if row["reads_text"] else None
    for cell in (mechanism, row["places"], counts, text, modalities, arxiv):
        yield Text(output.words(cell))
