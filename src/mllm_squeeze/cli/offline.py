"""Answers the lines of a file, prompts of like length together; a line that cannot be answered says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm_squeeze.cli import load
from mllm_squeeze.errors import NotAppliedError, SqueezeError
from mllm_squeeze.serving.lines import Answers, Line, Question

# So many batches are read ahead, to find prompts of like length among them.
_AHEAD = 8


@dataclass(frozen=True)
class Asker:
    """A model with a method on it, and how it is asked.

    reader: its processor, which pads on the left. frames: of each video. tokens: most of an answer.
    """

    model: Any
    reader: Any
    handle: Any
    frames: int | None
    tokens: int

    def ask(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Return the answer to each question, with its visual tokens before and after."""
        inputs = load.prompts(
            self.reader, [(one.prompt, list(one.images), list(one.videos)) for one in questions], self.frames
        ).to(self.model.device, dtype=self.model.dtype)
        with torch.inference_mode():
            written = self.model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False)
        start = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        texts = self.reader.batch_decode(written[:, start:], skip_special_tokens=True)
        counts = self._counts(len(questions))
        return [{"answer": text.strip(), **count} for text, count in zip(texts, counts, strict=True)]

    def _counts(self, rows: int) -> list[dict[str, int]]:
        try:
            report = self.handle.report()
        except NotAppliedError:
            return [{"tokens_before": 0, "tokens_after": 0}] * rows
        out = [{"tokens_before": 0, "tokens_after": 0} for _ in range(rows)]
        for span, after in zip(report.record.spans, report.span_tokens[-1], strict=True):
            out[span.sample]["tokens_before"] += span.length
            out[span.sample]["tokens_after"] += after
        return out


@dataclass(frozen=True)
class _Pending:
    line: Line
    question: Question
    length: int


def answer(asker: Asker, lines: Sequence[Line], out: Answers, size: int, progress: Callable[[str], None]) -> int:
    """Answer the lines that have no answer yet, and return how many of them failed.

    size: prompts of one batch.
    """
    failed, todo = 0, [line for line in lines if line.number not in out.done]
    for start in range(0, len(todo), size * _AHEAD):
        pending = []
        for line in todo[start : start + size * _AHEAD]:
            try:
                pending.append(_measured(asker, line))
            except (SqueezeError, MemoryError, RuntimeError) as error:
                out.write(line, error=_said(error))
                failed += 1
        for batch in _batches(pending, size):
            failed += _write(asker, batch, out)
            progress(f"{len(out.done)} of {len(lines)} lines answered, {failed} of them with an error")
    return failed


def _measured(asker: Asker, line: Line) -> _Pending:
    """Return a line with its length, by which an unreadable one shows before it can spoil a batch."""
    question = line.question()
    inputs = load.prompt(asker.reader, question.prompt, list(question.images), list(question.videos), asker.frames)
    return _Pending(line, question, int(inputs["input_ids"].shape[1]))


def _batches(pending: list[_Pending], size: int) -> Iterator[list[_Pending]]:
    """Yield batches of like length, videos apart from pictures; the longest first, so that memory fails early."""
    for films in (True, False):
        group = [one for one in pending if bool(one.question.videos) is films]
        group.sort(key=lambda one: (-one.length, one.line.number))
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _write(asker: Asker, batch: list[_Pending], out: Answers) -> int:
    """Write the answers of a batch and return how many failed; a batch that fails is asked line by line."""
    try:
        found = asker.ask([one.question for one in batch])
    except Exception as error:  # whatever a line does to the model must not stop the others
        if len(batch) > 1:
            return sum(_write(asker, [one], out) for one in batch)
        out.write(batch[0].line, error=_said(error))
        return 1
    for one, answer in zip(batch, found, strict=True):
        out.write(one.line, **answer)
    return 0


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
