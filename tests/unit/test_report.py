"""The report against numbers worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from mllm_squeeze.reporting.flops import cache_bytes, layer_flops, prefill_flops
from mllm_squeeze.reporting.report import KeyRecord, PrefillRecord, Report, SpanRecord, StageRecord
from mllm_squeeze.upstream.configs import TextSizes

# D = 4, H = 2 heads and G = 1 grouped head of size 3, I = 5, V = 7.
SMALL = TextSizes(layers=2, hidden=4, heads=2, kv_heads=1, head_dim=3, intermediate=5, vocab=7)


def record(**changes: object) -> PrefillRecord:
    """Two layers, a prompt of 10 with one image of 6 tokens, cut to 2 tokens before layer 1."""
    base = PrefillRecord(
        method="fastv",
        layout_length=10,
        batch=1,
        spans=(SpanRecord(0, "image", 6),),
        stages=(StageRecord(1, "layer", "attention_rank", (6,), (2,), 10, 6, None),),
        layer_lengths=(10, 6),
        dims=SMALL,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_flops_of_a_layer_by_hand() -> None:
    # projections: q and o 2 * (2 * n * 4 * 6) = 96 n, k and v 2 * (2 * n * 4 * 3) = 48 n;
    # MLP 3 * (2 * n * 4 * 5) = 120 n; attention 2 * (2 * n * n * 6) = 24 n^2.
    assert layer_flops(SMALL, 10) == (96 + 48 + 120) * 10 + 24 * 100
    assert layer_flops(SMALL, 6) == (96 + 48 + 120) * 6 + 24 * 36


def test_plain_mlp_has_two_matrices() -> None:
    assert layer_flops(SMALL, 10) - layer_flops(replace(SMALL, mlp_matrices=2), 10) == 2 * 10 * 4 * 5


def test_grouped_heads_make_only_keys_and_values_cheaper() -> None:
    full = replace(SMALL, kv_heads=2)
    assert layer_flops(full, 10) - layer_flops(SMALL, 10) == 2 * 2 * 10 * 4 * 3
    assert cache_bytes(full, [10], 2) == 2 * cache_bytes(SMALL, [10], 2)


def test_prefill_flops_and_cache_of_the_record() -> None:
    report = Report(record())
    logits = 2 * 4 * 7
    assert report.flops_dense == 2 * 5040 + logits
    assert report.flops == 5040 + 2448 + logits
    # keys and values, one grouped head of size 3, two bytes each: 12 bytes an entry.
    assert report.cache_bytes_dense == 20 * 12
    assert report.cache_bytes == 16 * 12


def test_llava_7b_dense_prefill_matches_the_papers() -> None:
    # 576 visual tokens of LLaVA-1.5-7B cost about 3.8 T multiply-adds in the papers, that is 7.6 TFLOPs.
    dims = TextSizes(32, 4096, 32, 32, 128, 11008, 32000)
    assert prefill_flops(dims, [576] * 32) == pytest.approx(7.63e12, rel=2e-3)


def test_a_batch_counts_every_row() -> None:
    one = Report(record())
    two = Report(record(batch=2))
    assert two.flops == 2 * (one.flops or 0)
    assert two.cache_bytes == 2 * (one.cache_bytes or 0)


def test_tokens_ratio_and_means() -> None:
    report = Report(record())
    assert (report.visual_before, report.visual_after) == (6, 2)
    assert report.ratio == pytest.approx(2 / 3)
    assert report.span_tokens == ((6,), (2,))
    assert report.visual_per_layer == (6, 2)
    assert report.mean_visual == 4.0
    assert report.mean_tokens == 8.0


def test_several_spans_and_steps_follow_each_span() -> None:
    spans = (SpanRecord(0, "image", 8), SpanRecord(1, "video", 4))
    stages = (
        StageRecord(1, "layer", "a", (8, 4), (4, 2), 20, 16, 0.25),
        StageRecord(2, "layer", "b", (4, 2), (2, 1), 16, 14, 0.5),
    )
    report = Report(record(batch=2, spans=spans, stages=stages, layer_lengths=(20, 16, 14, 14)))
    assert report.span_tokens == ((8, 4), (4, 2), (2, 1))
    assert report.visual_per_layer == (12, 6, 3, 3)
    assert report.seconds == 0.75


def test_a_cut_of_the_cache_leaves_the_layers_alone() -> None:
    stages = (StageRecord(0, "cache", "snap", (6,), (3,), 10, 7, None),)
    report = Report(record(stages=stages, layer_lengths=(10, 10), cache_lengths=(7, 7)))
    assert report.visual_per_layer == (6, 6)
    assert report.flops == report.flops_dense
    assert report.cache_bytes == 14 * 12
    assert report.ratio == 0.5


def test_a_later_turn_sees_what_earlier_ones_left() -> None:
    # 5 tokens were seen before; the first layer holds all of them, the second 3.
    report = Report(record(past=5, cache_lengths=(15, 9)))
    logits = 2 * 4 * 7
    assert report.flops_dense == 2 * (264 * 10 + 24 * 10 * 15) + logits
    assert report.flops == (264 * 10 + 24 * 10 * 15) + (264 * 6 + 24 * 6 * 9) + logits
    assert report.cache_bytes_dense == 30 * 12
    assert report.cache_bytes == 24 * 12
    assert "prompt of 10 after 5 seen before" in str(report)


def crossed(**changes: int) -> PrefillRecord:
    """Two layers, of which the second attends to 8 keys instead of 20; the prompt of 10 keeps its length."""
    keys = KeyRecord((1,), before=20, after=8, **changes)
    stages = (StageRecord(0, "keys", "pool", (12,), (8,), 20, 8, None),)
    spans = (SpanRecord(0, "image", 12),)
    return record(stages=stages, spans=spans, layer_lengths=(10, 10), keys=keys)


def test_keys_beside_the_prompt() -> None:
    report, logits = Report(crossed()), 2 * 4 * 7
    # q and o, and the MLP, on 10 tokens: 216 * 10; k and v of each key: 48; attention of 10 tokens to m keys: 240 m.
    plain = 264 * 10 + 24 * 100
    assert report.flops_dense == plain + (216 * 10 + 48 * 20 + 240 * 20) + logits
    assert report.flops == plain + (216 * 10 + 48 * 8 + 240 * 8) + logits
    assert report.cache_bytes_dense == (10 + 20) * 12
    assert report.cache_bytes == (10 + 8) * 12
    assert report.visual_per_layer == (0, 8)
    text = str(report)
    assert "keys per cross-attention layer 20 8 40.0 %" in {" ".join(line.split()) for line in text.splitlines()}
    assert "0-1: 10   (keys in 1)" in text
    assert "pool  keys       -  12 -> 8  20 -> 8" in text


def test_keys_of_earlier_turns_are_seen_but_not_computed() -> None:
    report, logits = Report(replace(crossed(held_before=6, held_after=2), past=5)), 2 * 4 * 7
    plain = 264 * 10 + 24 * 10 * 15
    assert report.flops_dense == plain + (216 * 10 + 48 * 20 + 240 * 26) + logits
    assert report.flops == plain + (216 * 10 + 48 * 8 + 240 * 10) + logits
    assert report.cache_bytes_dense == (15 + 26) * 12
    assert report.cache_bytes == (15 + 10) * 12


def test_keys_in_front_of_a_q_former_leave_the_language_model_out() -> None:
    plain = record(layout_length=0, layer_lengths=(), dims=None, keys=KeyRecord((), 20, 8))
    text = str(Report(plain))
    assert "batch of 1, in front of the Q-Former" in text
    assert "language model" not in text
    assert Report(plain).as_dict()["keys"]["after"] == 8


def test_time_is_unknown_as_soon_as_one_step_was_not_measured() -> None:
    timed = StageRecord(1, "layer", "a", (6,), (3,), 10, 7, 0.001)
    untimed = replace(timed, seconds=None)
    assert Report(record(stages=(timed, timed))).seconds == pytest.approx(0.002)
    assert Report(record(stages=(timed, untimed))).seconds is None
    assert "not measured" in str(Report(record(stages=(timed, untimed))))
    assert "2.00 ms" in str(Report(record(stages=(timed, timed))))


def test_text_states_what_matters() -> None:
    text = str(Report(record(decode=("decoding reads shorter caches",))))
    assert "fastv: 6 -> 2 visual tokens, 66.7 % removed (batch of 1, prompt of 10)" in text
    assert "attention_rank  layer 1" in text
    assert "10 -> 6" in text
    assert "0: 10   1: 6" in text
    assert "80.0 %" in text  # mean tokens, 8 of 10
    assert text.endswith("decoding reads shorter caches")
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_text_folds_long_lists() -> None:
    spans = tuple(SpanRecord(i, "image", 6) for i in range(11))
    stage = StageRecord(1, "layer", "a", (6,) * 11, (6,) * 11, 10, 10, None)
    text = str(Report(record(spans=spans, stages=(stage,) * 15)))
    assert "... and 3 more" in text
    assert "6 -> 6 -> 6 -> ... -> 6 -> 6" in text


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "NO_COLOR", "COLUMNS"])
def test_text_is_plain_and_whole_in_80_columns(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long name is folded, numbers are whole; a name in brackets is a name and no colour."""
    monkeypatch.setenv(variable, "20")
    rule = "[red]" + "a_rule_with_a_long_name" * 3
    stage = StageRecord(17, "layer", rule, (123456,), (12345,), 234567, 23456, 1.5)
    text = str(Report(record(spans=(SpanRecord(0, "image", 123456),), stages=(stage,))))
    assert "\x1b" not in text and "\u2026" not in text
    tables = text.split("\n\n", 1)[1]
    assert all(len(line) <= 80 for line in tables.splitlines())
    for word in ("[red]", "123456 -> 12345", "234567 -> 23456", "1500.00 ms", "layer 17"):
        assert word in text
    assert "".join(line.split()[0 if number else 1] for number, line in enumerate(_lines_of(text, rule))) == rule


def _lines_of(text: str, rule: str) -> list[str]:
    """Return the lines over which the name of a rule is folded."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if "[red]" in line)
    return lines[first : next(i for i in range(first, len(lines)) if not lines[i])]


def test_without_visual_tokens_or_sizes() -> None:
    empty = Report(record(spans=(), stages=(), layer_lengths=(10, 10)))
    assert empty.ratio == 0.0
    assert empty.seconds == 0.0
    assert "no visual tokens" in str(empty)
    unknown = Report(record(dims=None))
    assert unknown.flops is None and unknown.cache_bytes_dense is None
    assert "unknown" in str(unknown)
    assert str(Report(record(layer_lengths=()))).startswith("fastv")


def test_dict_and_json_say_the_same() -> None:
    report = Report(record())
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.as_dict()))
    assert data["stages"][0]["after"] == [2]
    assert data["flops"] == report.flops
    assert data["dims"]["kv_heads"] == 1
    assert data["seconds"] is None


def test_importing_needs_neither_torch_nor_transformers() -> None:
    modules = "mllm_squeeze.reporting.report, mllm_squeeze.reporting.pictures"
    code = f"import sys, {modules}; print({{'torch', 'matplotlib', 'PIL'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
