"""Golden cases of methods for sounds."""

from __future__ import annotations

from typing import Any

import mllm_squeeze as squeeze
from golden.case import Case
from golden.readings import reads
from mllm_squeeze.recipe.recipe import load_recipe


@reads("a-tome")
def a_tome(case: Case) -> dict[str, Any]:
    """The file's code acts on keys inside the language model."""
    recipe = load_recipe("a_tome").to_dict()
    step = {"at": {"layer": 1}, "merge": {"adjacent_pairs": "keys"}}
    recipe["steps"] = [recipe["steps"][0] | step]
    return joined(recipe, case, {"projection": case["keys"]})


@reads("fastadasp")
def fastadasp(case: Case) -> dict[str, Any]:
    recipe = load_recipe("fastadasp").to_dict()
    found = joined(recipe, case, {"projection": case["keys"], "attention": case["weights"]})
    recipe["steps"][0]["merge"] = {"adjacent": "keys"}
    plain = joined(recipe, case, {"projection": case["keys"], "attention": case["weights"]})
    return found | {"merged_plain_mean": plain["merged"]}


def joined(recipe: dict[str, Any], case: Case, signals: dict[str, Any]) -> dict[str, Any]:
    """Return the states, the first token of each run, and which of them each token goes into."""
    number = len(case["hidden"])
    keep = number - int(number * case["ratio"])
    choice = squeeze.choose(recipe, features=case["hidden"], signals=signals, modality="audio", keep=keep)
    order = choice.keep.long().cumsum(0) - 1
    return {"merged": choice.features, "first_member": choice.kept, "assign": order[choice.assign]}
