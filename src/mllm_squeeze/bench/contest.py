"""The front door of the benchmark: builds the model, lets the contestants take turns, and returns the results."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mllm_squeeze.bench import models, results
from mllm_squeeze.bench.contestants import Contestant, Ideal, Squeezed, oracle_of
from mllm_squeeze.bench.measure import CLOCKS, Race, Times
from mllm_squeeze.bench.models import Prompt
from mllm_squeeze.bench.shapes import find_shape
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.recipe.recipe import load_recipe

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CACHES = ("dynamic", "static", "compiled")
NAIVE = "naive "
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What is run: a model shape, a prompt, and how it is measured.

    entries: (method, params) of each method of ours. cache: one of CACHES. clock: "wall" or "cpu". against: a Python
    file with naive contestants, see `load_naive`.
    """

    model: str
    entries: Sequence[tuple[str, Mapping[str, Any]]]
    visual_tokens: int = 2304
    text_tokens: int = 64
    batch: int = 1
    dtype: str = "float32"
    attention: str = "sdpa"
    cache: str = "dynamic"
    device: str = "cpu"
    threads: int | None = None
    clock: str = "wall"
    rounds: int = 5
    warmup: int = 1
    decoded: int = 16
    oracle: bool = True
    against: Path | None = None


@dataclass
class Stage:
    """A built model with its prompt, the contestants that run on it, and the oracle of each entry by its name."""

    model: Any
    prompt: Prompt
    contestants: list[Contestant]
    ideals: dict[str, Ideal] = field(default_factory=dict)

    @property
    def dense(self) -> Contestant:
        """The dense model."""
        return self.contestants[0]


def load_naive(path: Path) -> Mapping[str, Any]:
    """Return the `CONTESTANTS` of a file: by method, a class called with (model, prompt, params).

    Raises:
        ConfigError: the file is missing or brings none.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"There is no Python file {path} to take contestants from.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, "CONTESTANTS", None)
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path} defines no CONTESTANTS, a dict of method name to contestant.")
    return found


def check(setting: Setting) -> None:
    """Find slips before a model is built.

    Raises:
        ConfigError, UnknownNameError: a name, a recipe or a number is not valid.
    """
    find_shape(setting.model)
    if setting.dtype not in DTYPES:
        raise ConfigError(f"dtype is one of {', '.join(DTYPES)}; got '{setting.dtype}'.")
    if setting.clock not in CLOCKS:
        raise ConfigError(f"clock is one of {', '.join(CLOCKS)}; got '{setting.clock}'.")
    if setting.cache not in CACHES:
        raise ConfigError(f"cache is one of {', '.join(CACHES)}; got '{setting.cache}'.")
    if setting.cache != "dynamic" and (setting.oracle or setting.against is not None):
        raise ConfigError(
            f"The oracle and naive contestants run with a dynamic cache only; with cache '{setting.cache}' give "
            "--no-oracle and no --against."
        )
    if setting.clock == "cpu" and not setting.device.startswith("cpu"):
        raise ConfigError("clock 'cpu' counts time on the CPU's cores; on another device use 'wall'.")
    for method, params in setting.entries:
        load_recipe(method, **params)


def label(method: str, params: Mapping[str, Any]) -> str:
    """Return the name of one of several entries: the method and its parameters."""
    given = ", ".join(f"{name}={value}" for name, value in params.items())
    return f"{method} ({given})" if given else method


@torch.inference_mode()
def build(setting: Setting, progress: Progress = lambda text: None) -> Stage:
    """Build model, prompt and contestants, and run each of them once, except naive ones."""
    shape = find_shape(setting.model)
    progress(f"building {setting.model}")
    model = models.build(shape, setting.visual_tokens, setting.device, DTYPES[setting.dtype], setting.attention)
    prompt = models.prompt(shape, model, setting.visual_tokens, setting.batch, setting.text_tokens, setting.decoded)
    stage = Stage(model, prompt, [Contestant(model, prompt)])
    progress("encoding the pictures")
    stage.dense.prepare()
    naive = {} if setting.against is None else load_naive(setting.against)
    for method, params in setting.entries:
        progress(f"preparing {method}")
        ours = Squeezed(model, prompt, method, params)
        if [name for name, _ in setting.entries].count(method) > 1:
            ours.name = label(method, params)
        ours.prepare()
        ideal = stage.ideals[ours.name] = oracle_of(ours, stage.dense)
        stage.contestants += [ours, ideal] if setting.oracle else [ours]
        if method in naive:
            other = naive[method](model, prompt, params)
            other.name, other.features = NAIVE + ours.name, stage.dense.features
            stage.contestants.append(other)
    for one in stage.contestants:
        one.cache = setting.cache
    return stage


def run(
    setting: Setting,
    command: str,
    progress: Progress = lambda text: None,
    save: Callable[[results.Results], None] = lambda found: None,
) -> results.Results:
    """Run a benchmark; raises like `check` and `models.build`. save: is given what there is after each round."""
    check(setting)
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    stage = build(setting, progress)
    device = stage.model.device
    race = Race(stage.contestants, device, setting.clock, setting.decoded)

    def found() -> results.Results:
        return results.Results(
            command=command,
            environment=results.machine(device),
            setting=_told(setting, stage, len(race.times[stage.dense.name].prefill)),
            rows=tuple(_rows(stage, race.times)),
        )

    # Every contestant has a graph of its own behind one compiled call.
    with torch._dynamo.config.patch(recompile_limit=8 + len(stage.contestants)):
        race.run(setting.rounds, setting.warmup, progress, lambda: save(found()))
    race.weigh(progress)
    save(found())
    return found()


def _told(setting: Setting, stage: Stage, rounds: int) -> dict[str, Any]:
    return {
        "model": setting.model,
        "decoder_parameters": sum(p.numel() for p in stage.model.get_decoder().parameters()),
        "visual_tokens": stage.prompt.visual,
        "prompt_tokens": stage.prompt.length,
        "batch": setting.batch,
        "dtype": setting.dtype,
        "attention": setting.attention,
        "cache": setting.cache,
        "clock": setting.clock,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "decoded_tokens": setting.decoded,
    }


def _rows(stage: Stage, times: Mapping[str, Times]) -> list[results.Row]:
    dense = times[stage.dense.name]
    layers = len(stage.model.get_decoder().layers)
    out = []
    for one in stage.contestants:
        ours = one.ours if isinstance(one, Ideal) else one
        ideal = stage.ideals.get(ours.name.removeprefix(NAIVE))
        oracle = times.get(ideal.name) if ideal is not None and ideal is not one else None
        lengths = [stage.prompt.length] * layers if ideal is None else ideal.oracle.lengths(layers)
        kind: Any = one.kind
        method, params = getattr(ours, "method", None), dict(getattr(ours, "params", {}))
        out.append(results.make_row(one.name, kind, times[one.name], dense, oracle, lengths, method, params))
    return out
