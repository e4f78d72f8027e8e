"""Where the reducers and parts are that ship, by name."""

from __future__ import annotations

from collections.abc import Mapping

BUILTIN_REDUCERS: Mapping[str, str] = {
    "pipeline": "mllm_squeeze.reducers.pipeline:Pipeline",
    "text_rank_recycle": "mllm_squeeze.reducers.text_rank_recycle:TextRankRecycle",
    "temporal_windows": "mllm_squeeze.reducers.temporal_windows:TemporalWindows",
    "decode_refresh": "mllm_squeeze.reducers.decode_refresh:DecodeRefresh",
}

# By kind. The entry points of other packages, and `register_part`, name a part "kind.name", like "score.attention".
BUILTIN_PARTS: Mapping[str, str] = {
    "score.attention": "mllm_squeeze.parts.score.attention:Attention",
    "score.encoder_attention": "mllm_squeeze.parts.score.encoder_attention:EncoderAttention",
    "score.priority_attention": "mllm_squeeze.parts.score.priority_attention:PriorityAttention",
    "score.undivided_attention": "mllm_squeeze.parts.score.undivided_attention:UndividedAttention",
    "score.norm": "mllm_squeeze.parts.score.norm:Norm",
    "score.random": "mllm_squeeze.parts.score.random:Random",
    "score.text_similarity": "mllm_squeeze.parts.score.text_similarity:TextSimilarity",
    "score.uniqueness": "mllm_squeeze.parts.score.uniqueness:Uniqueness",
    "score.size": "mllm_squeeze.parts.score.size:Size",
    "score.isolation": "mllm_squeeze.parts.score.isolation:Isolation",
    "score.fused": "mllm_squeeze.parts.score.fused:Fused",
    "score.change": "mllm_squeeze.parts.score.change:Change",
    "score.prior_contrast": "mllm_squeeze.parts.score.prior_contrast:PriorContrast",
    "score.spectrum": "mllm_squeeze.parts.score.spectrum:Spectrum",
    "segment.whole": "mllm_squeeze.parts.segment.whole:Whole",
    "segment.crop": "mllm_squeeze.parts.segment.crop:Crop",
    "segment.tile": "mllm_squeeze.parts.segment.tile:Tile",
    "segment.frame": "mllm_squeeze.parts.segment.frame:Frame",
    "segment.window": "mllm_squeeze.parts.segment.window:Window",
    "segment.grid_window": "mllm_squeeze.parts.segment.grid_window:GridWindow",
    "segment.stillness": "mllm_squeeze.parts.segment.stillness:Stillness",
    "budget.even": "mllm_squeeze.parts.budget.even:Even",
    "budget.outliers": "mllm_squeeze.parts.budget.outliers:Outliers",
    "budget.softmax": "mllm_squeeze.parts.budget.softmax:Softmax",
    "budget.fixed": "mllm_squeeze.parts.budget.fixed:Fixed",
    "budget.mass": "mllm_squeeze.parts.budget.mass:Mass",
    "select.top_k": "mllm_squeeze.parts.select.top_k:TopK",
    "select.top_and_stride": "mllm_squeeze.parts.select.top_and_stride:TopAndStride",
    "select.in_turn": "mllm_squeeze.parts.select.in_turn:InTurn",
    "select.stride": "mllm_squeeze.parts.select.stride:Stride",
    "select.even_sample": "mllm_squeeze.parts.select.even_sample:EvenSample",
    "select.farthest_point": "mllm_squeeze.parts.select.farthest_point:FarthestPoint",
    "select.dpp": "mllm_squeeze.parts.select.dpp:Dpp",
    "select.log_det": "mllm_squeeze.parts.select.log_det:LogDet",
    "select.facility_location": "mllm_squeeze.parts.select.facility_location:FacilityLocation",
    "select.drop_alike": "mllm_squeeze.parts.select.drop_alike:DropAlike",
    "select.density_peaks": "mllm_squeeze.parts.select.density_peaks:DensityPeaks",
    "select.pivots": "mllm_squeeze.parts.select.pivots:Pivots",
    "select.threshold": "mllm_squeeze.parts.select.threshold:Threshold",
    "merge.nearest": "mllm_squeeze.parts.merge.nearest:Nearest",
    "merge.neighbours": "mllm_squeeze.parts.merge.neighbours:Neighbours",
    "merge.cluster": "mllm_squeeze.parts.merge.cluster:Cluster",
    "merge.fused_token": "mllm_squeeze.parts.merge.fused_token:FusedToken",
    "merge.bipartite": "mllm_squeeze.parts.merge.bipartite:Bipartite",
    "merge.pool": "mllm_squeeze.parts.merge.pool:Pool",
    "merge.into_best": "mllm_squeeze.parts.merge.into_best:IntoBest",
}
