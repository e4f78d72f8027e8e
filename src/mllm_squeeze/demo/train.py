"""Train the model in the box: `python -m mllm_squeeze.demo.train --out DIR`."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from . import build
from .guide import Guide
from .pack import TOKENS, Packed, pack, paint
from .pictures import MANY
from .questions import SHARES
from .tower import Teacher, see

FEW = (3, 5)
STAGES = ("tower", "answers", "deeper")


@dataclass
class Plan:
    """What all stages of a run share; the same plan and stages give the same steps, unless minutes cut them short."""

    tower_steps: int = 2100
    tower_batch: int = 8
    tower_rate: float = 1.5e-3
    batch: int = 8
    questions: int = 24
    seed: int = 0
    device: str = "cpu"
    half: bool = False
    every: int = 50


@dataclass
class Stage:
    """One stage of learning to answer: which layers are guided and how much, and whether it starts with few things."""

    stream: int
    steps: int
    rate: float
    guided: tuple[int, ...]
    guided_until: float
    look: float
    read: float
    grow: bool
    shares: dict[str, float]
    minutes: float = math.inf


ANSWERS = Stage(1, steps=3000, rate=1e-3, guided=(1,), guided_until=0.6, look=0.6, read=0.6, grow=True, shares=SHARES)
# The kinds that take longest get more of the questions.
SLOW_FIRST = {"colour": 0.15, "shape": 0.1, "digit": 0.2, "place": 0.25, "count": 0.3}
DEEPER = Stage(
    2, steps=3000, rate=7e-4, guided=(1, 2), guided_until=0.3, look=0.2, read=0.0, grow=False, shares=SLOW_FIRST
)


class Clock:
    """How far a stage is, from 0 to 1, by steps or by minutes, whichever is further."""

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps, self.minutes, self.start = steps, minutes, time.monotonic()

    def passed(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self.start) / 60

    def done(self, step: int) -> float:
        """The share of the stage that lies behind."""
        return min(1.0, max(step / max(1, self.steps), self.passed() / self.minutes))

    def rate(self, step: int, top: float, warm: int = 30) -> float:
        """The learning rate: a linear warm-up and then a cosine to a fiftieth of `top`."""
        return top * min(1.0, (step + 1) / warm) * (0.02 + 0.49 * (1 + math.cos(math.pi * self.done(step))))


def _optimiser(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)


def _update(optimiser: torch.optim.Optimizer, loss: Any, rate: float) -> None:
    """One step at the given learning rate, the gradient's norm cut at 1."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    optimiser.step()


def train_tower(model: LlavaForConditionalGeneration, plan: Plan) -> list[float]:
    """First stage, in place: labels for each patch and for the CLS token; returns the loss of every step."""
    width: Any = model.config.vision_config
    teacher = Teacher(width.hidden_size).to(plan.device)
    optimiser = _optimiser([*model.model.vision_tower.parameters(), *teacher.parameters()], plan.tower_rate)
    clock, losses = Clock(plan.tower_steps, math.inf), []
    for step in range(plan.tower_steps):
        batch = paint(np.random.default_rng([0, plan.seed, 0, step]), plan.tower_batch, (FEW[0], MANY[1]))
        states = see(model, batch.pixels.to(plan.device))
        loss, right = teacher(states, batch.dense.to(plan.device), batch.counts.to(plan.device))
        _update(optimiser, loss, clock.rate(step, plan.tower_rate))
        losses.append(loss.item())
        if (step + 1) % plan.every == 0:
            words = " ".join(f"{name} {share:.3f}" for name, share in right.items())
            print(f"tower {step + 1:5d}  loss {loss.item():.3f}  {words}  {clock.passed():.1f} min", flush=True)
    return losses


