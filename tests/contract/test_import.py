"""Importing the package changes nothing anywhere, and loads neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = (
    "import mllm_squeeze, mllm_squeeze.recipe.recipe, mllm_squeeze.registry, mllm_squeeze.errors, mllm_squeeze.layout"
)

NOTHING_LOADED = f"""
import sys
{LIGHT}
import mllm_squeeze as squeeze
assert "fastv" in squeeze.methods()
assert squeeze.describe("fastv")["params"]["layer"] == 2
heavy = [name for name in ("torch", "transformers", "numpy", "PIL") if name in sys.modules]
assert not heavy, heavy
"""

NOTHING_CHANGED = """
import logging, os, random, sys, warnings
import torch, transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attention
import transformers.models.llava.modeling_llava as llava
import transformers.models.llama.modeling_llama as llama
import transformers.models.qwen3_vl.modeling_qwen3_vl as qwen3_vl
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING
from torch import nn

def classes():
    found = [Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, nn.Module, transformers.PreTrainedModel]
    for module in (llava, llama, qwen3_vl):
        found += [c for c in vars(module).values() if isinstance(c, type)]
    return {c: dict(vars(c)) for c in found}

def state():
    loggers = {n: (l.level, list(l.handlers), l.propagate) for n, l in logging.root.manager.loggerDict.items()
               if isinstance(l, logging.Logger)}
    return dict(
        attention=dict(type(attention)._global_mapping), masks=dict(type(masks)._global_mapping),
        loggers=loggers, root=(logging.root.level, list(logging.root.handlers)), filters=list(warnings.filters),
        classes=classes(), environment=dict(os.environ), threads=torch.get_num_threads(), seed=torch.initial_seed(),
        random=random.getstate(), dtype=torch.get_default_dtype(), hook=sys.excepthook, path=list(sys.path),
        hooks={k: dict(v) for k, v in vars(nn.modules.module).items() if k.startswith("_global_") and "hooks" in k},
        layers=[dict(DYNAMIC_LAYER_TYPE_MAPPING), dict(STATIC_LAYER_TYPE_MAPPING)],
    )

before = state()
import mllm_squeeze, mllm_squeeze.api, mllm_squeeze.engine.hooks.attachment, mllm_squeeze.ops
import mllm_squeeze.engine.kv.ask as engine_cache
[getattr(mllm_squeeze, name) for name in mllm_squeeze.__all__]
mllm_squeeze.methods()
after = state()
new = {n for n in after["loggers"] if n not in before["loggers"]}
after["loggers"] = {n: v for n, v in after["loggers"].items() if n not in new}
changed = [k for k in before if before[k] != after[k]]
assert not changed, changed
"""


ERRORS = """
import sys
import mllm_squeeze as squeeze
from mllm_squeeze import errors
kinds = (errors.SqueezeError, UserWarning)
found = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, kinds)}
assert len(found) == 9, found
for name in found:
    assert getattr(squeeze, name) is getattr(errors, name)
    assert name in squeeze.__all__ and name in dir(squeeze)
assert issubclass(squeeze.UnknownNameError, KeyError)
for name in squeeze.__all__:
    assert name in squeeze._HOMES
assert sorted(squeeze.__all__) == sorted(squeeze._HOMES) == squeeze.__all__
assert "torch" not in sys.modules
"""


NAMES = """
import mllm_squeeze.family.table
import mllm_squeeze as squeeze
assert "llava" in squeeze.families()
assert "llava" in squeeze.families()
"""


@pytest.mark.quick
@pytest.mark.parametrize(
    "script", [NOTHING_LOADED, NOTHING_CHANGED, NAMES, ERRORS], ids=["loads", "changes", "names", "errors"]
)
def test_import(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
