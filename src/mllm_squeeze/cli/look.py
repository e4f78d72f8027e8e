"""The commands that only look: describe, check, env. The first imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from mllm_squeeze import registry
from mllm_squeeze.cli import output
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.recipe.build import PIPELINE
from mllm_squeeze.recipe.recipe import describe as describe_method

if TYPE_CHECKING:
    from torch import nn

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
        print(_text(told).rstrip("\n"))
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
            "goes by": told["mechanism"],
            "also called": told["aliases"],
        }
    )
    # Folded lines would be another recipe, or none.
    recipe = Syntax("", "yaml", background_color="default").highlight(_text(told).rstrip("\n"))
    screen.print(recipe, soft_wrap=True)


def _text(told: dict[str, Any]) -> str:
    """Return the recipe's own text, for its comments, or its YAML where it has none."""
    known = told["source"]
    source = registry.method_source(known) if known in registry.method_names() else known
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
