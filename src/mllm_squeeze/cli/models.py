"""The commands that run a model: run and demo."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table
from rich.text import Text

from mllm_squeeze.cli import output
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.recipe.recipe import load_recipe


def demo(
    ratio: Annotated[list[float] | None, typer.Option(help="Fraction removed; give it again for more of them.")] = None,
    methods: Annotated[str | None, typer.Option(help="Names, separated by commas; 'all' for all that fit.")] = None,
    questions: Annotated[int, typer.Option(help="How many held-out questions to ask.", min=2)] = 60,
    pictures: Annotated[int, typer.Option(help="How many pictures of survivors to draw.", min=0)] = 2,
    out: Annotated[Path | None, typer.Option(help="Folder for the table, the numbers and the pictures.")] = None,
) -> None:
    """Compare methods on the small trained model in the box: accuracy, time, and pictures of what is kept."""
    names = None if methods in (None, "all") else [name.strip() for name in str(methods).split(",") if name.strip()]
    for name in names or []:
        for value in ratio or [0.5]:
            load_recipe(name, ratio=value)
    compare = _compare()
    compare.main(
        names or (compare.image_methods() if methods == "all" else compare.METHODS),
        tuple(ratio or compare.RATIOS),
        questions,
        pictures,
        out,
        command=shlex.join(["mllm-squeeze", *sys.argv[1:]]),
    )


def _compare() -> Any:
    try:
        from mllm_squeeze.demo import compare
    except ImportError as error:
        raise ConfigError(f"The demo needs more packages ({error}): pip install 'mllm-squeeze[demo]'.") from error
    return compare


def run(
    model: Annotated[str, typer.Argument(help="A local folder or a hub id.")],
    method: Annotated[str, typer.Option(help="A method's name, or the path of a recipe file.")],
    prompt: Annotated[str | None, typer.Option(help="The question.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; give it again for more.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video; give it again for more.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to take of each video.", min=1)] = None,
    ratio: Annotated[float | None, typer.Option(help="Fraction of the visual tokens removed.")] = None,
    keep: Annotated[str | None, typer.Option(help="Tokens kept per picture (64), or the fraction kept (0.25).")] = None,
    total: Annotated[int | None, typer.Option(help="Tokens kept of all pictures of the prompt together.")] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="CLIP or SigLIP model of the tower, where a method compares in its space."),
    ] = None,
    param: Annotated[list[str] | None, typer.Option(help="Another parameter of the method: layer=3.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 128,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best by default.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Time the untouched model as well.")] = False,
    lines: Annotated[
        Path | None,
        typer.Option("--in", help='Questions instead of --prompt, one a line: {"prompt": "...", "images": ["a.png"]}.'),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the answers to --in; a run that was stopped goes on with it.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Lines of --in at once, those of like length together.")] = 8,
) -> None:
    """Ask a model about pictures or videos, with a method applied: one question, or each line of a file."""
    _check_asked(prompt, lines, out, bool(image or video or compare))
    params = _params(ratio, keep, total, param or [])
    recipe = load_recipe(method, **params)  # a slip shows before the weights load
    from mllm_squeeze import api
    from mllm_squeeze.cli import load
    from mllm_squeeze.engine.text_encoder import TextEncoder
    from mllm_squeeze.planning.shared_space import require_used

    if text_encoder is not None:
        require_used(recipe)

    if lines is not None and out is not None:
        said = dict(model=model, method=method, params=params, text_encoder=text_encoder, frames=frames, dtype=dtype)
        _run_lines(lines, out, {**said, "max_new_tokens": max_new_tokens}, device, batch_size)
        return
    with output.waiting(f"loading {model}"):
        reader = load.processor(model)
        inputs = load.prompt(reader, prompt or "", image or [], video or [], frames)
        loaded = load.model(model, device, dtype)
        inputs = inputs.to(loaded.device, dtype=loaded.dtype)
    encoder = None if text_encoder is None else TextEncoder(text_encoder, tokenizer=reader)
    with api.applied(loaded, method, text_encoder=encoder, **params) as handle:
        dense = None
        with output.waiting("answering"):
            if compare:
                with handle.disabled():
                    dense = _timed(loaded, reader, inputs, max_new_tokens)
            squeezed = _timed(loaded, reader, inputs, max_new_tokens)
        _show(handle, squeezed, dense)


def _check_asked(prompt: str | None, lines: Path | None, out: Path | None, of_one: bool) -> None:
    if (prompt is None) == (lines is None):
        raise ConfigError("Give either --prompt, one question, or --in, a file with one question a line.")
    if (lines is None) != (out is None):
        raise ConfigError("--in, the file of questions, and --out, the file for their answers, go together.")
    if lines is not None and of_one:
        raise ConfigError("--image, --video and --compare belong to --prompt: the lines of --in name their own files.")


def _run_lines(path: Path, out: Path, said: dict[str, Any], device: str | None, size: int) -> None:
    """Answer each line of a file; exit code 1 where one of them got an error instead of an answer."""
    from mllm_squeeze import api
    from mllm_squeeze.cli import load, offline
    from mllm_squeeze.engine.text_encoder import TextEncoder
    from mllm_squeeze.serving import lines

    asked = lines.read(path)
    with lines.answers(out, asked, json.dumps(said, sort_keys=True)) as answers:
        with output.waiting(f"loading {said['model']}"):
            reader = load.processor(said["model"], padding_side="left")
            loaded = load.model(said["model"], device, said["dtype"])
        name = said["text_encoder"]
        encoder = None if name is None else TextEncoder(name, tokenizer=reader)
        with (
            api.applied(loaded, said["method"], text_encoder=encoder, **said["params"]) as handle,
            output.progress() as progress,
        ):
            progress(f"{len(answers.done)} of {len(asked)} lines were answered before")
            asker = offline.Asker(loaded, reader, handle, said["frames"], said["max_new_tokens"])
            failed = offline.answer(asker, asked, answers, size, progress)
    output.console().print(f"written: {out}, {failed} lines with an error", highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _params(ratio: float | None, keep: str | None, total: int | None, more: list[str]) -> dict[str, Any]:
    """Return the method's parameters with the types that YAML gives them."""
    out: dict[str, Any] = {}
    if ratio is not None:
        out["ratio"] = ratio
    if keep is not None:
        out["keep"] = yaml.safe_load(keep)
    if total is not None:
        out["total"] = total
    for text in more:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--param takes name=value, like layer=3; got '{text}'.")
        out[name] = yaml.safe_load(value)
    return out


