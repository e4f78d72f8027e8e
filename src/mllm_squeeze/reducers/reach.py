"""What a rule says where it cannot come down to its budget."""

from __future__ import annotations

import warnings

from mllm_squeeze.errors import SqueezeWarning


def warn_out_of_reach(rule: str, asked: int, least: int, there: int) -> None:
    """Warn where a span keeps more than was asked, whatever it shows.

    rule: the sentence that says why. asked: the budget. least: the fewest tokens that the rule leaves. there: tokens
    before the cut.
    """
    if asked < least:
        warnings.warn(
            f"{rule}, so {least} of {there} tokens stay, not {asked} as asked. Ask for less, give more frames, or use "
            "a method that keeps any number.",
            SqueezeWarning,
            stacklevel=3,
        )
