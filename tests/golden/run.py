"""Compare methods with what their authors' own code did: python tests/golden/run.py FILE...

Each FILE is tests/golden/<method>.npz or one of the same form: arrays c0_..., c1_... of one case each. A line per case:
`fastv c0 ok`, `mob c2 differs: ...` or `x c0 missing: no such method`. Exits 1 unless all are ok.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from golden.case import Case, cases
from golden.differences import DIFFERENCES
from golden.readings import load_all

# Of float32 arithmetic in another order.
TOLERANCE = 1e-4


def verdicts(path: Path) -> Iterator[tuple[str, str]]:
    """Return (case, verdict) of each case of a file; the verdict is "ok" or says what is wrong."""
    key = path.stem
    reading = load_all().get(key)
    difference = DIFFERENCES.get(key)
    for number, case in cases(path):
        if reading is None:
            yield number, "missing: no such method"
            continue
        try:
            found = reading(case)
            expected = case if difference is None else difference.expected(case)
            wrong = list(compared(found, expected))
        # Whatever a method raises on a case is a difference of that case; the other cases still run.
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        yield number, "ok" if not wrong else f"differs: {'; '.join(wrong)}"


def compared(found: dict[str, Any], expected: Case) -> Iterator[str]:
    """Return what differs, by name."""
    for name, value in found.items():
        got, wanted = torch.as_tensor(value), torch.as_tensor(expected[name])
        if got.shape != wanted.shape:
            yield f"{name} has shape {list(got.shape)}, expected {list(wanted.shape)}"
        elif wanted.is_floating_point():
            error = float((got.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
            scale = max(1.0, float(wanted.double().abs().max())) if wanted.numel() else 1.0
            if not error <= TOLERANCE * scale:
                yield f"{name} is off by {error:.1e}"
        elif not torch.equal(got.to(wanted.dtype), wanted):
            yield f"{name} differs in {int((got != wanted).sum())} of {wanted.numel()}"


def main(files: Sequence[str]) -> int:
    """Print a line per case; return 0 where all are ok."""
    if not files:
        print("give at least one .npz file of golden cases")
        return 1
    ok = True
    for file in files:
        for number, verdict in verdicts(Path(file)):
            print(Path(file).stem, number, verdict)
            ok &= verdict == "ok"
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
