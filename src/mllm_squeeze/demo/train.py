"""Train the model in the box: `python -m mllm_squeeze.demo.train --out DIR`."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from . import build
from .pack import NAMED, TOKENS, Packed, pack, paint
from .pictures import MANY
from .questions import SHARES
from .tower import HEADS, IGNORE, Teacher, see

FEW = (3, 5)
GUIDED_LAYER = 1


@dataclass
class Plan:
    """All that a run depends on; the same plan gives the same steps, unless `minutes` cuts them short."""

    tower_steps: int = 900
    steps: int = 3000
    minutes: float = math.inf
    tower_batch: int = 8
    batch: int = 8
    questions: int = 16
    rate: float = 1e-3
    guide: float = 0.6
    seed: int = 0
    device: str = "cpu"
    half: bool = False
    grow: int = 1
    every: int = 50


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
    optimiser = _optimiser([*model.model.vision_tower.parameters(), *teacher.parameters()], plan.rate)
    clock, losses = Clock(plan.tower_steps, math.inf), []
    for step in range(plan.tower_steps):
        batch = paint(np.random.default_rng([0, plan.seed, 0, step]), plan.tower_batch, (FEW[0], MANY[1]))
        states = see(model, batch.pixels.to(plan.device))
        loss, right = teacher(states, batch.dense.to(plan.device), batch.counts.to(plan.device))
        _update(optimiser, loss, clock.rate(step, plan.rate))
        losses.append(loss.item())
        if (step + 1) % plan.every == 0:
            words = " ".join(f"{name} {share:.3f}" for name, share in right.items())
            print(f"tower {step + 1:5d}  loss {loss.item():.3f}  {words}  {clock.passed():.1f} min", flush=True)
    return losses


class Guide(nn.Module):
    """Help for the first half of the second stage, without which it idles for an hour before it begins to learn.

    At the input of one decoder layer, the answering token must know which words the question holds, and in that layer
    it must look at the things that fit them.
    """

    def __init__(self, model: LlavaForConditionalGeneration, layer: int) -> None:
        super().__init__()
        target: Any = model.model.language_model.layers[layer].self_attn
        # In a list, so that the parameters of the language model do not count as the guide's own.
        self.attention = [target]
        self.heads = nn.ModuleList(nn.Linear(target.config.hidden_size, len(HEADS[name]) + 1) for name in NAMED)
        self.inputs: dict[str, Any] = {}
        self.hook = target.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs = kwargs

    def read(self, batch: Packed) -> torch.Tensor:
        """The loss for naming the words of the question, from the answering tokens."""
        hidden = self.inputs["hidden_states"]
        states = hidden[torch.arange(len(hidden), device=hidden.device)[:, None], batch.ask]
        parts = [
            F.cross_entropy(head(states).flatten(0, 1), batch.named[..., i].flatten(), ignore_index=IGNORE)
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(parts).sum()

    def look(self, batch: Packed) -> torch.Tensor:
        """How little of their attention [B, heads, Q, S] falls on the things asked about: mean of -log of the share."""
        hidden, (cos, sin) = self.inputs["hidden_states"], self.inputs["position_embeddings"]
        attention = self.attention[0]
        q = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        k = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        rows = torch.arange(len(q), device=q.device)[:, None]
        q = q.transpose(1, 2)[rows, batch.ask].transpose(1, 2)
        allowed = batch.mask[:, 0][rows, batch.ask][:, None]
        weights = (q @ k.transpose(2, 3) * attention.scaling).float().masked_fill(~allowed, -math.inf).softmax(-1)
        on_things = (weights[..., 2 : 2 + TOKENS].mean(1) * batch.spots).sum(-1)
        away: torch.Tensor = -(on_things[batch.spots.any(-1)] + 1e-4).log().mean()
        return away


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


def train_answers(
    model: LlavaForConditionalGeneration, tokens: PreTrainedTokenizerFast, plan: Plan, out: Path | None = None
) -> list[float]:
    """Second stage, in place: projector and language model learn to answer; returns the loss of every step."""
    parts = (model.model.multi_modal_projector, model.model.language_model, model.lm_head)
    guide = Guide(model, GUIDED_LAYER).to(plan.device)
    optimiser = _optimiser([p for part in (*parts, guide) for p in part.parameters()], plan.rate)
    clock, losses, shares = Clock(plan.steps, plan.minutes), [], []
    step = 0
    while (done := clock.done(step)) < 1:
        rng = np.random.default_rng([0, plan.seed, 1, step])
        # A crowded picture from the start gives no signal to begin with: the number of things grows after a while.
        grown = min(1.0, max(0.0, (done - 0.1) / 0.3)) if plan.grow else 1.0
        things = tuple(round(few + grown * (many - few)) for few, many in zip(FEW, MANY, strict=True))
        pictures = paint(rng, plan.batch, (things[0], things[1]))
        batch = pack(pictures.scenes, tokens, rng, plan.questions, SHARES).to(plan.device)
        with torch.no_grad():
            features = see(model, pictures.pixels.to(plan.device))[:, 1:]
        with torch.autocast(torch.device(plan.device).type, torch.bfloat16, enabled=plan.half):
            loss, right = answer_loss(model, batch, features, tokens.eos_token_id)
            pull = plan.guide * max(0.0, 1 - done / 0.6)
            read, look = (guide.read(batch), guide.look(batch)) if pull else (loss.new_zeros(()),) * 2
        _update(optimiser, loss + pull * (read + look), clock.rate(step, plan.rate))
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
    guide.hook.remove()
    return losses


def save(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Write the folder that `from_pretrained` reads: weights, configurations, tokenizer and processor."""
    model.save_pretrained(out)
    build.processor().save_pretrained(out)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, train both stages, and save."""
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the trained model to")
    parser.add_argument("--start", type=Path, help="a saved folder whose tower is used, instead of training one")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's own choice")
    for name, value in vars(plan).items():
        kind: dict[str, Any] = {"action": "store_true"} if value is False else {"type": type(value), "default": value}
        parser.add_argument(f"--{name.replace('_', '-')}", **kind)
    options = vars(parser.parse_args(arguments))
    out, start, threads = options.pop("out"), options.pop("start"), options.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    plan = Plan(**options)
    model: Any = (
        build.model(build.config(), plan.seed)
        if start is None
        else LlavaForConditionalGeneration.from_pretrained(start)
    )
    model.to(plan.device)
    if start is None:
        train_tower(model, plan)
        save(model, out)
    train_answers(model, build.tokenizer(), plan, out)
    save(model, out)


if __name__ == "__main__":
    main()
