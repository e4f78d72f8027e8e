"""The command line: what it prints, what it refuses, and what it does not import."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from mllm_squeeze import __version__, registry
from mllm_squeeze.cli import app
from mllm_squeeze.errors import UnknownNameError, UnsupportedInputError
from mllm_squeeze.recipe.recipe import PLACES, load_recipe
from mllm_squeeze.recipe.recipe import describe as describe_method

GROUPS = ("reducers", "methods", "families")


def call(*words: object, code: int = 0) -> Result:
    """Run the command with a wide terminal, so that no line is folded."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an untrained LLaVA with its processor, and a picture."""
    from mllm_squeeze.demo import build, pictures

    path = tmp_path_factory.mktemp("model")
    build.model(build.config(width=32, tower_layers=3, layers=4)).save_pretrained(path)
    build.processor().save_pretrained(path)
    from PIL import Image

    Image.new("RGB", (pictures.SIDE, pictures.SIDE), "red").save(path / "picture.png")
    return path


def test_methods_lists_all_of_them() -> None:
    lines = call("methods").output.splitlines()
    for name in registry.method_names():
        assert any(line.split()[:1] == [name] for line in lines)
    (fastv,) = (line for line in lines if line.split()[:1] == ["fastv"])
    assert "layer 2" in fastv
    assert "2403.06764" in fastv


def test_methods_as_json() -> None:
    rows = json.loads(call("methods", "--json").stdout)
    assert [row["method"] for row in rows] == registry.method_names()
    (fastv,) = (row for row in rows if row["method"] == "fastv")
    assert fastv["reads_text"] is True
    assert fastv["known_count"] is True
    assert fastv["places"] == ["layer 2"]
    assert fastv["paper"]["venue"] == "ECCV 2024"


def listed(*words: str) -> list[str]:
    return [row["method"] for row in json.loads(call("methods", "--json", *words).stdout)]


@pytest.mark.parametrize(
    ("words", "there", "away"),
    [
        (["--place", "projector"], {"divprune", "random", "dycoke"}, {"fastv", "tome"}),
        (["--place", "cache"], {"dycoke"}, {"fastv", "divprune"}),
        (["--mechanism", "transformation"], {"avgpool"}, {"fastv", "random"}),
        (["--mechanism", "none"], {"random", "uniform"}, {"fastv"}),
        (["--modality", "video", "--no-text"], {"vidcom2", "divprune"}, {"fastv", "dycoke"}),
        (["--no-known-count"], {"vidcom2"}, {"fastv"}),
        (["--merges"], {"tome", "prumerge"}, {"fastv"}),
        (["--fits", "qwen2_5_vl"], {"fastv", "vidcom2"}, {"tome", "prumerge"}),
    ],
)
def test_methods_by_what_they_are(words: list[str], there: set[str], away: set[str]) -> None:
    found = set(listed(*words))
    assert there <= found < set(registry.method_names())
    assert not away & found


def test_no_method_is_everything() -> None:
    assert "No method is all of that" in call("methods", "--place", "cache", "--mechanism", "transformation").output
    assert listed("--place", "cache", "--mechanism", "transformation") == []


def test_methods_of_a_place_stand_together() -> None:
    first = [line.split()[0] for line in call("methods").output.splitlines() if line.strip()]
    names = [word for word in first if word in registry.method_names()]
    kinds = [describe_method(name)["facts"]["acts_in"][0] for name in names]
    assert [kind for kind, _ in itertools.groupby(kinds)] == [k for k in PLACES if k in kinds]


@pytest.mark.parametrize(
    ("said", "name"), [("LLaVA-PruMerge", "prumerge"), ("sparse-vlm", "sparsevlm"), ("PDrop", "pyramiddrop")]
)
def test_methods_go_by_the_names_that_people_type(said: str, name: str) -> None:
    told = json.loads(call("describe", said, "--json").stdout)
    assert told["method"] == told["source"] == name
    assert f"method: {name}" in call("describe", said).output