def _generate(model: Any, inputs: Any, tokens: int) -> tuple[Any, float]:
    """Return what was written and the seconds it took, the device's work included."""
    import torch

    wait = torch.cuda.synchronize if model.device.type == "cuda" else (lambda: None)
    wait()
    begin = time.perf_counter()
    with torch.inference_mode():
        written = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    wait()
    return written, time.perf_counter() - begin


def _timed(model: Any, reader: Any, inputs: Any, tokens: int) -> dict[str, Any]:
    """Return the answer, its length, and the seconds to the first token and to the last."""
    _generate(model, inputs, 2)  # the first prefill and the first decode step pay for warming up
    _, first = _generate(model, inputs, 1)
    written, total = _generate(model, inputs, tokens)
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    answer = reader.batch_decode(written[:, start:], skip_special_tokens=True)[0].strip()
    return {"answer": answer, "tokens": written.shape[1] - start, "first": first, "total": total}


def _show(handle: Any, squeezed: dict[str, Any], dense: dict[str, Any] | None) -> None:
    screen = output.console()
    screen.print(Text(squeezed["answer"]), soft_wrap=True)
    screen.print()
    screen.print(Text(str(handle.report())), soft_wrap=True)
    if dense is None:
        return
    table = Table("", "first token", "whole answer", "tokens", "answer", title="against the untouched model")
    for name, run in (("dense", dense), (handle.method, squeezed)):
        times = [f"{1000 * run[key]:.0f} ms" for key in ("first", "total")]
        table.add_row(Text(name, style="bold"), *times, str(run["tokens"]), Text(run["answer"]))
    screen.print(table)
