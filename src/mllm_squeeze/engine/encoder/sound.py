"""One call of the feature method for sound: what is read of its encoder's last block meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mllm_squeeze import ops
from mllm_squeeze.engine.encoder.seen_way import mean_of_makers
from mllm_squeeze.engine.signals.rows import AttentionCall
from mllm_squeeze.engine.timing import marked
from mllm_squeeze.errors import UnsupportedModelError


class SoundCall:
    """Collects the queries and keys of a block: of all the sound at once, or window by window."""

    def __init__(self) -> None:
        self._calls: list[AttentionCall] = []

    def read(self, call: AttentionCall) -> bool:
        """Read one attention call.

        Raises:
            UnsupportedModelError: recordings are padded into rows, or scores are not those of queries and keys alone.
        """
        call.require_plain_scores()
        if call.query.shape[0] != 1 or call.mask is not None:
            raise UnsupportedModelError(
                "The audio encoder of this model pads recordings to one length; what it attends to can be read only "
                "where they stand one after the other. Use a method that reads nothing of the audio encoder."
            )
        self._calls.append(call)
        return False

    @property
    def tokens(self) -> int:
        """How many tokens of the encoder were read."""
        return sum(call.query.shape[2] for call in self._calls)

    @marked("signal")
    @torch.no_grad()
    def received(self, made: Tensor, per_prompt: Sequence[int]) -> Tensor:
        """Return float32 (tokens,), what the LLM's tokens receive, mean over heads and the queries of their prompt.

        made: int64 (P,), the LLM token that each token of the encoder makes, -1 for none. per_prompt: LLM tokens of
        each prompt, in order.
        """
        query, key = (torch.cat([getattr(call, name) for call in self._calls], 2) for name in ("query", "key"))
        numbers = torch.tensor(per_prompt)
        owner = torch.arange(len(numbers)).repeat_interleave(numbers).to(made.device)[made.clamp(min=0)]
        # What makes no token belongs to the prompt of what stands before it.
        owner = torch.where(made < 0, 0, owner).cummax(0).values
        values = torch.zeros(len(made), device=made.device)
        for prompt in [prompt for prompt, number in enumerate(per_prompt) if number]:
            index = (owner == prompt).nonzero().flatten()
            scores = ops.attention_received(
                query[:, :, index], key[:, :, index], None, scaling=self._calls[0].logit_scale
            )
            values[index] = scores[0] / (query.shape[1] * len(index))
        return mean_of_makers(values[:, None], made, sum(per_prompt), 0.0)[:, 0]
