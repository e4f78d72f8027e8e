"""What a model cannot give is refused when a method is planned, with what was asked and what there is."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

import tiny
from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.errors import ConfigError, SqueezeError, UnsupportedModelError
from mllm_squeeze.family.structure import find_parts
from mllm_squeeze.planning.signals import check_needs
from mllm_squeeze.reducers.base import Place, Reducer
from mllm_squeeze.reducers.needs import Attention, Embedding, Need, Projection, States


class Reads(Reducer):
    """Reads one signal."""

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    need: ClassVar[Need]

    def needs(self) -> tuple[Need, ...]:
        """Return the signal."""
        return (self.need,)


def check(family: str, need: Need, layer: int = 2) -> None:
    """Plan a cut that reads a signal."""
    reads: Any = type("Reads", (Reads,), {"need": need, "__module__": __name__, "__annotations__": {}})
    check_needs("probing", PlannedCut(0, "probing", layer, reads()), find_parts(tiny.load(family).model))


@pytest.mark.parametrize(
    ("family", "need", "layer", "kind", "says"),
    [
        ("llava", Attention(block=2), 2, ConfigError, "0 to 1"),
        ("llava", Attention(block=-3), 2, ConfigError, "-1 to -2"),
        ("llava", Projection(block=40), 2, ConfigError, "layer 40"),
        ("llava", States("gate", block=-9), 2, ConfigError, "layer -7"),
        ("llava", Attention(), 0, ConfigError, "between 1 and 3"),
        ("llava", States("in"), 0, ConfigError, "between 1 and 3"),
        ("llava", Attention(rows="all", over_rows="each"), 2, ConfigError, "visual, text, last, chosen"),
        ("llava", Embedding(space="clip"), 2, UnsupportedModelError, "fallback: true"),
        ("qwen3_vl_moe", States("gate"), 2, UnsupportedModelError, "'gate' of layer 1"),
        ("kimi_k25", Projection("key", rope=False), 2, UnsupportedModelError, "kv_a_proj_with_mqa"),
        ("qwen3_5", Projection("query", rope=False), 2, UnsupportedModelError, "q_proj"),
        ("qwen3_5", States("attention_out", block=0), 2, UnsupportedModelError, "linear_attn"),
        ("qwen3_5", Attention(block=0), 2, UnsupportedModelError, "which has none"),
        ("gemma3n", States("in"), 2, UnsupportedModelError, "several streams"),
        ("gemma3n", Attention(block="next"), 2, UnsupportedModelError, "previews layer 2"),
    ],
)
def test_it_says_what_cannot_be_read(family: str, need: Need, layer: int, kind: type[SqueezeError], says: str) -> None:
    if not tiny.available(family):
        pytest.skip("this transformers does not have the family")
    with pytest.raises(kind, match=says):
        check(family, need, layer)


@pytest.mark.parametrize(
    ("family", "need"),
    [
        ("llava", Attention(block=-2)),
        ("llava", Attention(block="next")),
        ("phi4_multimodal", Projection("value", rope=False)),
        ("blip_2", States("gate")),
        ("llava", Embedding("visual", "clip", fallback=True)),
    ],
)
def test_it_lets_through_what_is_there(family: str, need: Need) -> None:
    check(family, need)
