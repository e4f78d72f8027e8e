"""What is known of transformers beyond its public API stands in `upstream/` and nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import mllm_squeeze
from mllm_squeeze.upstream import injections, names

PACKAGE = Path(mllm_squeeze.__file__).parent
# Where users' own calls are written down as they write them: benchmark and demo are callers of transformers like them.
CALLERS = ("upstream", "bench", "demo", "cli")
# Arguments, attributes and words of transformers that change between releases.
NAMES = {
    *names.CACHE_NAMES,
    names.HIDDEN,
    names.MASK,
    names.POSITIONS,
    names.ROPE,
    names.EMBEDDINGS,
    names.IDS,
    names.USE_CACHE,
    *injections.DEEPSTACK_ARGUMENTS,
    injections.DEEPSTACK_METHOD,
    injections.INNER_MASK,
    injections.INNER_FEATURES,
    injections.CROSS_STATES,
    "mm_encoder_outputs",
    "mm_token_type_ids",
    "logits_to_keep",
    "output_hidden_states",
    "cu_seq_lens_q",
    "pixel_values",
    "pixel_values_videos",
    "encoder_hidden_states",
    "cross_attention_mask",
    "scaling",
    "softcap",
    "_attn_implementation",
    "_attn_implementation_internal",
    "eager_attention_forward",
    "layer_types",
    "full_attention",
    "sliding_attention",
    "linear_attention",
    "sliding_window",
    "rope_parameters",
    "rope_scaling",
    "num_kv_shared_layers",
    "layer_class_to_replicate",
    "_global_mapping",
    "pooler_output",
    "last_hidden_state",
    "_hf_hook",
    "get_base_model",
    "_orig_mod",
}
# Our own words that are spelled alike: a place of a recipe.
OURS = {"cache"}


LIBRARIES = {"transformers", "accelerate", "peft"}


def told(path: Path) -> set[str]:
    """Return the names of transformers that a file holds, as string constants, attributes or imports."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES - OURS:
            out.add(f"'{node.value}' in line {node.lineno}")
        elif isinstance(node, ast.Attribute) and node.attr in NAMES and node.attr.startswith("_"):
            out.add(f".{node.attr} in line {node.lineno}")
        elif LIBRARIES & {name.split(".")[0] for name in imported(node)}:
            out.add(f"import in line {node.lineno}")
    return out


def imported(node: ast.AST) -> list[str]:
    """Return the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [one.name for one in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def outside() -> list[Path]:
    """Return the files that must not know transformers."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [path for path in files if path.relative_to(PACKAGE).parts[0] not in CALLERS]


def test_names_of_transformers_stand_in_upstream():
    files = outside()
    assert len(files) > 60
    wrong = [f"{path.relative_to(PACKAGE)}: {found}" for path in files for found in sorted(told(path))]
    assert not wrong, "\n".join(wrong)


def test_the_scan_finds_what_it_looks_for(tmp_path):
    path = tmp_path / "someone.py"
    path.write_text(
        "import transformers.utils\n\ndef f(k):\n    return k.get('past_key_values') or k._attn_implementation\n"
    )
    assert len(told(path)) == 3
