"""The release of transformers that is installed, and those that this library was proved on."""

from __future__ import annotations

import os
from pathlib import Path

import transformers

# Moved when the whole test suite is green on a release; on any other one a canary runs before a model is trusted.
TESTED = ("5.16.0", "5.17.0", "5.23.0", "5.24.0")
# "warn" goes on where an expectation does not hold, at the user's own risk.
SWITCH = "MLLM_SQUEEZE_UPSTREAM"


def installed() -> str:
    """Return the release that is installed."""
    return str(transformers.__version__)


def library_folder() -> str:
    """Return where the code of transformers is."""
    return str(Path(transformers.__file__).parent)


def is_tested() -> bool:
    """True on a release on which the whole test suite was run."""
    return installed() in TESTED


def only_warns() -> bool:
    """True where the user chose to go on when transformers is not as expected."""
    return os.environ.get(SWITCH) == "warn"


def how_to_go_on() -> str:
    """Return the sentence that says what a user can do on a release that does not fit."""
    return (
        f"transformers {installed()} is installed; tested are {', '.join(TESTED)}. Install one of those (as "
        f"constraints.txt of the checkout does), or a newer mllm-squeeze; {SWITCH}=warn goes on at your own risk."
    )
