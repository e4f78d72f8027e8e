"""One short row per HuggingFace `model_type`: only what looking at the model cannot tell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

TowerToLlm = Literal[
    "identity",
    "anyres",
    "block_merge",
    "merge_sizes",
    "pool",
    "cells",
    "packed_rows",
    "positions",
    "index",
    "sub_images",
    "queries",
    "overlap",
    "no_encoder",
    "none",
]
Encoded = Literal["", "all", "placeholders", "behind"]
Grid = Literal["square", "thw", "anyres", "rows", "unknown"]


@dataclass(frozen=True)
class FamilyRow:
    """What a family does between its pixels and its text model.

    model_type: `config.model_type`.
    modalities: what it takes.
    grid: rule that gives the rectangle of each span.
    tower_to_llm: how tower tokens become LLM tokens, so that a tower score can travel the same way; the module of that
        name says what each word means, and why nothing travels by some ("queries", "overlap", "no_encoder"; "none":
        nobody has looked, and it is found by experiment).
    tower: "batched" (tiles, N, D), or "packed" (sum, D).
    cls: the tower may have a CLS token, in front of the patches, or behind them where cls_last.
    late: what the feature method gives is projected behind it.
    grouped: modalities whose feature items, where no text stands between them, are tiles of one picture or frames of
        one video.
    per_token: the projector maps one tower token to one LLM token.
    saliency: config name of the list of full-attention tower blocks, "" for the second to last block.
    shared_id: videos carry the image's placeholder id.
    id_paths: config path of the placeholder id per modality, where it is not at the top.
    own_generate: generate() does not pass through the inner model.
    by_runs: the feature method does not tell what is an item; each run of placeholders is one.
    stacked: layers pass several streams of hidden states, so that norms and projections cannot be previewed.
    encoded: where pictures are among what an encoder gives for a decoder to attend to: "all" of it, at the
        "placeholders" of the prompt, "behind" the prompt; "" where the text model itself reads the prompt.
    verified: False for a family nobody has tried, which must prove itself on its first call.
    note: what a user should know.
    """

    model_type: str
    modalities: tuple[str, ...] = ("image",)
    grid: Grid = "square"
    tower_to_llm: TowerToLlm = "none"
    tower: Literal["batched", "packed"] = "batched"
    cls: bool = False
    cls_last: bool = False
    late: bool = False
    grouped: tuple[str, ...] = ()
    per_token: bool = False
    saliency: str = ""
    shared_id: bool = False
    id_paths: tuple[tuple[str, str], ...] = ()
    own_generate: bool = False
    by_runs: bool = False
    stacked: bool = False
    encoded: Encoded = ""
    verified: bool = True
    note: str = ""


_BOTH = ("image", "video")
_OMNI = ("image", "video", "audio")
_QWEN = FamilyRow("qwen2_vl", _BOTH, grid="thw", tower_to_llm="block_merge", tower="packed")
_WINDOWED = replace(_QWEN, saliency="fullatt_block_indexes")
_GLM = replace(_QWEN, shared_id=True)
_LLAVA = FamilyRow("llava", tower_to_llm="identity", cls=True, per_token=True)
_ANYRES = replace(_LLAVA, grid="anyres", tower_to_llm="anyres")
_POOLED = FamilyRow("gemma3", tower_to_llm="pool")
_AUDIO = FamilyRow("qwen2_audio", ("audio",), grid="unknown")
_HYBRID_NOTE = "Layers without attention cannot be read: cut behind a full-attention layer (layer - 1 must be one)."
_SHARED_NOTE = "Survivors keep their positions, whatever the recipe says: the last layers borrow the keys of others."
_PAGES_NOTE = "All tiles of all pictures of a prompt are one span."
_QUERIES_NOTE = "The LLM sees a few query tokens only; the encoder and Q-Former cost stays."
_QFORMER_NOTE = (
    "The LLM sees a few query tokens only, which steps at the projector and behind it cut. A recipe whose steps act at "
    "`keys` reduces the image features that the Q-Former attends to."
)
_KEYS_NOTE = (
    "Pictures are keys of cross-attention layers, one span each. Steps in front of the LLM that read nothing of it "
    "reduce them; the text keeps its length."
)

_ENCODED_NOTE = (
    "What the encoder gives for pictures is what the decoder attends to. Steps in front of the LLM that look at "
    "features alone reduce it, and with it the cache of the cross-attention; words stay."
)
_ENCODED = FamilyRow("vision-encoder-decoder", grid="unknown", encoded="all", note=_ENCODED_NOTE)

_PICKED_NOTE = "Served where layers attend to all keys or to those near by; layers that pick their keys are refused."
# Whatever their config says, some of their layers cannot be cut exactly; `upstream/layer_kinds.py` says why.
UNCUTTABLE = (
    "diffusion_gemma",
    "glm5_next",
    "hy_v4_vl",
    "inkling2",
    "inkling2_loop",
    "inkling_mm_model",
    "mistral_large4",
    "qwen4_exp",
)

_ROWS = (
    _LLAVA,
    FamilyRow("llava+pixtral", grid="rows", tower_to_llm="packed_rows", tower="packed", per_token=True),
    replace(_LLAVA, model_type="vipllava"),
    FamilyRow("video_llava", _BOTH, tower_to_llm="identity", cls=True, grouped=("video",)),
    replace(_ANYRES, model_type="llava_next"),
    replace(_ANYRES, model_type="llava_next_video", modalities=_BOTH),
    replace(_ANYRES, model_type="llava_onevision", modalities=_BOTH, cls=False),
    FamilyRow("granite4_vision", grid="unknown", tower_to_llm="anyres", cls=True),
    _QWEN,
    replace(_WINDOWED, model_type="qwen2_5_vl"),
    replace(_QWEN, model_type="qwen3_vl"),
    replace(_QWEN, model_type="qwen3_vl_moe"),
    replace(_QWEN, model_type="qwen3_5", note=_HYBRID_NOTE),
    replace(_QWEN, model_type="qwen3_5_moe", note=_HYBRID_NOTE),
    replace(_WINDOWED, model_type="qwen2_5_omni_thinker", modalities=_OMNI),
    replace(_QWEN, model_type="qwen3_omni_moe_thinker", modalities=_OMNI),
    replace(_GLM, model_type="glm4v"),
    replace(_GLM, model_type="glm4v_moe"),
    replace(_GLM, model_type="glm46v"),
    replace(_GLM, model_type="glmga"),
    replace(_WINDOWED, model_type="exaone4_5"),
    replace(_WINDOWED, model_type="hyperclovax_vision_v2"),
    replace(_QWEN, model_type="cohere_compass"),
    replace(_QWEN, model_type="lfm3_vl", note=_HYBRID_NOTE),
    replace(_QWEN, model_type="ernie4_5_vl_moe"),
    replace(_QWEN, model_type="cosmos3_omni"),
    replace(_QWEN, model_type="cosmos3_edge"),
    FamilyRow("hunyuan_vl", grid="unknown", tower="packed"),
    FamilyRow("muse_glimmer", _BOTH, grid="unknown", tower="packed"),
    FamilyRow("muse_spark", _OMNI, grid="unknown", tower="packed"),
    FamilyRow("step3p7", grid="unknown", tower_to_llm="overlap"),
    FamilyRow("apertus1p5", ("image", "audio"), grid="unknown", tower_to_llm="overlap"),
    replace(_QWEN, model_type="minimax_m3_vl", note=_PICKED_NOTE),
    replace(_QWEN, model_type="dots3_note", modalities=_OMNI, note=_PICKED_NOTE),
    *(FamilyRow(name, verified=False) for name in UNCUTTABLE),
    FamilyRow("kimi_k25", _BOTH, grid="thw", tower_to_llm="cells", tower="packed"),
    FamilyRow("internvl", tower_to_llm="pool", cls=True, grouped=("image",)),
    _POOLED,
    FamilyRow("gemma3n", ("image", "audio"), stacked=True, note=_SHARED_NOTE),
    FamilyRow("gemma4", _OMNI, grid="unknown", tower_to_llm="positions", note=_SHARED_NOTE),
    FamilyRow("gemma4_unified", _OMNI, grid="unknown", tower_to_llm="no_encoder"),
    FamilyRow("paligemma", tower_to_llm="identity", per_token=True),
    FamilyRow("idefics2", grid="unknown", tower_to_llm="queries", note=_QUERIES_NOTE),
    FamilyRow("idefics3", grid="unknown", tower_to_llm="pool"),
    FamilyRow("smolvlm", grid="unknown", tower_to_llm="pool"),
    FamilyRow("mistral3", grid="rows", tower_to_llm="packed_rows", tower="packed"),
    FamilyRow("lighton_ocr", grid="rows", tower_to_llm="packed_rows", tower="packed"),
    replace(_POOLED, model_type="aya_vision"),
    replace(_POOLED, model_type="cohere2_vision", grouped=("image",)),
    FamilyRow("molmo2", _BOTH, grid="unknown", tower_to_llm="index", shared_id=True),
    FamilyRow("minicpmv4_6", _BOTH, grid="unknown", tower_to_llm="cells", tower="packed", note=_HYBRID_NOTE),
    FamilyRow("minicpmv4_7", _BOTH, grid="unknown", tower_to_llm="cells", tower="packed", note=_HYBRID_NOTE),
    replace(_POOLED, model_type="ovis2"),
    FamilyRow("deepseek_vl", tower_to_llm="identity", per_token=True),
    FamilyRow("deepseek_vl_hybrid", tower_to_llm="identity"),
    FamilyRow(
        "phi4_multimodal",
        ("image", "audio"),
        grid="unknown",
        tower_to_llm="sub_images",
        id_paths=(("image", "vision_config.image_token_id"), ("audio", "audio_config.audio_token_id")),
    ),
    FamilyRow("llama4", tower_to_llm="pool", cls=True, cls_last=True, late=True, grouped=("image",)),
    FamilyRow("mllama", note=_KEYS_NOTE),
    FamilyRow("perception_lm", _BOTH, grid="unknown", by_runs=True),
    FamilyRow("fast_vlm"),
    FamilyRow("video_llama_3", _BOTH, grid="thw", tower_to_llm="merge_sizes", tower="packed"),
    FamilyRow("lfm2_vl", grid="unknown", tower_to_llm="cells", note=_HYBRID_NOTE),
    FamilyRow("blip-2", grid="unknown", tower_to_llm="queries", own_generate=True, note=_QFORMER_NOTE),
    FamilyRow("instructblip", grid="unknown", tower_to_llm="queries", own_generate=True, note=_QFORMER_NOTE),
    _AUDIO,
    replace(_AUDIO, model_type="voxtral"),
    replace(_AUDIO, model_type="audioflamingo3"),
    replace(_AUDIO, model_type="granite_speech"),
    FamilyRow("aria", grid="unknown", tower_to_llm="queries", note=_QUERIES_NOTE),
    FamilyRow("chameleon", grid="unknown", tower_to_llm="overlap", by_runs=True),
    FamilyRow("deepseek_ocr2", grid="unknown", tower_to_llm="queries"),
    FamilyRow("emu3", grid="unknown", tower_to_llm="overlap"),
    replace(_AUDIO, model_type="fun_asr_nano"),
    FamilyRow("fuyu", grid="unknown", tower_to_llm="no_encoder", late=True),
    FamilyRow("got_ocr2", tower_to_llm="overlap"),
    replace(_GLM, model_type="glm_ocr"),
    replace(_AUDIO, model_type="glmasr"),
    FamilyRow("granite_docling", grid="unknown", tower_to_llm="pool", note=_PAGES_NOTE),
    replace(_AUDIO, model_type="granite_speech_plus"),
    FamilyRow(
        "instructblipvideo",
        ("video",),
        grid="unknown",
        tower_to_llm="queries",
        own_generate=True,
        note=_QFORMER_NOTE,
    ),
    FamilyRow("janus", tower_to_llm="identity", per_token=True),
    FamilyRow("minicpm_ocr", _BOTH, grid="unknown", tower_to_llm="cells", tower="packed", note=_HYBRID_NOTE),
    replace(_AUDIO, model_type="moss_transcribe_diarize"),
    replace(_AUDIO, model_type="omniasr"),
    FamilyRow("paddleocr_vl", grid="thw", tower_to_llm="cells", tower="packed"),
    FamilyRow("pp_chart2table", tower_to_llm="overlap"),
    FamilyRow("qianfan_ocr", tower_to_llm="pool", cls=True, grouped=("image",)),
    replace(_AUDIO, model_type="qwen3_asr"),
    replace(_POOLED, model_type="shieldgemma2"),
    replace(_AUDIO, model_type="vibevoice_asr"),
    _ENCODED,
    replace(_ENCODED, model_type="pix2struct"),
    replace(_ENCODED, model_type="pp_formulanet"),
    replace(_ENCODED, model_type="florence2", encoded="placeholders"),
    replace(_ENCODED, model_type="t5gemma2", encoded="placeholders"),
    replace(_ENCODED, model_type="udop", encoded="behind"),
)

TABLE: dict[str, FamilyRow] = {row.model_type: row for row in _ROWS}
