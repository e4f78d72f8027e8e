"""The command bench: what methods cost and save on a model of random weights."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm_squeeze.cli import models, output
from mllm_squeeze.errors import ConfigError


def bench(
    model: Annotated[
        str,
        typer.Option(
            help="llava-1.5-7b, llava-next-7b, qwen2.5-vl-3b, qwen2.5-vl-7b, qwen3-vl-8b, cpu-300m or cpu-tiny; the "
            "weights are random."
        ),
    ] = "cpu-300m",
    method: Annotated[str, typer.Option(help="Names, separated by commas.")] = "fastv",
    ratio: Annotated[list[float] | None, typer.Option(help="Fraction removed; give it again for more of them.")] = None,
    keep: Annotated[str | None, typer.Option(help="Tokens kept per picture (64), or the fraction kept (0.25).")] = None,
    total: Annotated[int | None, typer.Option(help="Tokens kept of all pictures of a prompt together.")] = None,
    param: Annotated[list[str] | None, typer.Option(help="Another parameter of the methods: layer=3.")] = None,
    visual_tokens: Annotated[
        int, typer.Option(min=4, help="Visual tokens per prompt, as near as pictures allow.")
    ] = 2304,
    sweep: Annotated[str | None, typer.Option(help="Several lengths instead, separated by commas: 576,2304.")] = None,
    text_tokens: Annotated[int, typer.Option(min=2, help="Text tokens per prompt.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the best by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; float32 on a CPU.")] = None,
    attention: Annotated[str, typer.Option(help="sdpa, eager, flash_attention_2, ...")] = "sdpa",
    cache: Annotated[
        str,
        typer.Option(
            help="dynamic, static, or compiled: static with compiled decode steps. The last two: --no-oracle."
        ),
    ] = "dynamic",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on the CPU.")] = None,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: time on the cores, for a machine that is not quiet.")
    ] = "wall",
    rounds: Annotated[int, typer.Option(min=1, help="How often everyone takes a turn.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before that are not counted.")] = 1,
    decode: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 16,
    oracle: Annotated[bool, typer.Option(help="Run the oracle of each method as well.")] = True,
    against: Annotated[
        Path | None, typer.Option(help="A Python file with naive contestants: benchmarks/naive.py.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a trace of each method, and show its parts.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON, Markdown and traces.")] = None,
) -> None:
    """Measure what methods cost and save: time to first token, decoding, encoder, memory, the rule's own time."""
    ratios: list[Any] = list(ratio or []) or ([0.75] if keep is None and total is None else [None])
    entries = _entries(method, [models._params(one, keep, total, param or []) for one in ratios])
    lengths = [visual_tokens] if sweep is None else _lengths(sweep)
    from mllm_squeeze.bench.contest import Setting

    chosen = _device(device)
    settings = [
        Setting(
            model=model,
            entries=entries,
            visual_tokens=length,
            text_tokens=text_tokens,
            batch=batch,
            dtype=dtype or ("float32" if chosen == "cpu" else "bfloat16"),
            attention=attention,
            cache=cache,
            device=chosen,
            threads=threads,
            clock=clock,
            rounds=rounds,
            warmup=warmup,
            decoded=decode,
            oracle=oracle,
            against=against,
        )
        for length in lengths
    ]
    for setting in settings:
        name = model if sweep is None else f"{model}-{setting.visual_tokens}"
        if profile:
            _profile(setting, out or Path("out/bench"), name)
        else:
            _run(setting, out, name)


def _entries(names: str, params: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ConfigError("--method takes names, separated by commas: fastv,divprune.")
    return [(name, dict(given)) for given in params for name in wanted]


def _lengths(sweep: str) -> list[int]:
    try:
        found = [int(word) for word in sweep.split(",")]
    except ValueError:
        raise ConfigError(f"--sweep takes numbers of visual tokens, like 576,2304; got '{sweep}'.") from None
    if not found or min(found) < 4:
        raise ConfigError(f"--sweep needs at least 4 visual tokens each; got '{sweep}'.")
    return found


def _device(wanted: str | None) -> str:
    from mllm_squeeze.cli import load

    found = wanted or load.best_device()
    return "cpu" if found == "mps" and wanted is None else found


def _run(setting: Any, out: Path | None, name: str) -> None:
    from mllm_squeeze.bench import contest, results

    with output.progress() as progress:
        save = (lambda so_far: None) if out is None else (lambda so_far: so_far.save(out, name))
        found = contest.run(setting, shlex.join(["mllm-squeeze", *sys.argv[1:]]), progress, save)
    screen = output.console()
    screen.print(results.title(found), highlight=False, soft_wrap=True)
    for table in results.tables(found):
        screen.print(table)
    if out is not None:
        screen.print(f"written: {out / name}.json and .md", highlight=False, soft_wrap=True)


def _profile(setting: Any, out: Path, name: str) -> None:
    import torch

    from mllm_squeeze.bench import contest, profiling
    from mllm_squeeze.engine.timing import PARTS

    contest.check(setting)
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    with output.progress() as progress:
        stage = contest.build(setting, progress)
    for one in stage.contestants:
        if one.kind != "ours":
            continue
        path = out / f"{name}-{one.name.split(' ')[0]}-trace.json"
        with output.progress() as progress:
            progress(f"profiling {one.name}")
            found = profiling.trace(one, path)
        screen = output.console()
        screen.print(one.name, style="bold", highlight=False)
        screen.print(profiling.table(found, PARTS))
        screen.print(f"trace: {path}", highlight=False, soft_wrap=True)