def test_one_broken_recipe_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_own_methods", {"broken": {"method": "broken"}})
    output = call("methods").output
    assert "steps is a list" in output
    assert "fastv" in output
    rows = json.loads(call("methods", "--json").stdout)
    assert "steps is a list" in next(row for row in rows if row["method"] == "broken")["error"]


@pytest.mark.parametrize("name", registry.method_names())
def test_describe_shows_recipe_params_and_facts(name: str) -> None:
    told = json.loads(call("describe", name, "--json").stdout)
    output = call("describe", name).output
    assert told["summary"] in output
    # A long list goes over several lines.
    flat = " ".join(output.split())
    for param, value in told["params"].items():
        assert f"{param} = {value}" in flat
    assert "# " in output, "the comments of the recipe are part of it"


@pytest.mark.parametrize("name", registry.method_names())
def test_describe_prints_yaml_that_loads(name: str, tmp_path: Path) -> None:
    """In 80 columns too, as in a pipe: a folded comment or title is another recipe, or none."""
    narrow = {"COLUMNS": "80", "NO_COLOR": "1"}
    text = CliRunner().invoke(app, ["describe", name, "--yaml"], env=narrow).stdout
    assert text == (registry.configs_dir() / f"{name}.yaml").read_text(encoding="utf-8")
    path = tmp_path / "again.yaml"
    path.write_text(text)
    assert load_recipe(path) == load_recipe(name)
    assert text in CliRunner().invoke(app, ["describe", name], env=narrow).stdout


def test_describe_prints_the_yaml_of_a_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"method": "mine", "steps": [{"score": "random", "at": "projector", "ratio": 0.25}]}
    monkeypatch.setattr(registry, "_own_methods", {"mine": data})
    assert yaml.safe_load(call("describe", "mine", "--yaml").stdout)["steps"] == data["steps"]


def test_describe_prints_one_thing() -> None:
    assert "give one of them" in call("describe", "fastv", "--yaml", "--json", code=2).stderr


def test_describe_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: mine\nsteps: [{score: random, at: projector, ratio: 0.25}]\n")
    assert "ratio: 0.25" in call("describe", path).output


def test_describe_shows_a_registered_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [{"score": "random", "at": "projector", "ratio": 0.25}]
    monkeypatch.setattr(registry, "_own_methods", {"mine": {"method": "mine", "steps": steps}})
    assert "ratio: 0.25" in call("describe", "mine").output


