"""What moved in transformers is named, without importing it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name

from mllm_squeeze.family.table import TABLE
from mllm_squeeze.upstream import symbols, versions

INSTALLED = Path(transformers.__file__).parent
LLAVA = "models/llava/modeling_llava.py"

pytestmark = pytest.mark.quick


@pytest.fixture
def drifted(tmp_path: Path) -> Path:
    """Return a release made up from the installed one: two files, with what a later one may do to them."""
    for file in ("cache_utils.py", LLAVA):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(INSTALLED / file, tmp_path / file)
    return tmp_path


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text, before
    path.write_text(text.replace(before, after))


def known(folder: Path) -> symbols.Record:
    record = symbols.Record()
    record.add("1.0", symbols.found(folder))
    return record


def test_nothing_moved_in_a_release_that_was_tested(capsys: pytest.CaptureFixture[str]) -> None:
    if not versions.is_tested():
        pytest.skip(f"transformers {transformers.__version__} was not tested yet; the command names what moved in it")
    assert symbols.moved() == []
    assert symbols.main([]) == 0
    assert "none of" in capsys.readouterr().out


def test_the_record_is_of_the_tested_releases() -> None:
    assert symbols.Record.read().releases == list(versions.TESTED)


def test_every_family_is_looked_at() -> None:
    types = {name.split("+")[0].removesuffix("_thinker") for name in TABLE}
    files = {f"models/{name}/modeling_{name}.py" for name in map(model_type_to_module_name, types)}
    assert files <= set(symbols.FILES)
    assert (INSTALLED / LLAVA).exists()


def test_a_renamed_argument_is_named(drifted: Path) -> None:
    record = known(drifted)
    edit(drifted / LLAVA, "inputs_embeds", "embeds")
    (broken,) = [one for one in record.moved(symbols.found(drifted)) if one.what.endswith("LlavaModel.forward")]
    assert "inputs_embeds=" in broken.expected and " embeds=" in broken.found
    assert "was: inputs_embeds=; is: embeds=" in symbols.summary([broken])


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("    def reset(self)", "    def rewind(self, n: int): ...\n    def reset(self)", "Layer.rewind"),
        ("    def reorder_cache(", "    def permute(", "Layer.reorder_cache: expected (beam_idx), found nothing"),
        ("class DynamicLayer(CacheLayerMixin)", "class DynamicLayer(Other)", "class (CacheLayerMixin), found class (O"),
        ('"sliding_attention": DynamicS', '"sliding_attention": S', "DYNAMIC_LAYER_TYPE_MAPPING"),
        ("class StaticLayer(", "class FixedLayer(", "StaticLayer: expected class (CacheLayerMixin), found nothing"),
    ],
    ids=["new method", "no method", "base", "table", "class"],
)
def test_a_cache_that_moved_is_named(before: str, after: str, said: str, drifted: Path) -> None:
    record = known(drifted)
    edit(drifted / "cache_utils.py", before, after)
    broken = record.moved(symbols.found(drifted))
    assert any(said in str(one) for one in broken), broken


def test_harmless_changes_are_none(drifted: Path) -> None:
    record = known(drifted)
    edit(drifted / LLAVA, "Tensor", "Array")
    edit(drifted / "cache_utils.py", "    def reset(self)", "    def _reset(self, n: int): ...\n    def reset(self)")
    assert record.moved(symbols.found(drifted)) == []


def test_what_any_tested_release_had_is_known(drifted: Path) -> None:
    """Also that a symbol was not there yet."""
    older = symbols.found(drifted)
    edit(drifted / LLAVA, "inputs_embeds", "embeds")
    edit(drifted / "cache_utils.py", "    def reset(self)", "    def rewind(self, n: int): ...\n    def reset(self)")
    newer = symbols.found(drifted)
    record = symbols.Record()
    record.add("1.0", older)
    assert record.moved(newer)
    record.add("1.1", newer)
    assert record.moved(older) == record.moved(newer) == []
    assert record.symbols["cache_utils.DynamicLayer.crop"] == {"1.0": "(tokens_to_remove)"}


def test_the_command_fails_where_something_moved(
    drifted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(symbols, "RECORD", tmp_path / "symbols.json")
    monkeypatch.setattr(symbols, "_folder", lambda: drifted)
    assert symbols.main(["--record"]) == 0
    edit(drifted / LLAVA, "inputs_embeds", "embeds")
    assert symbols.main([]) == 1
    told = capsys.readouterr().out
    assert "MOVED" in told and "LlavaModel.forward" in told and f"Tested: {transformers.__version__}." in told
