"""Methods side by side on the model in the box: accuracy, time, FLOPs, and pictures of what each one keeps.

`python -m mllm_squeeze.demo.compare` takes about a minute on two cores; `--full --out docs/results` makes the committed
tables from all methods that prune images, and with `--untimed` those of them that a busy machine can make as well.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
from mllm_squeeze.reporting import pictures as viz
from mllm_squeeze.reporting.tables import markdown

from . import folder
from .contest import DENSE, Contender, Entry, hit, line_up, measure_accuracy, measure_time, summarise
from .evaluate import NEW_TOKENS, answers
from .questions import Item, held_out

METHODS = ("random", "fastv", "sparsevlm", "visionzip", "divprune", "tome")
RATIOS = (0.5, 0.75)
FULL_RATIOS = (0.5, 0.75, 0.9)
NOTE = (
    "tokens: visual tokens of a picture at the end, /layer: mean over the decoder layers; first %: the first word of "
    "the answer is right, ± standard error, and its difference to dense; whole %: that word right and nothing behind "
    "it; GFLOPs: language model, one prompt"
)
TIMED = "; ms: median prefill of a batch, encoder included"
ACROSS = 6
HEAD = ("method", "cut", "tokens", "/layer", "first %", "to dense", "whole %", "GFLOPs", "ms")


@dataclass
class Comparison:
    """All that one run found, and what it was run with; refused: why methods are missing, by method and cut."""

    entries: list[Entry]
    questions: int
    batch: int
    repeats: int
    versions: dict[str, str]
    threads: int
    command: str
    refused: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def to_markdown(self) -> str:
        """Return the table for the documentation."""
        head = _head(self)
        lines = markdown(head, [_cells(entry)[: len(head)] for entry in self.entries])
        facts = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        how = (
            f"{self.questions} held-out questions, a picture each; the difference to dense is paired. Answers are read "
            f"up to `</s>` or {NEW_TOKENS} tokens."
        )
        if self.repeats:
            how += (
                f" Prefill: batch of {self.batch}, median of {self.repeats} rounds in which all methods take turns, "
                f"{self.threads} threads."
            )
        missing = [f"- {what}: {why}" for what, why in self.refused.items()]
        missing = ["", "Refused, and so not in the table:", "", *missing] if missing else []
        return "\n".join([*lines, "", f"{_note(self)}. {how}", *missing, "", f"`{self.command}` ({facts})", ""])


def image_methods() -> list[str]:
    """Return the methods that prune a picture during the prefill, to a ratio that the caller chooses."""
    out = []
    for name in squeeze.methods():
        described = squeeze.describe(name)
        facts = described["facts"]
        in_cache = any(place.startswith("cache") for place in facts["places"])
        # The model in the box has no text encoder beside its tower.
        ready = not in_cache and not facts["text_encoder"]
        if "image" in facts["modalities"] and "ratio" in described["params"] and ready:
            out.append(name)
    return out


def main(
    methods: Sequence[str] = METHODS,
    ratios: Sequence[float] = RATIOS,
    questions: int = 60,
    pictures: int = 2,
    out: str | Path | None = None,
    *,
    seeds: int = 1,
    repeats: int = 5,
    batch: int = 10,
    console: Console | None = None,
    command: str = "mllm_squeeze.demo.compare.main()",
    model: Any = None,
    processor: Any = None,
) -> Comparison:
    """Evaluate the dense model and each method at each ratio on the same held-out questions, print and save the table.

    pictures: how many pictures of survivors to draw. out: folder for compare.json, compare.md and compare.png; nothing
    is written without it. A method that refuses a ratio is named beside the table. seeds: seeds of a random method,
    averaged. repeats: timed prefills; with 0 nothing is timed, and answers.json and answers.md are written instead.
    model, processor: instead of the model in the box.

    Raises:
        SqueezeError: all methods refuse.
    """
    console = console or Console()
    if model is None:
        model = AutoModelForImageTextToText.from_pretrained(folder()).eval()
        processor = AutoProcessor.from_pretrained(folder())
    items = list(held_out(questions))
    contenders, refused = line_up(model, methods, ratios)
    if refused and len(contenders) == 1:
        raise next(iter(refused.values()))
    with _progress(console) as bar, warnings.catch_warnings():
        # A method that cannot go as low as asked warns; the table shows what it kept.
        warnings.simplefilter("ignore", squeeze.SqueezeWarning)
        measure_accuracy(bar, contenders, processor, items, batch, seeds)
        measure_time(bar, contenders, processor, items[:batch], repeats)
    dense = contenders[0]
    reference = contenders[1].handle.report() if len(contenders) > 1 else None
    comparison = Comparison(
        entries=[summarise(contender, dense, reference, items) for contender in contenders],
        questions=len(items),
        batch=min(batch, len(items)),
        repeats=repeats,
        versions=_versions(),
        threads=torch.get_num_threads(),
        command=command,
        refused={what: str(why) for what, why in refused.items()},
    )
    console.print(_table(comparison))
    for what, why in comparison.refused.items():
        console.print(f"refused: {what}: {why}", highlight=False)
    if out is not None:
        _save(comparison, Path(out))
        _draw(contenders, processor, _examples(dense, items, pictures), Path(out))
        written = sorted(path.name for stem in ("answers", "compare") for path in Path(out).glob(f"{stem}*"))
        console.print(f"in {out}: {', '.join(written)}")
    return comparison


def _head(comparison: Comparison) -> tuple[str, ...]:
    """The names of the columns; the times stand last, and are left out where nothing was timed."""
    return HEAD if comparison.repeats else HEAD[:-1]


def _note(comparison: Comparison) -> str:
    """What the columns mean."""
    return NOTE + (TIMED if comparison.repeats else "")


def _cells(entry: Entry) -> list[str]:
    """One row of the table, as words."""
    dense = entry.method == DENSE
    difference = f"{100 * entry.against_dense:+.1f} ± {100 * entry.against_dense_error:.1f}"
    return [
        entry.method,
        "-" if dense else f"{100 * entry.ratio:.0f} %",
        f"{entry.tokens:.0f}",
        f"{entry.tokens_per_layer:.0f}",
        f"{100 * entry.accuracy:.1f} ± {100 * entry.error:.1f}",
        "-" if dense else difference,
        f"{100 * entry.exact:.1f}",
        "-" if entry.flops is None else f"{entry.flops / 1e9:.3f}",
        "-" if entry.seconds is None else f"{1000 * entry.seconds:.0f}",
    ]


def _table(comparison: Comparison) -> Table:
    title = f"{comparison.questions} held-out questions, prefill in batches of {comparison.batch}"
    head = _head(comparison)
    # Nine columns in 80 characters: the blank between two of them is the box's own.
    table = Table(title=title, caption=_note(comparison), box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    last = 0.0
    for entry in comparison.entries:
        if entry.ratio != last:
            table.add_section()
        last = entry.ratio
        table.add_row(*_cells(entry)[: len(head)])
    return table


def _save(comparison: Comparison, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    stem = "compare" if comparison.repeats else "answers"
    (out / f"{stem}.json").write_text(comparison.to_json(), encoding="utf-8")
    (out / f"{stem}.md").write_text(comparison.to_markdown(), encoding="utf-8")


def _examples(dense: Contender, items: list[Item], count: int) -> list[Item]:
    """The first questions that the dense model answers rightly, so that every mistake shown is the method's."""
    known = [item for item, hit in zip(items, dense.right[0], strict=True) if hit]
    return (known or items)[:count]


