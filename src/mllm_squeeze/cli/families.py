"""The command that lists model types: squeezed, self-checked when used, or refused, and why."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from mllm_squeeze.cli import output

_UNCUTTABLE = "whatever its config says, some of its layers cannot be cut exactly: mllm-squeeze check says which"
Status = Literal["listed", "self-check", "refused"]


def families(
    name: Annotated[str, typer.Argument(help="Only types whose name holds this.")] = "",
    status: Annotated[
        Status | None,
        typer.Option(
            help="listed: tried by the tests; self-check: proves itself on its first call; refused: cannot be."
        ),
    ] = None,
    modality: Annotated[
        Literal["image", "video", "audio"] | None, typer.Option(help="Only listed types that take this.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the model types: squeezed, self-checked on their first call, or refused with the reason."""
    rows = [row for row in every_type() if name.lower() in row["type"].lower()]
    if status is not None:
        rows = [row for row in rows if row["status"] == status]
    if modality is not None:
        rows = [row for row in rows if modality in row["takes"]]
    if as_json:
        output.as_json(rows)
    elif rows:
        output.console().print(_table(rows))
    else:
        output.console().print("No model type is all of that. Leave out one of the options.")


def every_type() -> list[dict[str, Any]]:
    """Return what is known of each multimodal type: its name, status, what it takes, and a note or the reason."""
    from mllm_squeeze import registry
    from mllm_squeeze.family.refused import REASONS
    from mllm_squeeze.family.table import TABLE, UNCUTTABLE
    from mllm_squeeze.upstream.model_types import multimodal_types

    table = {**TABLE, **registry.family_plugins()}
    rows = [
        {"type": row.model_type, "status": "listed", "takes": list(row.modalities), "note": row.note}
        for name, row in table.items()
        if name not in UNCUTTABLE
    ]
    rows += [{"type": name, "status": "refused", "takes": [], "note": _UNCUTTABLE} for name in UNCUTTABLE]
    known = {row["type"] for row in rows}
    rows += [
        {"type": found, "status": "refused", "takes": [], "note": reason}
        for found, reason in REASONS.items()
        if found not in known
    ]
    rows += [
        {
            "type": found,
            "status": "self-check",
            "takes": [],
            "note": "tried when it is used: mllm-squeeze check " + found,
        }
        for found in multimodal_types() - known - set(REASONS)
    ]
    return sorted(rows, key=lambda row: row["type"])


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("type", "status", "takes", "note"):
        table.add_column(header, no_wrap=header != "note")
    for row in rows:
        style = {"listed": "green", "refused": "red"}.get(row["status"], "yellow")
        cells = (Text(row["status"], style=style), Text(output.words(row["takes"])), Text(row["note"] or ""))
        table.add_row(Text(row["type"], style="bold"), *cells)
    return table
