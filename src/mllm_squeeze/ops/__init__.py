"""Pure batched tensor functions: score, select, merge, segment, budget; no knowledge of models.

Names are looked up on first use, so importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adjacent import *  # noqa: F403
    from .aligned import *  # noqa: F403
    from .alike_groups import *  # noqa: F403
    from .attention import *  # noqa: F403
    from .attention_share import *  # noqa: F403
    from .bipartite_rounds import *  # noqa: F403
    from .block_shares import *  # noqa: F403
    from .bounded_peaks import *  # noqa: F403
    from .budget import *  # noqa: F403
    from .calibrated_spread import *  # noqa: F403
    from .components import *  # noqa: F403
    from .correlated import *  # noqa: F403
    from .dealt_out import *  # noqa: F403
    from .dynamic_segments import *  # noqa: F403
    from .elbow import *  # noqa: F403
    from .events import *  # noqa: F403
    from .frame_trees import *  # noqa: F403
    from .global_query import *  # noqa: F403
    from .gravity import *  # noqa: F403
    from .greedy import *  # noqa: F403
    from .grid_neighbours import *  # noqa: F403
    from .information import *  # noqa: F403
    from .label_runs import *  # noqa: F403
    from .like_before import *  # noqa: F403
    from .linked_pairs import *  # noqa: F403
    from .local_affinity import *  # noqa: F403
    from .local_outliers import *  # noqa: F403
    from .lone_peaks import *  # noqa: F403
    from .marginal_relevance import *  # noqa: F403
    from .merge import *  # noqa: F403
    from .neighbours import *  # noqa: F403
    from .neurons import *  # noqa: F403
    from .normalise import *  # noqa: F403
    from .other_places import *  # noqa: F403
    from .outliers import *  # noqa: F403
    from .overview import *  # noqa: F403
    from .page_rank import *  # noqa: F403
    from .pivots import *  # noqa: F403
    from .pool import *  # noqa: F403
    from .precision import *  # noqa: F403
    from .principal_groups import *  # noqa: F403
    from .prompt_cover import *  # noqa: F403
    from .pushes import *  # noqa: F403
    from .quadtree import *  # noqa: F403
    from .query_key import *  # noqa: F403
    from .resample import *  # noqa: F403
    from .rounds import *  # noqa: F403
    from .rows import *  # noqa: F403
    from .score import *  # noqa: F403
    from .segment import *  # noqa: F403
    from .select import *  # noqa: F403
    from .share import *  # noqa: F403
    from .similarity import *  # noqa: F403
    from .softmax_shares import *  # noqa: F403
    from .spread_on_grid import *  # noqa: F403
    from .still_segments import *  # noqa: F403
    from .stride import *  # noqa: F403
    from .surroundings import *  # noqa: F403
    from .through_text import *  # noqa: F403
    from .transition import *  # noqa: F403
    from .transport import *  # noqa: F403
    from .undivided import *  # noqa: F403
    from .unlike_frames import *  # noqa: F403
    from .value_likeness import *  # noqa: F403
    from .words import *  # noqa: F403

_MODULES = {
    "attention": (
        "attention_band",
        "attention_from_rows",
        "attention_joined",
        "attention_received",
        "attention_to_itself",
        "blocks_of_attention",
        "rows_that_see",
    ),
    "budget": (
        "floor_exact",
        "kept_count",
        "recycle_sizes",
        "recycle_split",
        "share_counts",
        "spread",
        "stage_counts",
        "stage_fractions",
    ),
    "adjacent": ("adjacent_sites", "every_other_site", "joined_runs", "sites_above"),
    "alike_groups": ("group_likeness", "without_the_alike"),
    "attention_share": ("attention_share",),
    "bipartite_rounds": ("bipartite_rounds",),
    "block_shares": ("block_shares",),
    "bounded_peaks": ("bounded_peaks",),
    "global_query": ("global_query_attention",),
    "aligned": ("moved_before",),
    "calibrated_spread": ("calibrated_spread",),
    "components": ("components_in_turn", "linked_components", "remerged"),
    "correlated": ("correlation", "entries_to_correlated", "head_mean_logits", "open_attention", "redundancy"),
    "dealt_out": ("dealt_out",),
    "dynamic_segments": ("alike_runs", "anchors_per_frame"),
    "events": ("best_groups", "event_runs", "one_each"),
    "elbow": ("above_elbow",),
    "frame_trees": ("hung_on_frame_before", "tree_weights"),
    "gravity": ("freed_attention", "priority_heads", "rotary_gravity"),
    "greedy": (
        "dpp_map",
        "facility_location",
        "farthest_point",
        "least_alike_in_turns",
        "log_det",
        "picks_from",
    ),
    "grid_neighbours": ("beside_on_grid",),
    "information": ("beyond_prior", "spectral_weight"),
    "merge": (
        "added_mean_weights",
        "bipartite_match",
        "closest_survivor",
        "density_peaks",
        "is_target",
        "mean_weights",
        "merge_tokens",
        "merged_into_best",
        "merged_size",
        "mix_tokens",
        "mixed_size",
        "nearest_target",
        "running_mean_weights",
        "strongest_target",
    ),
    "marginal_relevance": ("marginal_relevance",),
    "neighbours": ("group_sum_entries", "neighbour_entries", "unchanged_entries"),
    "neurons": ("shared_with_core", "shared_with_word"),
    "lone_peaks": ("lone_peaks",),
    "normalise": ("fused", "normalised", "steadied"),
    "like_before": ("joined_to_before", "likeness_before"),
    "linked_pairs": ("linked_first",),
    "local_affinity": ("local_affinity",),
    "through_text": ("entries_through_text",),
    "local_outliers": ("local_outlier_factors",),
    "outliers": ("group_quantiles", "outlier_counts"),
    "other_places": ("other_places",),
    "overview": ("crop_shown", "overview_split"),
    "page_rank": ("page_rank",),
    "pivots": ("pivots_and_dissimilar",),
    "pool": ("pooled_plan", "pooled_table", "pooled_windows"),
    "precision": (
        "at_least_float32",
        "on_device",
        "selection",
    ),
    "principal_groups": ("group_quotas", "picked_of_parts", "principal_parts", "unlike_first"),
    "prompt_cover": ("cover_of_both", "farthest_from", "nearest_to_words"),
    "pushes": ("push_response",),
    "quadtree": ("QuadtreeLevel", "quadtree_levels", "quadtree_sides", "quadtree_squares"),
    "query_key": ("query_key_products", "weighted_heads"),
    "resample": ("resampled_cells", "resampling"),
    "rounds": ("drop_alike_in_rounds",),
    "rows": ("group_rows",),
    "score": (
        "cosine",
        "gaussian_kernels",
        "in_grains",
        "likeness",
        "own_variance",
        "paired_cosine",
        "text_relevance",
        "unit",
    ),
    "segment": (
        "frame_ids",
        "same_place",
        "segment_count",
        "segment_first",
        "segment_max",
        "segment_mean",
        "segment_sum",
    ),
    "select": (
        "best_first",
        "compact_indices",
        "gather_together",
        "local_index",
        "positions",
        "put_back",
        "rank_within",
        "ranks",
        "scaled_bar",
        "seeded_noise",
        "take",
        "top_k_mask",
    ),
    "share": ("fewest_with_mass", "share_of", "share_of_count", "share_out", "untypical_share"),
    "similarity": (
        "closeness",
        "nearest_in_group",
        "nearest_similarity",
        "quiet_channels",
        "relevant_words",
        "text_similarity",
    ),
    "softmax_shares": ("softmax_shares",),
    "spread_on_grid": ("spread_cells",),
    "still_segments": ("cluster_weights", "most_still", "still_counts"),
    "stride": (
        "grid_pattern",
        "grid_size",
        "pooled_size",
        "stride_mask",
        "whole_stride_mask",
    ),
    "surroundings": ("surrounding_entries",),
    "transition": ("transition",),
    "transport": ("transport_cost", "transported_mass"),
    "undivided": ("undivided_attention",),
    "unlike_frames": ("frames_unlike_window", "unlike_first_frame", "without_tails"),
    "value_likeness": ("value_likeness",),
    "label_runs": ("run_bounds", "whole_runs"),
    "words": ("guided_by_words", "with_vectors"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOME)
