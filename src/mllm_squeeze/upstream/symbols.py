"""The symbols of transformers that are relied on, and what moved among them in the release that is installed.

    python -m mllm_squeeze.upstream.symbols            # what moved; exit status 1 where something did
    python -m mllm_squeeze.upstream.symbols --record   # the release passes its tests: add it to symbols.json

Only source text is read: no weights, no model, nothing of transformers is imported. symbols.json says of each symbol
what it looked like on the releases that were tested, `{since: signature}`. What looks like none of these has moved, and
so has what nobody has looked at: a new method of a cache is how a crop once went past a cut.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from mllm_squeeze.upstream.broken import Broken

RECORD = Path(__file__).with_name("symbols.json")
ABSENT = "nothing of this name"

# file: which of its names, `Class.method` included, are relied on.
_LIBRARY = {
    "cache_utils.py": r"((|Dynamic|Static)Cache|\w*CacheLayerMixin|(Dynamic|Static|LinearAttention|Dummy)\w*Layer)"
    r"(\.[a-z]\w+)?|(DYNAMIC|STATIC)_LAYER_TYPE_MAPPING",
    "configuration_utils.py": r"ALLOWED_ATTN_LAYER_TYPES",
    "generation/utils.py": r"GenerationMixin\.(generate|_expand_inputs_for_generation|get_compiled_call|_prefill)",
    "integrations/flash_attention.py": r"flash_attention_forward",
    "integrations/flex_attention.py": r"flex_attention_forward",
    "integrations/sdpa_attention.py": r"sdpa_attention_forward",
    "modeling_layers.py": r"GradientCheckpointingLayer(\.\w+)?",
    "modeling_outputs.py": r"(BaseModelOutputWithPast|CausalLMOutputWithPast|BaseModelOutputWithPooling)\.\w+",
    "modeling_utils.py": r"ALL_ATTENTION_FUNCTIONS|AttentionInterface\.\w+"
    r"|\w+\.(get_decoder|set_attn_implementation|_from_config)",
    "utils/generic.py": r"GeneralInterface\.(register|_global_mapping)",
    "vision_utils.py": r"get_vision_window_index",
}
_MODEL = (
    r"\w*((Decoder|Encoder|Vision)Layer|VisionBlock|TextModel|(?<!Vision)(?<!PreTrained)Model|QFormer\w*(Layer|Model))\.forward"
    r"|\w+Model\.(get_(image|video|audio)_features|get_rope_index|get_per_layer_inputs|pack_image_features|apply_pooling"
    r"|_deepstack_process)"
    r"|image_size_to_num_patches|get_vision_window_index|eager_attention_forward"
)
# The folders of the families, then those of the text models and towers that they are made of.
_MODELS = """
    apertus1p5 aria audioflamingo3 aya_vision blip_2 chameleon clip cohere2_vision cohere_compass cosmos3_edge
    cosmos3_omni deepseek_ocr2 deepseek_vl deepseek_vl_hybrid diffusion_gemma dots3_note emu3 ernie4_5_vl_moe
    exaone4_5 fast_vlm florence2 fun_asr_nano fuyu gemma gemma2 gemma3 gemma3n gemma4 gemma4_unified glm46v glm4v
    glm4v_moe glm5_next glm_ocr glmasr glmga got_ocr2 granite4_vision granite_docling granite_speech
    granite_speech_plus hunyuan_vl hy_v4_vl hyperclovax_vision_v2 idefics2 idefics3 inkling inkling2 inkling2_loop
    instructblip instructblipvideo internvl janus kimi_k25 lfm2_vl lfm3_vl lighton_ocr llama llama4 llava
    llava_next llava_next_video llava_onevision minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral mistral3
    mistral_large4 mllama molmo2 moss_transcribe_diarize muse_glimmer muse_spark omniasr opt ovis2 paddleocr_vl
    paligemma perception_lm phi4_multimodal pix2struct pixtral pp_chart2table pp_formulanet qianfan_ocr qwen2
    qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_asr qwen3_omni_moe qwen3_vl
    qwen3_vl_moe qwen4_exp shieldgemma2 siglip smolvlm step3p7 t5gemma2 udop vibevoice_asr video_llama_3
    video_llava vipllava vision_encoder_decoder voxtral
