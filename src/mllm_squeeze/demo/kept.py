"""What each method keeps of the pictures in the box: how much of it is empty background, which answers nothing.

`python -m mllm_squeeze.demo.kept --out docs/results` makes the committed table, and takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
from mllm_squeeze.reporting.tables import markdown

from . import folder
from .compare import image_methods
from .questions import held_out
from .stopping import RATIO, Case, case

HEAD = ("method", "kept", "background", "of what is kept %", "word right %")


@dataclass(frozen=True)
class Row:
    """One method: visual tokens left of a picture, those of them that are background, and right answers, in means."""

    what: str
    kept: float
    background: float
    right: float


@dataclass
class Kept:
    """One row for each method, that with most background first, and why others are missing."""

    rows: list[Row]
    refused: dict[str, str]
    background: float
    questions: int
    versions: dict[str, str]
    command: str

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def to_markdown(self) -> str:
        """Return the table for the documentation."""
        lines = markdown(
            HEAD,
            [
                [
                    row.what,
                    *(f"{n:.0f}" for n in (row.kept, row.background, 100 * row.background / row.kept, 100 * row.right)),
                ]
                for row in self.rows
            ],
        )
        facts = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        note = (
            f"Visual tokens that are left of 196 at {100 * RATIO:.0f} %, mean of {self.questions} held-out questions; "
            f"background: how many of them show none of the things in the picture, of all tokens {self.background:.0f}."
        )
        missing = [f"- {what}: {why}" for what, why in self.refused.items()]
        missing = ["", "Refused, and so not in the table:", "", *missing] if missing else []
        return "\n".join([*lines, "", note, *missing, "", f"`{self.command}` ({facts})", ""])


@torch.no_grad()
def study(
    model: Any, processor: Any, methods: Sequence[str], questions: int = 100, command: str = "mllm_squeeze.demo.kept"
) -> Kept:
    """Run each method on the same questions, and look at what it kept of each picture."""
    cases = [case(processor, item) for item in held_out(questions)]
    rows, refused = [], {}
    for method in methods:
        try:
            rows.append(_row(model, cases, method))
        except squeeze.SqueezeError as error:
            refused[method] = str(error)
    rows.sort(key=lambda row: -row.background / max(row.kept, 1))
    facts = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}
    background = sum(int(one.background.sum()) for one in cases) / max(len(cases), 1)
    return Kept(rows, refused, background, len(cases), {**facts, "mllm_squeeze": squeeze.__version__}, command)


def _row(model: Any, cases: Sequence[Case], method: str) -> Row:
    kept, background, right = [], [], []
    with squeeze.applied(model, method, ratio=RATIO) as handle:
        for one in cases:
            logits = model(input_ids=one.ids[:, :-1], pixel_values=one.pixels).logits[0, -1]
            left = torch.isin(one.visual, handle.cuts[-1].kept[0].cpu())
            kept.append(int(left.sum()))
            background.append(int((left & one.background).sum()))
            right.append(float(logits.argmax() == one.ids[0, -1]))
    return Row(method, *(statistics.fmean(values) for values in (kept, background, right)))


def main(arguments: Sequence[str] | None = None) -> Kept:
    """Read the command line, run the study, print it and save it as kept.json and kept.md."""
    parser = argparse.ArgumentParser(prog="python -m mllm_squeeze.demo.kept", description=__doc__)
    parser.add_argument("--methods", nargs="+", help="default: all that prune images")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    model = AutoModelForImageTextToText.from_pretrained(folder()).eval()
    processor = AutoProcessor.from_pretrained(folder())
    command = shlex.join([*parser.prog.split(), *given])
    found = study(model, processor, options.methods or image_methods(), options.questions, command)
    print(found.to_markdown())
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kept.json").write_text(found.to_json(), encoding="utf-8")
        (options.out / "kept.md").write_text(found.to_markdown(), encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
