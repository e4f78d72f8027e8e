"""A wrapped model and the model inside it are one and the same: PEFT, torch.compile, data-parallel, in any nesting."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from mllm_squeeze import demo
from mllm_squeeze.upstream.modules import unwrap

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Be a process group of one, so that DistributedDataParallel can be built."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    store: Path = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def with_lora(model: nn.Module) -> nn.Module:
    """Return the model in a PEFT wrapper."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).eval()


def compiled(model: nn.Module) -> Any:
    """Return the model in the wrapper of torch.compile; nothing of it runs, so no compiler is needed."""
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "peft": with_lora,
    "compile": compiled,
    "parallel": nn.DataParallel,
    "compile of peft": lambda model: compiled(with_lora(model)),
    "parallel of compile": lambda model: nn.DataParallel(compiled(model)),
    "parallel of compile of peft": lambda model: nn.DataParallel(compiled(with_lora(model))),
    "compile of parallel": lambda model: compiled(nn.DataParallel(model)),
}


@contextlib.contextmanager
def handle_is_shared(outer: Any, inner: nn.Module) -> Iterator[None]:
    """Apply by one and remove by the other, both ways, and find the model as it was."""
    assert unwrap(outer) is inner
    before = snapshot.snapshot(inner)
    handle = squeeze.apply(outer, "divprune", ratio=0.5)
    with pytest.raises(squeeze.SqueezeError, match="'divprune' is applied"):
        squeeze.apply(inner, "fastv")
    yield
    assert handle.cuts
    squeeze.remove(inner)
    snapshot.assert_same(before, snapshot.snapshot(inner))
    squeeze.apply(inner, "divprune", ratio=0.5)
    with pytest.raises(squeeze.SqueezeError, match="'divprune' is applied"):
        squeeze.check(outer, run=True)
    squeeze.remove(outer)
    snapshot.assert_same(before, snapshot.snapshot(inner))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_shares_the_handle(wrapper: str) -> None:
    t = tiny.fresh("llava")
    outer = WRAPPERS[wrapper](t.model)
    with handle_is_shared(outer, t.model), torch.no_grad():
        # What is inside runs: whether the compiled wrapper itself does is not the matter here.
        t.model(**t.inputs["image"])


def test_distributed_data_parallel(group: None) -> None:
    t = tiny.fresh("llava")
    outer = DistributedDataParallel(t.model)
    expected = tiny.load("llava")
    with squeeze.applied(expected.model, "divprune", ratio=0.5):
        logits = oracle.run(expected.model, t.inputs["image"], oracle.forced_tokens(1, 2)).prefill
    with handle_is_shared(outer, t.model), torch.no_grad():
        assert torch.equal(outer(**t.inputs["image"]).logits, logits)
    nested = DistributedDataParallel(with_lora(t.model))
    assert unwrap(nested) is t.model


def test_a_pipeline_and_what_holds_no_model() -> None:
    pipeline = transformers.pipeline("image-text-to-text", model=str(demo.folder()), device="cpu")
    before = snapshot.snapshot(pipeline.model)
    item = next(demo.held_out(1))
    content = [{"type": "image", "image": item.picture}, {"type": "text", "text": item.question}]
    handle = squeeze.apply(pipeline, "divprune", ratio=0.5)
    pipeline(text=[{"role": "user", "content": content}], max_new_tokens=2)
    assert handle.model is pipeline.model
    assert len(handle.cuts[0].kept[0]) < handle.layout.length
    squeeze.remove(pipeline)
    snapshot.assert_same(before, snapshot.snapshot(pipeline.model))
    with pytest.raises(squeeze.SqueezeError, match="Got a SimpleNamespace"):
        squeeze.apply(SimpleNamespace(model=None), "divprune")  # type: ignore[arg-type]


def test_fully_sharded_data_parallel(group: None) -> None:
    t = tiny.fresh("llava")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = FullyShardedDataParallel(t.model, device_id=torch.device("cpu"), use_orig_params=True)
    assert unwrap(wrapped) is t.model
    handle = squeeze.apply(wrapped, "divprune", ratio=0.5)
    with torch.no_grad():
        wrapped(**t.inputs["image"])
    assert handle.cuts
    squeeze.remove(t.model)


def test_the_thinker_inside_of_wrappers() -> None:
    class Omni(nn.Module):
        def __init__(self, thinker: nn.Module) -> None:
            super().__init__()
            self.thinker = thinker

    t = tiny.fresh("qwen2_5_omni")
    assert unwrap(nn.DataParallel(Omni(t.model))) is t.model


def test_a_model_that_was_never_wrapped_is_itself() -> None:
    for name in ("llava", "qwen2_vl", "mllama"):
        model = tiny.load(name).model
        assert unwrap(model) is model
    linear = nn.Linear(2, 2)
    assert unwrap(linear) is linear
    with pytest.raises(squeeze.SqueezeError, match="Got a DataParallel without a HuggingFace config"):
        squeeze.apply(nn.DataParallel(linear), "divprune")