def answer_loss(
    model: LlavaForConditionalGeneration, batch: Packed, features: torch.Tensor, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the answer and of the </s> behind it, and which answers are right, bool [B, Q]."""
    embeds = model.get_input_embeddings()(batch.ids)
    embeds = torch.cat([embeds[:, :2], model.model.multi_modal_projector(features), embeds[:, 2 + TOKENS :]], 1)
    # Added rather than boolean, or every layer converts it anew.
    mask = torch.zeros_like(batch.mask, dtype=embeds.dtype).masked_fill(~batch.mask, -math.inf)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    logits = model.lm_head(hidden[rows, batch.ask])
    stops = model.lm_head(hidden[rows, batch.ask + 1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
    stop = F.cross_entropy(stops.flatten(0, 1), torch.full_like(batch.answers, end).flatten())
    return loss + 0.1 * stop, logits.argmax(-1) == batch.answers


def deepen(model: LlavaForConditionalGeneration, at: int = 1) -> LlavaForConditionalGeneration:
    """A model with one more decoder layer at index `at`, which does nothing yet: all answers stay as they are."""
    settings: Any = copy.deepcopy(model.config)
    settings.text_config.num_hidden_layers += 1
    deeper: Any = build.model(settings)
    decoder: Any = model.model.language_model
    old = iter(decoder.layers)
    for index, layer in enumerate(deeper.model.language_model.layers):
        if index == at:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        else:
            layer.load_state_dict(next(old).state_dict())
    rest = {name: value for name, value in model.state_dict().items() if ".language_model.layers." not in name}
    deeper.load_state_dict(rest, strict=False)
    grown: LlavaForConditionalGeneration = deeper.to(model.device)
    return grown


def train_answers(
    model: LlavaForConditionalGeneration, plan: Plan, stage: Stage, out: Path | None = None
) -> list[float]:
    """Later stages, in place: projector and language model learn to answer; returns the loss of every step."""
    tokens = build.tokenizer()
    parts = (model.model.multi_modal_projector, model.model.language_model, model.lm_head)
    guide = Guide(model, stage.guided).to(plan.device)
    optimiser = _optimiser([p for part in (*parts, guide) for p in part.parameters()], stage.rate)
    clock, losses, shares = Clock(stage.steps, stage.minutes), [], []
    step = 0
    while (done := clock.done(step)) < 1:
        rng = np.random.default_rng([0, plan.seed, stage.stream, step])
        # A crowded picture from the start gives no signal to begin with: the number of things grows after a while.
        grown = min(1.0, max(0.0, (done - 0.1) / 0.3)) if stage.grow else 1.0
        things = tuple(round(few + grown * (many - few)) for few, many in zip(FEW, MANY, strict=True))
        pictures = paint(rng, plan.batch, (things[0], things[1]))
        batch = pack(pictures.scenes, tokens, rng, plan.questions, stage.shares).to(plan.device)
        with torch.no_grad():
            features = see(model, pictures.pixels.to(plan.device))[:, 1:]
        with torch.autocast(torch.device(plan.device).type, torch.bfloat16, enabled=plan.half):
            loss, right = answer_loss(model, batch, features, tokens.eos_token_id)
            pull = max(0.0, 1 - done / stage.guided_until) if stage.guided_until else 0.0
            look = guide.look(batch) if pull else loss.new_zeros(())
            read = guide.read(batch) if pull and stage.read else loss.new_zeros(())
        total = loss + pull * (stage.look * look + stage.read * read)
        _update(optimiser, total, clock.rate(step, stage.rate))
        losses.append(loss.item())
        shares.append(right.float().mean().item())
        step += 1
        if step % plan.every == 0:
            recent = sum(shares[-plan.every :]) / plan.every
            print(
                f"answers {step:5d}  things {things[0]}-{things[1]}  loss {loss.item():.3f}  right {recent:.3f}  "
                f"read {read.item():.2f}  look {look.item():.2f}  {clock.passed():.1f} min",
                flush=True,
            )
        if out is not None and step % (5 * plan.every) == 0:
            save(model, out)
    guide.leave()
    return losses


def save(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Write the folder that `from_pretrained` reads: weights, configurations, tokenizer and processor."""
    model.save_pretrained(out)
    build.processor().save_pretrained(out)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, train the stages asked for, and save."""
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the trained model to")
    parser.add_argument("--start", type=Path, help="a saved folder to go on from, instead of an untrained model")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="what to train, in this order")
    parser.add_argument("--steps", type=int, help="steps of each stage of answers")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit of each stage of answers")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's own choice")
    for name, value in vars(plan).items():
        kind: dict[str, Any] = {"action": "store_true"} if value is False else {"type": type(value), "default": value}
        parser.add_argument(f"--{name.replace('_', '-')}", **kind)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = Plan(**{name: getattr(options, name) for name in vars(plan)})
    if options.start is None:
        model: Any = build.model(build.config(), plan.seed)
    else:
        model = LlavaForConditionalGeneration.from_pretrained(options.start)
    model.to(plan.device)
    for name in options.stages:
        if name == "tower":
            train_tower(model, plan)
        else:
            model = deepen(model) if name == "deeper" else model
            stage = replace(DEEPER if name == "deeper" else ANSWERS, minutes=options.minutes)
            train_answers(model, plan, replace(stage, steps=options.steps or stage.steps), options.out)
        save(model, options.out)


if __name__ == "__main__":
    main()
