"""Why the model in the box does not stop after its word once most of the empty background is cut.

`python -m mllm_squeeze.demo.stopping --out docs/results` makes the committed table. Each row is one way to take visual
tokens away; the cut of the library is one, the others are the dense model with masks, positions and layers of choice.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
from mllm_squeeze.reporting.tables import markdown

from . import folder
from .evaluate import prompt
from .pictures import coverage
from .questions import Item, held_out
from .tower import EMPTY

Rows = Literal["all", "answer", "others"]
METHOD = "divprune"
OTHERS = ("visionzip", "uniform", "random")
RATIO = 0.75
MADE_UP = (0, 5, 10, 20, 30, 40)
HEAD = ("visual tokens", "kept", "background", "word right %", "stops %")
NOTE = (
    "kept: visual tokens of a picture that are left, background: how many of them show none of the things in the "
    "picture; word right: first word of the answer; stops: the model says `</s>` when it is given the right word"
)


@dataclass(frozen=True)
class Case:
    """A question with its right answer behind it: ids [1, T], pixels, visual columns [N], which are background [N]."""

    ids: Tensor
    pixels: Tensor
    visual: Tensor
    background: Tensor


@dataclass(frozen=True)
class Row:
    """What the model said with some visual tokens gone: means over the questions, as in NOTE, but as shares."""

    what: str
    kept: float
    background: float
    right: float
    stops: float


@dataclass
class Study:
    """All rows; `attention` is the share of the answer word's attention in the first layer that the background gets."""

    rows: list[Row]
    attention: dict[str, float]
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
                [row.what, *(f"{n:.0f}" for n in (row.kept, row.background, 100 * row.right, 100 * row.stops))]
                for row in self.rows
            ],
        )
        facts = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        looks = ", ".join(f"{100 * share:.0f} % {what}" for what, share in self.attention.items())
        return "\n".join(
            [
                *lines,
                "",
                f"{NOTE}. {self.questions} held-out questions.",
                "",
                f"Attention of the answer word to the background in the first layer, mean over heads: {looks}.",
                "",
                f"`{self.command}` ({facts})",
                "",
            ]
        )


@torch.no_grad()
def study(model: Any, processor: Any, questions: int = 100, command: str = "mllm_squeeze.demo.stopping") -> Study:
    """Try the explanations one by one: the library, positions, the number of tokens, rows, layers, which tokens."""
    cases = [case(processor, item) for item in held_out(questions)]
    every = [torch.arange(len(one.visual)) for one in cases]
    row, kept = squeezed(model, cases, METHOD)
    rows = [masked("all (dense)", model, cases, every), row, *_explain(model, cases, kept)]
    rows += [squeezed(model, cases, other)[0] for other in OTHERS]
    size = len(kept[0])
    for count in MADE_UP:
        what = f"{size} drawn by chance, at least {count} of them background"
        rows.append(masked(what, model, cases, drawn(cases, size, count)))
    looks = {name: looked(model, cases, keep) for name, keep in (("dense", every), (f"after {METHOD}", kept))}
    facts = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}
    return Study(rows, looks, len(cases), {**facts, "mllm_squeeze": squeeze.__version__}, command)


def _explain(model: Any, cases: list[Case], kept: list[Tensor]) -> list[Row]:
    """The tokens that the method dropped, masked in the dense model in several ways."""
    last = len(model.model.language_model.layers)
    return [
        masked(f"{METHOD}'s, masked in the dense model, renumbered", model, cases, kept, renumber=True),
        masked(f"{METHOD}'s, masked in the dense model", model, cases, kept),
        masked("... for the answer word only", model, cases, kept, rows="answer"),
        masked("... for all before the answer word", model, cases, kept, rows="others"),
        masked("... in layer 0 only", model, cases, kept, layers=range(1)),
        masked("... in all layers but layer 0", model, cases, kept, layers=range(1, last)),
    ]


def case(processor: Any, item: Item) -> Case:
    """One question as the model reads it, the right answer behind it."""
    inputs = processor(images=item.picture, text=prompt(processor, item.question), return_tensors="pt")
    answer = processor.tokenizer.convert_tokens_to_ids(item.answer)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[answer]])], 1)
    covered = np.max([coverage(thing).ravel() for thing in item.scene.things], axis=0)
    visual = (ids[0] == processor.image_token_id).nonzero()[:, 0]
    return Case(ids, inputs["pixel_values"], visual, torch.from_numpy(covered < EMPTY))


def squeezed(model: Any, cases: list[Case], method: str) -> tuple[Row, list[Tensor]]:
    """What the library's cut does, and the visual tokens that each case kept."""
    kept, logits = [], []
    with squeeze.applied(model, method, ratio=RATIO) as handle:
        for one in cases:
            logits.append(model(input_ids=one.ids, pixel_values=one.pixels).logits[0, -2:])
            columns = handle.cuts[-1].kept[0].cpu()
            kept.append(torch.isin(one.visual, columns).nonzero()[:, 0])
    return _row(f"{method}, {100 * RATIO:.0f} % cut by the library", model, cases, kept, logits), kept


