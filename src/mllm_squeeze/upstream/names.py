"""Names of the arguments that carry one role each, in every release that is supported."""

from __future__ import annotations

# 5.24 renamed the second to the first; inner modules get whichever their caller chose.
CACHE_NAMES = ("cache", "past_key_values")
HIDDEN, MASK, POSITIONS, ROPE = "hidden_states", "attention_mask", "position_ids", "position_embeddings"
# Which experts each token goes to, int (B, T): layers with experts for pictures alone are told so.
ROUTING = "moe_mm_token_type_ids"
EMBEDDINGS, IDS, USE_CACHE = "inputs_embeds", "input_ids", "use_cache"
ENCODED, ENCODED_MASK = "encoder_hidden_states", "encoder_attention_mask"