def _draw(contenders: list[Contender], processor: Any, items: list[Item], out: Path) -> None:
    """Draw what each method keeps at the middle ratio, ACROSS methods to a file: compare.png, compare-2.png."""
    ratios = sorted({c.ratio for c in contenders if c.handle is not None})
    if not ratios or not items:
        return
    chosen = [c for c in contenders if c.handle is not None and c.ratio == ratios[len(ratios) // 2]]
    for start in range(0, len(chosen), ACROSS):
        name = "compare.png" if start == 0 else f"compare-{1 + start // ACROSS}.png"
        _draw_some(contenders[0], chosen[start : start + ACROSS], processor, items, out / name)


def _draw_some(dense: Contender, shown: list[Contender], processor: Any, items: list[Item], path: Path) -> None:
    """A row for each item, a column for each contender, with the answer under each picture."""
    kept: list[list[list[int]]] = []
    captions = []
    for item in items:
        given = [answers(c.model, processor, [item])[0] for c in [dense, *shown]]
        captions.append([_caption(words, item) for words in given])
        kept.append([viz.survivors(c.handle.layout.spans[0], c.handle.cuts[-1]) for c in shown])
    titles = [f"{c.method}\n{len(kept[0][i])} kept" for i, c in enumerate(shown)]
    rows = ["\n".join(textwrap.wrap(item.question, 20)) for item in items]
    tiles = shown[0].handle.layout.spans[0].tiles
    viz.sheet([i.picture for i in items], tiles, kept, titles=titles, rows=rows, captions=captions, path=path)


def _caption(answer: str, item: Item) -> str:
    """The first word and whether it is right; dots where the answer goes on."""
    first, *more = answer.split() or [""]
    return f"{first}{'…' if more else ''} {'✓' if hit(answer, item) else '✗'}"


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "mllm_squeeze": squeeze.__version__,
    }


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def command(arguments: Sequence[str] | None = None) -> Comparison:
    """Read the command line and run `main`."""
    parser = argparse.ArgumentParser(prog="python -m mllm_squeeze.demo.compare", description=__doc__)
    parser.add_argument("--methods", nargs="+", help=f"default: {' '.join(METHODS)}; with --full all that prune images")
    parser.add_argument(
        "--ratios", nargs="+", type=float, help="fractions removed; default: 0.5 0.75, with --full 0.9 too"
    )
    parser.add_argument("--questions", type=int, help="default: 60, with --full 1000")
    parser.add_argument("--pictures", type=int, default=2, help="pictures of survivors to draw")
    parser.add_argument("--out", type=Path, help="folder for the JSON, the table and the picture")
    parser.add_argument("--full", action="store_true", help="all methods, more questions, three seeds of chance")
    parser.add_argument("--untimed", action="store_true", help="leave out the times: write answers.json and answers.md")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    return main(
        options.methods or (image_methods() if options.full else METHODS),
        options.ratios or (FULL_RATIOS if options.full else RATIOS),
        options.questions or (1000 if options.full else 60),
        options.pictures,
        options.out,
        seeds=3 if options.full else 1,
        repeats=0 if options.untimed else 15 if options.full else 5,
        command=shlex.join([*parser.prog.split(), *given]),
    )


if __name__ == "__main__":
    command()
