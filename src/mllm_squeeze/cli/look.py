"""The commands that only look: methods, describe, check, env. The first two import no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from mllm_squeeze import registry
from mllm_squeeze.cli import output
from mllm_squeeze.errors import ConfigError, SqueezeError
from mllm_squeeze.recipe.build import PIPELINE
from mllm_squeeze.recipe.recipe import describe as describe_method

if TYPE_CHECKING:
    from torch import nn

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def methods(as_json: Json = False) -> None:
    """List the methods: where they act, what they need, where they come from."""
    rows = [_summary(name) for name in registry.method_names()]
    if as_json:
        output.as_json(rows)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("method", "acts at", "count known", "reads text", "modalities", "arXiv"):
        table.add_column(header, no_wrap=header in ("method", "modalities", "arXiv"))
    for row in rows:
        if "error" in row:
            table.add_row(row["method"], Text(row["error"], style="red"))
            continue
        modalities = "all" if len(row["modalities"]) == 3 else row["modalities"]
        arxiv = row["paper"] and row["paper"]["arxiv"]
        cells = [row["places"], row["known_count"], row["reads_text"], modalities, arxiv]
        table.add_row(Text(row["method"], style="bold"), *(Text(output.words(cell)) for cell in cells))
    output.console().print(table)


def _summary(name: str) -> dict[str, Any]:
    try:
        told = describe_method(name)
    except SqueezeError as error:
        # One broken recipe of another package must not hide the others.
        return {"method": name, "error": str(error)}
    return {"method": name, "summary": told["summary"], **told["facts"], "paper": told["paper"]}


def _paper(paper: dict[str, Any] | None) -> str | None:
    if paper is None:
        return None
    arxiv = f"arXiv {paper['arxiv']}" if paper["arxiv"] else None
    return ", ".join(part for part in (paper["venue"], arxiv) if part) or str(paper["title"])


def describe(
    method: Annotated[str, typer.Argument(help="A method's name, or the path of a recipe file.")],
    as_json: Json = False,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the recipe and nothing else.")] = False,
) -> None:
    """Show a method: its recipe, its parameters with their defaults, its steps, its paper and its facts."""
    if as_json and as_yaml:
        raise ConfigError("--json prints the facts, --yaml the recipe; give one of them.")
    told = describe_method(method)
    if as_json:
        output.as_json(told)
        return
    if as_yaml:
        print(_text(method, told).rstrip("\n"))
        return
    from rich.syntax import Syntax

    screen = output.console()
    screen.print(Text(told["method"], style="bold"), Text(told["summary"]))
    paper = told["paper"]
    params = ", ".join(f"{name} = {value}" for name, value in told["params"].items())
    facts = told["facts"]
    output.pairs(
        {
            "paper": paper and f"{paper['title']} ({_paper(paper)})",
            "params": params or None,
            "steps": [
                f"{step.get('reducer', PIPELINE)} at {place}"
                for step, place in zip(told["steps"], facts["places"], strict=True)
            ],
            "positions": told["positions"],
            "count known from grid and budget": facts["known_count"],
            "keeps exactly what is asked": facts["exact"],
            "reads the text": facts["reads_text"],
            "signals": facts["signals"],
            "merges tokens": facts["merges"],
            "modalities": facts["modalities"],
        }
    )
    # Folded lines would be another recipe, or none.
    recipe = Syntax("", "yaml", background_color="default").highlight(_text(method, told).rstrip("\n"))
    screen.print(recipe, soft_wrap=True)


def _text(method: str, told: dict[str, Any]) -> str:
    """Return the recipe's own text, for its comments, or its YAML where it has none."""
    source = registry.method_source(method) if method in registry.method_names() else method
    if isinstance(source, (str, Path)) and Path(source).is_file():
        return Path(source).read_text(encoding="utf-8")
    return str(told["yaml"])


def check(
    model: Annotated[str, typer.Argument(help="A local folder, a config.json, a hub id, or a type: qwen2_5_vl.")],
    weights: Annotated[bool, typer.Option("--weights", help="Load the weights too, as run does.")] = False,
    as_json: Json = False,
) -> None:
    """Tell what is found in a model, which methods fit it, and whether a cut of it equals masking.

    Without weights a small random text model of the same class is cut. The exit code is 1 where the cut differs.
    """
    with output.waiting(f"building {model}"):
        found = _check(model, weights)
    failed = found["self_check"]["result"] == "failed"
    (output.as_json if as_json else _show_check)(found)
    if failed:
        raise typer.Exit(1)


def _show_check(found: dict[str, Any]) -> None:
    fits, said = found.pop("methods"), found.pop("self_check")
    output.pairs({**found, "self-check": said["text"], "checked on": said["on"]})
    table = Table("method", "fits")
    for name, reason in fits.items():
        table.add_row(Text(name, style="bold"), Text("yes" if reason == "fits" else reason))
    output.console().print(table)


def _check(name: str, weights: bool) -> dict[str, Any]:
    from mllm_squeeze import api
    from mllm_squeeze.cli import load

    built: nn.Module = load.model(name) if weights else load.skeleton(name)
    return api.check(built, run=True)


def env(as_json: Json = False) -> None:
    """Print the versions of everything that takes part, for bug reports."""
    from mllm_squeeze.env_report import environment

    with output.waiting("looking at the device"):
        found = environment()
    (output.as_json if as_json else output.pairs)(found)
