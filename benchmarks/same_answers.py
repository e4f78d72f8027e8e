"""Whether two checkouts of this repository give the same answers, bit for bit: before and after a change of its parts.

python benchmarks/same_answers.py ONE OTHER [--families llava qwen2_vl ...] [--methods fastv ...] [--out FOLDER]

Each checkout runs in processes of its own, on its own tiny models (`tests/tiny`): every method that ONE ships, on every
family, on one picture and on one video, at its defaults. What is compared are the positions that are kept after each
cut and the logits of the prompt. One line per cell:

same         equal to the last bit
refused      both refuse, or warn that nothing was cut, in the same kind of error
DIFFERENT    with what differs first

The command fails where a cell differs. What a clean checkout answered stays in the folder `--out`, by its commit, so a
second run goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

KINDS = ("image", "video")
# Methods as they are in so small a model: at their defaults some keep a single token of a picture, and differ little.
RATIO = 0.6


def answers(family: str, methods: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what the checkout on the path answers, by method and kind of prompt."""
    import mllm_squeeze as squeeze
    import tiny

    made = tiny.load(family)
    out = {}
    for method in methods:
        for kind in KINDS:
            if kind in made.inputs:
                out[method, kind] = _answer(squeeze, made.model, made.inputs[kind], method)
    return out


@torch.no_grad()
def _answer(squeeze: Any, model: Any, inputs: dict[str, Any], method: str) -> dict[str, Any]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with squeeze.applied(model, method, ratio=RATIO) as handle:
                logits = model(**inputs).logits
                cuts = handle.cuts or ()
                return {"kept": [[row.cpu() for row in cut.kept] for cut in cuts], "logits": logits.cpu()}
        except squeeze.SqueezeError as error:
            return {"refused": type(error).__name__, "text": str(error)}


def difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Return what differs first between two answers, None where they are the same."""
    if "refused" in one or "refused" in other:
        names = [answer.get("refused", "an answer") for answer in (one, other)]
        return None if names[0] == names[1] else f"{names[0]} against {names[1]} ({one.get('text') or other['text']})"
    if len(one["kept"]) != len(other["kept"]):
        return f"{len(one['kept'])} cuts against {len(other['kept'])}"
    for number, (rows, others) in enumerate(zip(one["kept"], other["kept"], strict=True)):
        for row, row_of_other in zip(rows, others, strict=True):
            if not torch.equal(row, row_of_other):
                return f"cut {number} keeps {row.tolist()} against {row_of_other.tolist()}"
    if one["logits"].shape != other["logits"].shape:
        return f"logits {tuple(one['logits'].shape)} against {tuple(other['logits'].shape)}"
    if not torch.equal(one["logits"].nan_to_num(), other["logits"].nan_to_num()):
        return f"logits by {float((one['logits'] - other['logits']).abs().max()):.2e}"
    return None


def _command(checkout: Path, *arguments: str) -> str:
    """Run this file in a process that imports from a checkout; returns what it prints."""
    path = os.pathsep.join(str(checkout / folder) for folder in ("src", "tests"))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    return subprocess.run(command, env=environment, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True).stdout


def _state(checkout: Path) -> str | None:
    """Return the commit of a checkout, None where files of it are changed."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(checkout), *words], check=True, capture_output=True, text=True).stdout

    dirty = git("status", "--porcelain", "--untracked-files=no", "src", "tests/tiny", "configs").strip()
    return None if dirty else git("rev-parse", "HEAD").strip()


def _load(checkout: Path, families: list[str], methods: list[str], out: Path) -> dict[str, Any]:
    """Return the answers of a checkout by family, those of before where they are in the folder."""
    state = _state(checkout)
    label = hashlib.sha256(" ".join(methods).encode()).hexdigest()[:12]
    folder = (out / state if state else Path(tempfile.mkdtemp(dir=out))) / label
    folder.mkdir(parents=True, exist_ok=True)
    missing = [family for family in families if not (folder / f"{family}.pt").exists()]
    if missing:
        _command(checkout, "--dump", str(folder), "--families", *missing, "--methods", *methods)
    return {family: torch.load(folder / f"{family}.pt", weights_only=True) for family in families}


def _dump(folder: Path, families: list[str], methods: list[str]) -> None:
    for family in families:
        found = answers(family, methods)
        unfinished = folder / f"{family}.part"
        torch.save({f"{method} {kind}": answer for (method, kind), answer in found.items()}, unfinished)
        unfinished.rename(folder / f"{family}.pt")


def compare(one: Path, other: Path, families: list[str], methods: list[str], out: Path) -> int:
    """Print a line per cell; returns how many differ."""
    left, right = (_load(checkout, families, methods, out) for checkout in (one, other))
    different = 0
    for family in families:
        for cell in sorted({*left[family], *right[family]}):
            if cell not in left[family] or cell not in right[family]:
                found: str | None = "only one of them has such a prompt"
            else:
                found = difference(left[family][cell], right[family][cell])
            different += found is not None
            word = "refused  " if found is None and "refused" in left[family][cell] else "same     "
            print(f"{'DIFFERENT' if found else word}  {family}  {cell}  {found or ''}".rstrip())
    return different


def main() -> None:
    """Compare two checkouts, or answer for one of them (--dump, used by the command itself)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path)
    parser.add_argument("--families", nargs="+", default=[])
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "same_answers")
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--names", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.names:
        import tiny

        print(" ".join(tiny.ALL_FAMILIES))
    elif given.dump:
        _dump(given.dump, given.families, given.methods)
    elif len(given.checkouts) == 2:
        one, other = (path.resolve() for path in given.checkouts)
        families = given.families or _command(one, "--names").split()
        methods = given.methods or sorted(path.stem for path in (one / "configs").glob("*.yaml"))
        given.out.mkdir(parents=True, exist_ok=True)
        different = compare(one, other, families, methods, given.out)
        print(f"{different} cells differ." if different else "All cells are the same.")
        sys.exit(different > 0)
    else:
        parser.error("give two checkouts")


if __name__ == "__main__":
    main()
