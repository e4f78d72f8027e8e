"""The benchmark: the oracle is right, turns and medians are as they say, and the command writes what can be read."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from mllm_squeeze.bench import contest, models, profiling, results
from mllm_squeeze.bench.contestants import Contestant, Squeezed, oracle_of
from mllm_squeeze.bench.measure import Race, Times, order, paired, part_seconds, spread
from mllm_squeeze.bench.memory import TensorMemory, peak_bytes
from mllm_squeeze.bench.shapes import SHAPES, Shape, find_shape
from mllm_squeeze.cli import app
from mllm_squeeze.engine.timing import PARTS, marked, timed
from mllm_squeeze.errors import ConfigError, UnknownNameError

NAIVE = Path(__file__).parents[2] / "benchmarks" / "naive.py"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TOKENS = 100
QWEN = Shape(
    "tiny-qwen3",
    "qwen",
    find_shape("qwen3-vl-8b").classes,
    dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=160,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    ),
    dict(
        depth=3,
        hidden_size=32,
        intermediate_size=64,
        num_heads=4,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=64,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1, 2],
    ),
    fixed=False,
)

QWEN25 = Shape(
    "tiny-qwen2.5",
    "qwen",
    find_shape("qwen2.5-vl-7b").classes,
    QWEN.text,
    dict(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=4,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=64,
        window_size=16,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    ),
    fixed=False,
)


def dense_on(shape: Shape, batch: int = 1, attention: str = "sdpa") -> Contestant:
    """Return the prepared dense contestant; large weights, so that every token matters."""
    model = models.build(shape, TOKENS, attention=attention)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and "embed" not in name:
            torch.nn.init.normal_(weight, std=0.1)
    prompt = models.prompt(shape, model, TOKENS, batch, text=12, steps=3)
    dense = Contestant(model, prompt)
    with torch.inference_mode():
        dense.prepare()
    return dense


@pytest.fixture(scope="module")
def llava() -> Contestant:
    return dense_on(find_shape("cpu-tiny"))


@pytest.fixture(scope="module")
def naive() -> Mapping[str, Any]:
    return contest.load_naive(NAIVE)


@torch.inference_mode()
def logits(one: Contestant) -> torch.Tensor:
    """Return the logits of the prefill and of each decode step."""
    with one.active():
        state = one.prefill()
        found = [state.logits]
        for number in range(one.prompt.decoded.shape[1]):
            state = one.step(state, number)
            found.append(state.logits)
    return torch.stack(found)


def squeezed(dense: Contestant, method: str, **params: Any) -> Squeezed:
    ours = Squeezed(dense.model, dense.prompt, method, params)
    with torch.inference_mode():
        ours.prepare()
    return ours


# The oracle


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("uniform", {"ratio": 0.6}),
        ("divprune", {"ratio": 0.75}),
        ("fastv", {"ratio": 0.75}),
        ("fastv", {"ratio": 0.5, "layer": 1}),
        ("dart", {"ratio": 0.75}),
        ("pyramiddrop", {"ratio": 0.875}),
        ("sparsevlm", {"ratio": 0.75, "recycle": False}),
    ],
)
def test_oracle_gives_our_logits(llava: Contestant, method: str, params: dict[str, Any]) -> None:
    ours = squeezed(llava, method, **params)
    ideal = oracle_of(ours, llava)
    found = logits(ours)
    torch.testing.assert_close(logits(ideal), found, rtol=0, atol=1e-4)
    assert (found - logits(llava)).abs().max() > 1e-3, "the cut must matter, or this proves nothing"
    assert min(ideal.oracle.lengths(4)) < llava.prompt.length


@pytest.mark.parametrize("shape", [QWEN25, QWEN], ids=lambda shape: shape.name)
@pytest.mark.parametrize(("method", "layer"), [("divprune", 0), ("fastv", 1), ("fastv", 2)])
def test_oracle_follows_deepstack_and_three_axes(shape: Shape, method: str, layer: int) -> None:
    dense = dense_on(shape, batch=2)
    ours = squeezed(dense, method, ratio=0.7, **({"layer": layer} if layer else {}))
    ideal = oracle_of(ours, dense)
    torch.testing.assert_close(logits(ideal), logits(ours), rtol=0, atol=1e-4)
    assert "_deepstack_process" not in dense.model.get_decoder().__dict__


def test_oracle_shortens_masks() -> None:
    dense = dense_on(find_shape("cpu-tiny"), batch=2, attention="eager")
    ours = squeezed(dense, "fastv", ratio=0.75)
    ideal = oracle_of(ours, dense)
    assert ideal.oracle.stages[0].mask is not None
    torch.testing.assert_close(logits(ideal), logits(ours), rtol=0, atol=1e-4)


def test_oracle_of_a_merging_method_runs_on_the_same_lengths(llava: Contestant) -> None:
    ours = squeezed(llava, "visionzip", ratio=0.75)
    ideal = oracle_of(ours, llava)
    with torch.inference_mode(), ours.active():
        ours.prefill()
        assert tuple(ideal.oracle.lengths(4)) == ours.handle.report().record.layer_lengths
    assert logits(ideal).isfinite().all()


def test_contestants_leave_the_model_as_it_was(llava: Contestant, naive: Mapping[str, Any]) -> None:
    before = logits(llava)
    ours = squeezed(llava, "fastv", ratio=0.75)
    for one in (ours, oracle_of(ours, llava), naive_of(naive, llava, "fastv", ratio=0.75)):
        logits(one)
        assert torch.equal(logits(llava), before), one.kind


# The naive way


def naive_of(naive: Mapping[str, Any], dense: Contestant, method: str, **params: Any) -> Any:
    one = naive[method](dense.model, dense.prompt, params)
    one.features = dense.features
    return one


@pytest.mark.parametrize("method", ["fastv", "divprune", "dart"])
def test_naive_keeps_what_we_keep(llava: Contestant, naive: Mapping[str, Any], method: str) -> None:
    ours = squeezed(llava, method, ratio=0.75)
    found = logits(ours)
    other = naive_of(naive, llava, method, ratio=0.75)
    torch.testing.assert_close(logits(other), found, rtol=0, atol=1e-4)
    assert other.kept == ours.handle.cuts[-1].kept[0].tolist()


def test_a_file_without_contestants_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="CONTESTANTS"):
        contest.load_naive(tmp_path / "empty.py")
    with pytest.raises(ConfigError, match="no Python file"):
        contest.load_naive(tmp_path / "missing.py")


# Numbers


def test_spread_and_pairs() -> None:
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == results.Spread(3.0, 2.0, 4.0, 5)
    assert spread([2.0]) == results.Spread(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="no numbers"):
        spread([])
    # Everything in the second round took ten times as long; the ratios do not see it.
    assert paired([1.0, 20.0, 3.0], [2.0, 40.0, 4.0]).median == 0.5


def test_everyone_takes_turns() -> None:
    assert [order(3, n) for n in range(3)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]
    calls: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def active(self) -> Any:
            return torch.inference_mode()

        def encode(self) -> None:
            calls.append(f"{self.name} encodes")

        def prefill(self) -> str:
            calls.append(f"{self.name} prefills")
            return "state"

        def step(self, state: str, number: int) -> str:
            assert state == "state"
            calls.append(f"{self.name} step {number}")
            return state

    pair: Any = [Fake("a"), Fake("b")]
    times = Race(pair, torch.device("cpu"), "wall", steps=2).run(rounds=2, warmup=1)
    assert [len(t.prefill) for t in times.values()] == [2, 2], "the round of warming up is not counted"
    assert [c[0] for c in calls if "prefills" in c] == list("baabba")
    assert calls[:4] == ["b encodes", "b prefills", "b step 0", "b step 1"]


def test_parts_are_counted_once() -> None:
    ticks = iter(range(100))

    @marked("select")
    def inner() -> int:
        return 1

    @marked("signal")
    def outer() -> int:
        return inner() + inner()

    assert outer() == 2
    with timed(lambda: float(next(ticks))) as clock:
        assert outer() + inner() == 3
    assert part_seconds(clock) == {"signal": 1.0, "select": 1.0, "merge": 0.0, "shorten": 0.0}
    with pytest.raises(KeyError), timed(lambda: 0.0) as clock:
        marked("signal")({}.__getitem__)("missing")
    assert [name for name, _, _ in clock.spans] == ["signal"]


@pytest.mark.parametrize("method", ["fastv", "sparsevlm", "visionzip"])
def test_the_rules_work_is_seen(llava: Contestant, method: str) -> None:
    ours = squeezed(llava, method, ratio=0.75)
    times = Race([llava, ours], llava.model.device, "wall", steps=2).run(rounds=1, warmup=0)
    assert times["dense"].rule == [0.0]
    mine = times[method]
    for part in ("signal", "select", "shorten", *(["merge"] if method != "fastv" else [])):
        assert mine.parts[part][0] > 0, part
    assert 0 < mine.rule[0] < mine.encoder[0] + mine.prefill[0]


def test_profile_names_the_parts(llava: Contestant, tmp_path: Path) -> None:
    found = profiling.trace(squeezed(llava, "fastv", ratio=0.75), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {f"squeeze::{p}" for p in ("signal", "select", "shorten")} <= {event.get("name") for event in events}
    assert "aten::" in str(profiling.busiest(found, "select"))
    assert profiling.table(found, PARTS).row_count >= 3


# Prompts


@pytest.mark.parametrize(("tokens", "expected"), [(2880, (48, 60)), (16384, (128, 128)), (97, (9, 11)), (1, (1, 1))])
def test_rectangles(tokens: int, expected: tuple[int, int]) -> None:
    assert models.rectangle(tokens) == expected


def test_naive_works_with_three_axes(naive: Mapping[str, Any]) -> None:
    dense = dense_on(QWEN25)
    ours = squeezed(dense, "fastv", ratio=0.75)
    torch.testing.assert_close(logits(naive_of(naive, dense, "fastv", ratio=0.75)), logits(ours), rtol=0, atol=1e-4)


def test_every_shape_builds_and_counts_its_tokens() -> None:
    wanted = {"llava-1.5-7b": 2880, "llava-next-7b": 2928, "cpu-300m": 2304}
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = models.build(shape, 2880, "meta", torch.bfloat16)
        assert model.dtype == torch.bfloat16
        size = sum(p.numel() for p in model.get_decoder().parameters())
        billions = {"7b": (6.2e9, 7.8e9), "3b": (2.9e9, 3.3e9), "8b": (7e9, 8.5e9), "300m": (2.5e8, 3.6e8)}
        low, high = billions.get(name.rpartition("-")[2], (0, 1e7))
        assert low < size < high, f"{name}: {size}"
        ids, _ = models._pictures(shape, model, wanted.get(name, 2880), 1, torch.Generator())
        expected = wanted.get(name, 2880) if name != "cpu-tiny" and name != "cpu-300m" else models.side(2880) ** 2
        assert ids.count(models.IMAGE) == expected, name


def test_unknown_model_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"cpu-300m"):
        find_shape("cpu-300")


# Results and the command


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, words)], env={"COLUMNS": "300", "NO_COLOR": "1"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


SMALL = ("--model", "cpu-tiny", "--visual-tokens", TOKENS, "--rounds", 2, "--warmup", 0, "--decode", 3)


def test_command_writes_results(tmp_path: Path) -> None:
    output = call(*SMALL, "--method", "fastv,divprune", "--against", NAIVE, "--clock", "cpu", "--out", tmp_path)
    found = results.Results.load(tmp_path / "cpu-tiny.json")
    names = ["fastv", "oracle of fastv", "naive fastv", "divprune", "oracle of divprune", "naive divprune"]
    assert [row.name for row in found.rows] == ["dense", *names]
    assert found.setting["visual_tokens"] == TOKENS and found.setting["clock"] == "cpu"
    ours = found.rows[1]
    assert ours.layers == (164, 164, 89, 89)
    assert ours.efficiency is not None and ours.efficiency.count == 2
    pairs = zip(found.rows[2].rounds["prefill"], ours.rounds["prefill"], strict=True)
    assert ours.efficiency == spread([ideal / mine for ideal, mine in pairs])
    assert ours.rule_share is not None and ours.rule_share > 0
    text = (tmp_path / "cpu-tiny.md").read_text()
    assert all(f"| {row.name} |" in text for row in found.rows)
    assert "naive divprune" in output


def test_sweep_and_profile(tmp_path: Path) -> None:
    call("--model", "cpu-tiny", "--sweep", "16,36", "--rounds", 1, "--decode", 2, "--no-oracle", "--out", tmp_path)
    found = [results.Results.load(tmp_path / f"cpu-tiny-{n}.json") for n in (16, 36)]
    assert [f.setting["visual_tokens"] for f in found] == [16, 36]
    assert found[0].rows[1].efficiency is None
    output = call(*SMALL, "--method", "pyramiddrop", "--profile", "--out", tmp_path)
    assert "shorten" in output
    assert (tmp_path / "cpu-tiny-pyramiddrop-trace.json").is_file()


@pytest.mark.parametrize(
    "words",
    [
        ("--model", "gpt"),
        ("--method", "fastw"),
        ("--method", ","),
        ("--ratio", "1.5"),
        ("--clock", "sun"),
        ("--dtype", "int8"),
        ("--sweep", "few"),
        ("--attention", "nonsense"),
        ("--cache", "none"),
        ("--cache", "static"),
    ],
)
def test_slips_end_in_one_message(words: tuple[str, str]) -> None:
    assert "Error" in call(*SMALL, *words, code=2)


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_results_can_be_read(path: Path) -> None:
    found = results.Results.load(path)
    assert found.rows[0].kind == "dense"
    assert results.markdown(found) == path.with_suffix(".md").read_text(), "write it again with Results.save"


LONG = "oracle of pyramiddrop (ratio=0.75, layers=[8, 16, 24])"


@pytest.mark.parametrize("long", [False, True])
def test_the_tables_can_be_read_in_80_columns(long: bool) -> None:
    """Nothing is cut off, no number is folded, and each row can be found by its contestant."""
    found = results.Results.load(RESULTS / "cpu-300m.json")
    if long:
        found = found.model_copy(update={"rows": tuple(row.model_copy(update={"name": LONG}) for row in found.rows)})
    for table in results.tables(found):
        stream = io.StringIO()
        Console(file=stream, width=80, color_system=None).print(table)
        lines = stream.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        text = " ".join(" ".join(lines).split())
        assert "\N{HORIZONTAL ELLIPSIS}" not in text
        for number, column in enumerate(table.columns):
            # A header may stand on two lines, a number may not.
            assert all(word in text for word in str(column.header).split())
            if number:
                assert all(
                    any(str(cell) in line.split() or str(cell) in line for line in lines) for cell in column.cells
                )
        if not long:
            for row in results.Results.load(RESULTS / "cpu-300m.json").rows:
                assert sum(line.startswith(f"{row.name} ") for line in lines) <= 1
    shown = {str(column.header).replace("\n", " ") for table in results.tables(found) for column in table.columns}
    assert set(results.HEADERS) <= shown


def test_the_command_shows_all_columns_in_a_pipe_and_says_what_it_does(tmp_path: Path) -> None:
    """A pipe has 80 columns, and shows no spinner: a line per step goes to the error stream instead."""
    words = ["bench", *map(str, SMALL), "--method", "fastv", "--clock", "cpu"]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines[1:]), done.stdout
    for title in ("prefill", "decoding"):
        assert any(line.startswith(title) for line in lines)
    for name in ("dense", "fastv", "oracle of fastv"):
        assert sum(line.startswith(f"{name} ") for line in lines) >= 2
    said = done.stderr.splitlines()
    for step in (
        "building cpu-tiny",
        "encoding the pictures",
        "round 1 of 2: fastv",
        "round 2 of 2: dense",
        "memory: fastv",
    ):
        assert any(line.endswith(step) for line in said), done.stderr
    assert not set(said) & set(lines)


@torch.inference_mode()
def test_memory_counts_what_lives() -> None:
    """Views cost nothing, what was let go of is gone, and the peak is the most that lived at once."""
    with TensorMemory() as memory:
        one = torch.zeros(1000)
        view = one.view(10, 100)
        assert memory.now == 4000
        del one
        assert memory.now == 4000
        two = view + 1
        assert memory.now == 8000
        del view
        two.add_(1)
        assert memory.now == 4000
    assert memory.peak == 8000


def test_memory_of_a_squeezed_prefill(llava: Contestant) -> None:
    """A prefill holds what its oracle holds; before layer 0 also the prompt, which the model itself keeps: twice."""
    device, prompt = torch.device("cpu"), llava.prompt
    states = prompt.length * llava.model.config.get_text_config().hidden_size * 4
    # Places, grids and masks of tokens, which weigh little beside the states of a model of real size.
    places = 128 * prompt.length
    for method, params, kept in (("fastv", {"layer": 2}, 0), ("uniform", {}, 2 * states)):
        ours = squeezed(llava, method, **params)
        with ours.active():
            mine = peak_bytes(ours.prefill, device)
        ideal = oracle_of(ours, llava)
        with ideal.active():
            theirs = peak_bytes(ideal.prefill, device)
        assert theirs < mine <= 1.05 * (theirs + kept) + places, method


@pytest.mark.parametrize("cache", ["static", "compiled"])
def test_caches_of_fixed_size(llava: Contestant, cache: str) -> None:
    """Decode steps say what they say with a growing cache."""
    ours = squeezed(llava, "fastv")
    expected = logits(ours)
    ours.cache = cache
    try:
        found = logits(ours)
    finally:
        for name in ("_compiled_call", "_last_compile_config"):
            ours.model.__dict__.pop(name, None)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_naive_file_is_no_part_of_the_package() -> None:
    assert importlib.util.find_spec("mllm_squeeze.bench.naive") is None
    assert Times().memory is None
