"""The command `mllm-squeeze`: look at the methods, check a model, run or measure one, see the demo, report versions."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mllm_squeeze import __version__
from mllm_squeeze.cli import bench, families, look, methods, models, output
from mllm_squeeze.errors import SqueezeError


class _Group(TyperGroup):
    """Commands whose SqueezeErrors are one red message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SqueezeError as error:
            if ctx.params.get("debug"):
                raise
            output.fail(error)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    help="Training-free pruning and merging of visual tokens for HuggingFace multimodal LLMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        output.console().print(f"mllm-squeeze {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    pass


app.command("methods")(methods.methods)
app.command("families")(families.families)
app.command("describe")(look.describe)
app.command("check")(look.check)
app.command("demo")(models.demo)
app.command("run")(models.run)
app.command("bench")(bench.bench)
app.command("env")(look.env)


def main() -> None:
    """Run the command line."""
    app(prog_name="mllm-squeeze")