def test_an_error_is_one_clean_message() -> None:
    result = call("describe", "fastw", code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: Unknown method 'fastw'. Allowed: ")
    assert "Did you mean 'fastv'?" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_debug_shows_where_it_came_from() -> None:
    result = call("--debug", "describe", "fastw", code=1)
    assert isinstance(result.exception, UnknownNameError)


def test_brackets_in_messages_are_no_markup(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: mine\nsteps: [[red]]\n")
    assert "[['red']]" in call("describe", path, code=2).stderr


def test_env_names_the_versions() -> None:
    import torch
    import transformers

    told = json.loads(call("env", "--json").stdout)
    assert told["mllm-squeeze"] == __version__
    assert told["transformers"] == transformers.__version__
    assert torch.__version__.startswith(told["torch"])
    assert told["device"]
    assert transformers.__version__ in call("env").output


def test_version() -> None:
    assert call("--version").output.strip() == f"mllm-squeeze {__version__}"


@pytest.mark.parametrize("words", [["methods"], ["describe", "fastv"], ["--help"], ["methods", "--json"]])
def test_looking_imports_no_torch(words: list[str]) -> None:
    code = (
        "import sys, time; begin = time.perf_counter()\n"
        "from mllm_squeeze.cli import app\n"
        f"app({words!r}, standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'PIL') if name in sys.modules])\n"
        "print(f'{time.perf_counter() - begin:.2f} s', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(words, done.stderr.strip())
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("weights", [[], ["--weights"]])
def test_check_tells_what_fits(folder: Path, weights: list[str]) -> None:
    told = json.loads(call("check", folder, "--json", *weights).stdout)
    assert told["family"] == "llava"
    assert told["layers"] == 4
    assert set(told["methods"]) == set(registry.method_names())
    assert told["methods"]["fastv"] == "fits"
    assert "video" in told["methods"]["vidcom2"]


@pytest.mark.parametrize(("weights", "on"), [([], "text model alone"), (["--weights"], "the model itself")])
def test_check_runs_a_self_check(folder: Path, weights: list[str], on: str) -> None:
    said = json.loads(call("check", folder, "--json", *weights).stdout)["self_check"]
    assert said["result"] == "passed" and said["layer"] == 1
    assert 0 <= said["error"] < 1e-5 < said["effect"]
    assert on in said["on"]
    lines = call("check", folder, *weights).output.splitlines()
    assert any(line.split()[:2] == ["self-check", "passed:"] and "equals masking" in line for line in lines)
    assert any(line.split()[:2] == ["checked", "on"] and on in line for line in lines)


@pytest.mark.parametrize("weights", [[], ["--weights"]])
def test_check_fails_where_a_cut_differs(folder: Path, monkeypatch: pytest.MonkeyPatch, weights: list[str]) -> None:
    """Layers that mix tokens beside their attention: the rest is printed all the same."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def mixed(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states + hidden_states.roll(1, dims=1), *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", mixed)
    output = call("check", folder, *weights, code=1).output
    assert "failed: a cut at layer 1 differs from masking the same tokens by" in output
    assert "docs/add_a_family.md" in output
    assert "fastv" in output
    told = json.loads(call("check", folder, "--json", *weights, code=1).stdout)
    assert told["self_check"]["result"] == "failed" and told["methods"]["fastv"] == "fits"


def test_check_of_layers_without_attention_is_no_error(tmp_path: Path) -> None:
    import tiny

    tiny.load("qwen3_5").model.config.save_pretrained(tmp_path)
    output = call("check", tmp_path).output
    assert "not comparable: layers without attention" in output
    assert "fastv" in output


def test_check_reads_a_config_file(folder: Path) -> None:
    lines = call("check", folder / "config.json").output.splitlines()
    assert any("fastv" in line and "yes" in line for line in lines)
    assert any("vidcom2" in line and "video" in line for line in lines)


def test_check_names_what_cannot_be_loaded(tmp_path: Path) -> None:
    assert "cannot be loaded as a multimodal model" in call("check", tmp_path, code=2).stderr
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "llama" in call("check", tmp_path, code=2).stderr.lower()


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_check_takes_a_model_type(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    told = json.loads(call("check", kind, "--json").stdout)
    assert told["family"] == kind
    assert told["methods"]["divprune"] == "fits"
    # In older releases the default config of Qwen2.5-VL lacks the mrope_section that its text model reads.
    assert kind != "llava" or told["self_check"]["on"].startswith("its text model alone")


def test_check_names_the_type_that_was_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stderr = call("check", "qwen2_5_vll", code=2).stderr
    assert "model type" in stderr and "Did you mean 'qwen2_5_vl'?" in stderr
    assert "'llama' cannot be built as a multimodal model" in call("check", "llama", code=2).stderr


def test_a_folder_comes_before_a_type(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "qwen2_5_vl").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert json.loads(call("check", "qwen2_5_vl", "--json").stdout)["family"] == "llava"


def ask(folder: Path, *words: object, code: int = 0) -> Result:
    picture = ["--image", folder / "picture.png"]
    return call("run", folder, *picture, "--prompt", "what is red ?", "--max-new-tokens", 2, *words, code=code)


def test_run_answers_and_reports(folder: Path) -> None:
    output = ask(folder, "--method", "fastv", "--ratio", 0.75, "--param", "layer=1", "--device", "cpu").output
    assert "fastv" in output
    assert "layer 1" in output
    assert "196" in output and "49" in output


def test_run_keeps_a_total(folder: Path) -> None:
    words = ["--image", folder / "picture.png", "--method", "divprune", "--total", 50, "--device", "cpu"]
    assert "392 -> 50 visual tokens" in ask(folder, *words).output


def test_run_takes_a_text_encoder(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shape | {"max_position_embeddings": 64}
    CLIPModel(CLIPConfig(text_config=text, vision_config=shape, projection_dim=8)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    step = {"at": "projector", "keep": 7, "score": {"text_similarity": "clip"}, "select": "top_k"}
    recipe = tmp_path / "asked.yaml"
    recipe.write_text(yaml.safe_dump({"method": "asked", "steps": [step]}))
    with pytest.warns(UserWarning, match="has other weights"):
        output = ask(folder, "--method", recipe, "--text-encoder", tmp_path).output
    assert "196 -> 7" in output
    assert "text_encoder=" in ask(folder, "--method", recipe, code=2).stderr
    assert "cannot be loaded" in ask(folder, "--method", recipe, "--text-encoder", folder / "no", code=2).stderr


def test_run_compares_with_the_untouched_model(folder: Path) -> None:
    output = ask(folder, "--method", "divprune", "--keep", 8, "--compare", "--dtype", "float32").output
    assert "against the untouched model" in output
    assert "dense" in output


WRONG: list[tuple[list[object], str]] = [
    (["--method", "fastv", "--ratio", 1.5], "ratio is the fraction removed"),
    (["--method", "fastv", "--ratio", 0.5, "--keep", 3], "exclude each other"),
    (["--method", "fastv", "--total", 0], "total is the tokens kept of all spans of one prompt"),
    (["--method", "fastv", "--keep", "many"], "keep is the tokens kept"),
    (["--method", "fastv", "--param", "layer"], "--param takes name=value"),
    (["--method", "fastv", "--param", "layr=3"], "Did you mean 'layer'?"),
    (["--method", "fastv", "--param", "layer=40"], "from 0 to 3"),
    (["--method", "fastv", "--dtype", "float8"], "dtype is one of auto"),
    (["--method", "fastv", "--device", "toaster"], "'toaster' cannot be used"),
    (["--method", "fastv", "--image", "nowhere.png"], "There is no file nowhere.png"),
    (["--method", "vidcom2"], "video"),
    (["--method", "fastv", "--text-encoder", "nowhere"], "compares nothing in the space of one"),
]


@pytest.mark.parametrize(("words", "says"), WRONG)
def test_run_refuses_in_one_sentence(folder: Path, words: list[object], says: str) -> None:
    stderr = ask(folder, *words, code=2).stderr
    assert says in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("content", [b"some words", b"", b"\x89PNG\r\n\x1a\n broken", b"\xff\xd8\xff broken"])
def test_run_names_a_file_that_is_no_picture(folder: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    result = ask(folder, "--method", "fastv", "--image", path, code=2)
    assert f"{path} is no picture that can be read" in result.stderr
    assert "Traceback" not in result.stderr


def test_run_reads_what_pillow_reads(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "picture.bmp"
    Image.new("L", (40, 30)).save(path)
    words = ["--prompt", "what ?", "--method", "random", "--ratio", 0.5, "--max-new-tokens", 2]
    assert "196" in call("run", folder, "--image", path, *words).output


def test_run_refuses_a_video_that_the_model_would_not_see(folder: Path, tmp_path: Path) -> None:
    """Its chat template leaves the video out; the answer would be about nothing."""
    path = tmp_path / "film.mp4"
    path.write_bytes(b"film")
    for words in (["--video", path], ["--video", path, "--image", folder / "picture.png"]):
        stderr = call("run", folder, "--prompt", "what ?", "--method", "random", *words, code=2).stderr
        assert "takes no video" in stderr and "Leave --video out" in stderr


class Reader:
    """A processor that shows everything to the model, with a decoder that fails as torchvision's does."""

    video_processor: Any = object()

    def apply_chat_template(self, chat: Any, tokenize: bool, **kwargs: Any) -> str:
        if tokenize:
            raise RuntimeError("cannot decode\nat line 5")
        return str([part["type"] for part in chat[0]["content"]])


def test_a_failing_decoder_is_one_message(tmp_path: Path) -> None:
    from mllm_squeeze.cli import load

    path = tmp_path / "film.mp4"
    path.write_bytes(b"film")
    with pytest.raises(UnsupportedInputError, match=r"refuses this prompt with .*film\.mp4: cannot decode$"):
        load.prompt(Reader(), "what ?", [], [path], None)
    blind = Reader()
    blind.video_processor = None
    with pytest.raises(UnsupportedInputError, match="takes no video"):
        load.prompt(blind, "what ?", [], [path], None)


def test_run_wants_a_picture(folder: Path) -> None:
    assert "at least one --image" in call("run", folder, "--prompt", "hi", "--method", "fastv", code=2).stderr


def test_run_says_when_the_processor_takes_no_chat(folder: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "chat_template.jinja").unlink()
    assert "processor refuses this prompt" in ask(bare, "--method", "fastv", code=2).stderr


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mllm_squeeze.demo import compare

    seen: dict[str, Any] = {}

    def main(methods: Any, ratios: Any, questions: int, pictures: int, out: Path | None, *, command: str) -> None:
        seen.update(methods=list(methods), ratios=list(ratios), questions=questions, pictures=pictures, out=out)

    monkeypatch.setattr(compare, "main", main)
    call("demo", "--methods", "fastv, random", "--ratio", 0.5, "--ratio", 0.9, "--pictures", 1, "--out", tmp_path)
    assert seen == {
        "methods": ["fastv", "random"],
        "ratios": [0.5, 0.9],
        "questions": 60,
        "pictures": 1,
        "out": tmp_path,
    }
    call("demo")
    assert seen["methods"] == list(compare.METHODS)
    assert seen["ratios"] == list(compare.RATIOS)
    call("demo", "--methods", "all")
    assert "divprune" in seen["methods"]


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--methods", "fastw"], "Did you mean 'fastv'?"), (["--ratio", "2"], "ratio is the fraction removed")],
)
def test_demo_refuses_before_it_starts(words: list[str], says: str) -> None:
    assert says in call("demo", "--methods", "fastv", *words, code=2).stderr


def test_families_has_every_type_with_its_status() -> None:
    from mllm_squeeze.family.refused import REASONS
    from mllm_squeeze.family.table import TABLE
    from mllm_squeeze.upstream.model_types import multimodal_types

    rows = {row["type"]: row for row in json.loads(call("families", "--json").stdout)}
    assert set(rows) >= set(REASONS) | {row.model_type for row in TABLE.values()} | multimodal_types()
    assert rows["llava"]["status"] == "listed" and rows["llava"]["takes"] == ["image"]
    assert rows["git"] == {"type": "git", "status": "refused", "takes": [], "note": REASONS["git"]}
    assert list(rows) == sorted(rows)


def test_families_are_filtered() -> None:
    def listed(*words: str) -> set[str]:
        return {row["type"] for row in json.loads(call("families", "--json", *words).stdout)}

    assert listed("llava_next") == {"llava_next", "llava_next_video"}
    assert "git" in listed("--status", "refused") and "llava" not in listed("--status", "refused")
    assert {"qwen2_audio", "voxtral"} <= listed("--modality", "audio")
    assert "llava" not in listed("--modality", "audio")
    assert "No model type is all of that" in call("families", "no_such_type").output
    assert "llava_onevision" in call("families", "llava").output


def test_a_type_without_a_row_is_checked_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm_squeeze.family import table

    monkeypatch.setattr(table, "TABLE", {name: row for name, row in table.TABLE.items() if name != "llava"})
    row = next(row for row in json.loads(call("families", "llava", "--json").stdout) if row["type"] == "llava")
    assert row["status"] == "self-check" and "mllm-squeeze check llava" in row["note"]
