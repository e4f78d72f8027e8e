"""What docs/recipes.md shows is true: its recipe loads, its reducer reduces, its messages are the ones that come."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_squeeze import registry
from mllm_squeeze.amount import Amount
from mllm_squeeze.errors import SqueezeError
from mllm_squeeze.recipe.recipe import load_recipe

TEXT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def example() -> dict[str, Any]:
    (text,) = (block for block in blocks("yaml") if "diverse_then_asked" in block)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_own_reducers", {})
    monkeypatch.setattr(registry, "_own_methods", {})


def test_the_example_loads_as_the_text_says() -> None:
    first, second = load_recipe(example()).steps
    assert (first.amount.ratio, second.amount.ratio) == (0.5, 0.875)
    first, second = load_recipe(example(), ratio=0.75, layer=4).steps
    assert (second.amount.ratio, second.at.layer) == (0.75, 4)
    first, second = load_recipe(example(), keep=64).steps
    assert (first.amount, second.amount) == (Amount(ratio=0.5), Amount(keep=64))
    first, second = load_recipe(example(), total=96).steps
    assert (first.amount, second.amount) == (Amount(ratio=0.5), Amount(total=96))


def test_the_schedule_loads() -> None:
    (text,) = (block for block in blocks("yaml") if "kept:" in block)
    (step,) = load_recipe({"method": "m", "steps": yaml.safe_load(text)}).steps
    assert step.amount.kept == (0.52, 0.35, 0.2)


def test_the_reducer_keeps_the_largest_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mllm_squeeze.reducers.base import Signals, VisualTokens
    from mllm_squeeze.reducers.needs import Features

    (code,) = (block for block in blocks("python") if "class LargestNorm" in block)
    package = tmp_path / "my_reducers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "norm.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    registry.register_reducer("largest_norm", import_module("my_reducers.norm").LargestNorm)
    tokens = VisualTokens(
        signals=Signals({Features(): torch.tensor([[[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [9.0, 9.0]]])}),
        mask=torch.tensor([[True, True, True, False]]),
        budget=torch.tensor([2]),
        counts=(2,),
        grid=torch.full((1, 4, 4), -1),
        origin=torch.arange(4)[None],
        lengths=(3,),
    )
    kept = registry.reducer_class("largest_norm")().reduce(tokens).keep
    assert kept.tolist() == [[False, True, True, False]]


MISTAKES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"layr": 3}),
    ({}, {"ratio": 0.5, "keep": 64}),
    ({"params": {"spare": 1}}, {}),
    ({"step": {"scor": "attention"}}, {}),
    ({}, {"ratio": 1.5}),
    ({"step": {"select": "farthest_point", "at": {"cache": "decode"}}}, {}),
    ({"step": {"score": "atention"}}, {}),
    ({"params": {"ratio": None}}, {}),
    ({}, {"ratio": None}),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_the_messages_are_those_that_come(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, params = MISTAKES[number]
    data = example()
    data["params"].update(change.get("params", {}))
    data["steps"][1].update(change.get("step", {}))
    if "at" in change.get("step", {}):
        del data["params"]["layer"]
        del data["steps"][1]["score"]
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(SqueezeError) as caught:
        load_recipe("my.yaml", **params)
    (shown,) = (block for block in blocks("text") if "my.yaml" in block)
    line = shown.splitlines()[number]
    start, _, end = line.partition("...")
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith(end)
