"""One golden case: inputs, and what the authors' own code made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Case(Mapping[str, Any]):
    """The arrays of one case by their names, without the number of the case in front.

    Numbers and booleans are those of Python, words are strings, all else are tensors.
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.arrays = dict(arrays)

    def __getitem__(self, name: str) -> Any:
        value = self.arrays[name]
        if isinstance(value, torch.Tensor):
            return value
        if value.ndim == 0:
            return value.item()
        return [str(word) for word in value] if value.dtype.kind in "US" else torch.from_numpy(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def with_expected(self, **arrays: torch.Tensor) -> Case:
        """Return the case with other expectations."""
        return Case({**self.arrays, **arrays})


def cases(path: Path) -> Iterator[tuple[str, Case]]:
    """Return the cases of a file, ("c0", ...), in order."""
    with np.load(path, allow_pickle=False) as stored:
        names = [name for name in stored.files if re.match(r"c\d+_", name)]
        numbers = sorted({int(name[1:].split("_", 1)[0]) for name in names})
        for number in numbers:
            prefix = f"c{number}_"
            yield (
                f"c{number}",
                Case({name.removeprefix(prefix): stored[name] for name in names if name.startswith(prefix)}),
            )