def masked(
    what: str,
    model: Any,
    cases: list[Case],
    kept: list[Tensor],
    *,
    rows: Rows = "all",
    layers: Sequence[int] | None = None,
    renumber: bool = False,
) -> Row:
    """What the dense model does when it must not attend to the visual tokens that are not kept.

    rows: which rows of the attention are masked: all, that of the answer word, or all others. layers: which layers;
    None for all of them. renumber: whether what is left stands at consecutive positions.
    """
    text = model.model.language_model
    logits = []
    for one, keep in zip(cases, kept, strict=True):
        mask, positions = _closed(one, keep, rows, renumber)
        open_mask, _ = _closed(one, torch.arange(len(one.visual)), rows, renumber)
        with _masks(text.layers, mask, open_mask, layers):
            states = text(inputs_embeds=_embeds(model, one), position_ids=positions, use_cache=False)
        logits.append(model.lm_head(states.last_hidden_state[0, -2:]))
    return _row(what, model, cases, kept, logits)


def looked(model: Any, cases: list[Case], kept: list[Tensor]) -> float:
    """The share of the answer word's attention in the first layer that falls on background, mean over heads."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    shares = []
    try:
        for one, keep in zip(cases, kept, strict=True):
            mask, positions = _closed(one, keep, "all", False)
            states = model.model.language_model(
                inputs_embeds=_embeds(model, one),
                attention_mask=_added(mask),
                position_ids=positions,
                use_cache=False,
                output_attentions=True,
            )
            shares.append(float(states.attentions[0][0, :, -1, one.visual[one.background]].sum(-1).mean()))
    finally:
        model.set_attn_implementation(before)
    return statistics.fmean(shares)


def drawn(cases: list[Case], size: int, background: int, seed: int = 0) -> list[Tensor]:
    """`size` visual tokens drawn for each case: `background` from the background, or more where things run out."""
    rng = np.random.default_rng(seed)
    out = []
    for one in cases:
        empty, full = (part.nonzero()[:, 0].numpy() for part in (one.background, ~one.background))
        count = max(background, size - len(full))
        chosen = [rng.choice(empty, count, replace=False), rng.choice(full, size - count, replace=False)]
        out.append(torch.from_numpy(np.sort(np.concatenate(chosen))))
    return out


def _embeds(model: Any, one: Case) -> Tensor:
    """The input of the language model: the projected features in their places."""
    embeds = model.get_input_embeddings()(one.ids).clone()
    found = model.get_image_features(pixel_values=one.pixels).pooler_output
    embeds[0, one.visual] = torch.cat(list(found))
    return embeds


def _closed(one: Case, keep: Tensor, rows: Rows, renumber: bool) -> tuple[Tensor, Tensor]:
    """The mask [T, T], True where a token may attend, and the positions [1, T]."""
    size = one.ids.shape[1]
    left = torch.ones(size, dtype=torch.bool)
    left[one.visual] = False
    left[one.visual[keep]] = True
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    # A token that is closed sees itself, or its row would be empty.
    closed = causal & (left | torch.eye(size, dtype=torch.bool))
    answer = torch.arange(size)[:, None] == size - 1
    if rows != "all":
        closed = torch.where(answer if rows == "answer" else ~answer, closed, causal)
    positions = (left.cumsum(0) - 1).clamp(min=0) if renumber else torch.arange(size)
    return closed, positions[None]


def _added(mask: Tensor) -> Tensor:
    """The mask [T, T] as a number to add, [1, 1, T, T]."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]


@contextmanager
def _masks(layers: nn.ModuleList, closed: Tensor, usual: Tensor, where: Sequence[int] | None) -> Iterator[None]:
    """Give the layers `where` one mask and the others another, whatever the model made."""
    hooks = []
    for index, layer in enumerate(layers):
        mask = _added(closed if where is None or index in where else usual)

        def put(_: nn.Module, args: Any, kwargs: dict[str, Any], mask: Tensor = mask) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.register_forward_pre_hook(put, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _row(what: str, model: Any, cases: list[Case], kept: list[Tensor], logits: list[Tensor]) -> Row:
    """Count the first words that are right and the ends that come, from the last two logits of each case."""
    end = model.generation_config.eos_token_id
    said = torch.stack(logits).argmax(-1)
    words = torch.cat([one.ids[:, -1] for one in cases])
    return Row(
        what=what,
        kept=statistics.fmean(len(keep) for keep in kept),
        background=statistics.fmean(int(one.background[keep].sum()) for one, keep in zip(cases, kept, strict=True)),
        right=(said[:, 0] == words).float().mean().item(),
        stops=(said[:, 1] == end).float().mean().item(),
    )


def main(arguments: Sequence[str] | None = None) -> Study:
    """Read the command line, run the study, print it and save it as stopping.json and stopping.md."""
    parser = argparse.ArgumentParser(prog="python -m mllm_squeeze.demo.stopping", description=__doc__)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    model = AutoModelForImageTextToText.from_pretrained(folder()).eval()
    processor = AutoProcessor.from_pretrained(folder())
    found = study(model, processor, options.questions, shlex.join([*parser.prog.split(), *given]))
    print(found.to_markdown())
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "stopping.json").write_text(found.to_json(), encoding="utf-8")
        (options.out / "stopping.md").write_text(found.to_markdown(), encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