""".split()  # noqa: SIM905
FILES: dict[str, str] = {**_LIBRARY, **{f"models/{name}/modeling_{name}.py": _MODEL for name in _MODELS}}


def found(folder: Path) -> dict[str, str]:
    """Return what each symbol looks like in the source of transformers.

    folder: of the package, with `cache_utils.py` in it.
    """
    out = {}
    for file, pattern in FILES.items():
        path = folder / file
        if path.exists():
            wanted = re.compile(pattern)
            module = file.removesuffix(".py").replace("/", ".")
            named = _named(ast.parse(path.read_text(encoding="utf-8")).body)
            out.update({f"{module}.{name}": form for name, form in named if wanted.fullmatch(name)})
    return out


def _named(body: Sequence[ast.stmt], prefix: str = "") -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, f"class ({', '.join(ast.unparse(base) for base in node.bases)})"
            yield from _named(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name, _signature(node.args)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield prefix + (alias.asname or alias.name), f"from {'.' * node.level}{node.module or ''}"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = "" if node.value is None else re.sub(r"\s+", " ", ast.unparse(node.value))
            yield from ((prefix + one.id, f"= {value}") for one in targets if isinstance(one, ast.Name))


def _signature(given: ast.arguments) -> str:
    """Names and kinds of the parameters; `=` where there is a default. Types and defaults change without harm."""
    places = [*given.posonlyargs, *given.args]
    required = len(places) - len(given.defaults)
    parts = [one.arg + ("=" if n >= required else "") for n, one in enumerate(places)]
    if given.vararg:
        parts.append(f"*{given.vararg.arg}")
    elif given.kwonlyargs:
        parts.append("*")
    parts += [one.arg + ("=" if d else "") for one, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        parts.append(f"**{given.kwarg.arg}")
    return f"({', '.join(part for part in parts if part != 'self')})"


@dataclass
class Record:
    """What the symbols looked like on the releases that were tested.

    releases: ascending. symbols: by name, `{since: form}`, where `ABSENT` is a form too.
    """

    releases: list[str] = field(default_factory=list)
    symbols: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls) -> Record:
        """Read the record; an empty one where there is no file."""
        return cls(**json.loads(RECORD.read_text(encoding="utf-8"))) if RECORD.exists() else cls()

    def write(self) -> None:
        """Write it."""
        RECORD.write_text(json.dumps(vars(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def add(self, release: str, forms: Mapping[str, str]) -> None:
        """Add a release that is newer than those in it."""
        for name in {*self.symbols, *forms}:
            known = self.symbols.setdefault(name, {self.releases[0]: ABSENT} if self.releases else {})
            form = forms.get(name, ABSENT)
            if not known or list(known.values())[-1] != form:
                known[release] = form
        if release not in self.releases:
            self.releases.append(release)

    def moved(self, forms: Mapping[str, str]) -> list[Broken]:
        """Return each symbol that looks as on no release in it."""
        out = []
        for name in sorted({*self.symbols, *forms}):
            form, known = forms.get(name, ABSENT), list(self.symbols.get(name, {"": ABSENT}).values())
            if form not in known:
                out.append(Broken(name, known[-1], form))
        return out


def moved() -> list[Broken]:
    """Return what moved in the installed release; empty where it is as on those that were tested."""
    return Record.read().moved(found(_folder()))


def _folder() -> Path:
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("transformers is not installed here: pip install transformers")
    return Path(spec.submodule_search_locations[0])


def summary(broken: Sequence[Broken]) -> str:
    """Return what moved, equal changes together: what became of how many, then where."""
    groups: dict[str, list[Broken]] = defaultdict(list)
    for one in broken:
        groups[_change(one)].append(one)
    lines = []
    for change, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines += [f"{len(members)} {change}", *(f"    {one}" for one in members[:2])]
        if len(members) > 2:
            lines.append("    and " + ", ".join(".".join(one.what.split(".")[-2:]) for one in members[2:]))
    return "\n".join(lines)


def _change(one: Broken) -> str:
    if one.found == ABSENT:
        return "gone"
    if one.expected == ABSENT:
        return f"new: {one.found}"
    before, after = (re.findall(r"[*\w]+=?", form) for form in (one.expected, one.found))
    gone, new = (" ".join(w for w in a if w not in b) for a, b in ((before, after), (after, before)))
    return f"changed; was: {gone or 'less'}; is: {new or 'less'}" if gone or new else "changed: another order"


def main(arguments: Sequence[str] | None = None) -> int:
    """Say what moved in the installed release, and return the exit status."""
    parser = argparse.ArgumentParser(prog="mllm_squeeze.upstream.symbols", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record", action="store_true", help="add the installed release to symbols.json")
    release, record, forms = version("transformers"), Record.read(), found(_folder())
    if parser.parse_args(arguments).record:
        record.add(release, forms)
        record.write()
    broken = record.moved(forms)
    tested = ", ".join(record.releases)
    if not broken:
        print(f"transformers {release}: none of {len(forms)} symbols moved. Tested: {tested}.")
        return 0
    print(f"transformers {release}: {len(broken)} of {len(forms)} symbols MOVED. Tested: {tested}.\n{summary(broken)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
