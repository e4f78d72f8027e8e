"""mllm-squeeze run --in --out: each line is answered once, whatever stops the run in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mllm_squeeze import demo
from mllm_squeeze.cli import app, offline
from mllm_squeeze.errors import ConfigError, InUseError
from mllm_squeeze.serving import lines

pytest.importorskip("torchvision", reason="the model in the box reads pictures with torchvision")
_METHOD = ["--method", "fastv", "--ratio", "0.5", "--max-new-tokens", "4", "--device", "cpu"]


def _questions(folder: Path, count: int) -> Path:
    rows = []
    for number, item in enumerate(demo.held_out(count)):
        item.picture.save(folder / f"{number}.png")
        rows.append({"id": f"q{number}", "prompt": item.question, "images": [f"{number}.png"]})
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _arguments(asked: Path, out: Path, size: int) -> list[str]:
    return ["run", str(demo.folder()), "--in", str(asked), "--out", str(out), "--batch-size", str(size), *_METHOD]


def _run(asked: Path, out: Path, size: int = 4) -> tuple[int, list[dict]]:
    found = CliRunner().invoke(app, _arguments(asked, out, size))
    rows = [json.loads(row) for row in out.read_text().splitlines()] if out.exists() else []
    return found.exit_code, sorted(rows, key=lambda row: row["line"])


def test_batches_answer_as_one_by_one(tmp_path: Path) -> None:
    asked = _questions(tmp_path, 7)
    assert _run(asked, tmp_path / "many.jsonl", 3) == (0, (alone := _run(asked, tmp_path / "one.jsonl", 1))[1])
    assert [row["id"] for row in alone[1]] == [f"q{n}" for n in range(7)]
    assert all(row["answer"] and row["tokens_before"] == 196 and row["tokens_after"] == 98 for row in alone[1])


def test_a_bad_line_is_an_error_in_the_output(tmp_path: Path) -> None:
    asked, out = _questions(tmp_path, 3), tmp_path / "out.jsonl"
    (tmp_path / "torn.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    bad = ['{"prompt": "x", "images": ["gone.png"]}', '{"prompt": "x", "images": ["torn.png"]}', "{", "[]"]
    bad += ['{"prompt": "x", "image": "0.png"}', '{"prompt": 3}', '{"prompt": "x", "images": "0.png"}']
    asked.write_text("\n".join([*bad, asked.read_text()]))
    code, rows = _run(asked, out)
    assert code == 1
    assert ["error" in row for row in rows] == [True] * 7 + [False] * 3
    reasons = ("no file", "no picture", "no JSON", "object", "Did you mean", "text", "list")
    for row, words in zip(rows[:7], reasons, strict=True):
        assert words in row["error"]


def test_killed_in_the_middle_then_resumed(tmp_path: Path) -> None:
    asked, out = _questions(tmp_path, 40), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "mllm_squeeze.cli", *_arguments(asked, out, 2)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while (not out.exists() or out.read_bytes().count(b"\n") < 6) and time.monotonic() < end:
        assert running.poll() is None
        time.sleep(0.005)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = out.read_bytes()
    assert 6 <= before.count(b"\n") < 40
    out.write_bytes(before + b'{"line": 39, "key": "ab')
    code, rows = _run(asked, out, 2)
    assert code == 0 and [row["line"] for row in rows] == list(range(1, 41))
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert _run(asked, out, 2) == (0, rows)
    assert rows == _run(asked, tmp_path / "whole.jsonl", 2)[1]


def test_a_file_of_other_answers_is_refused_and_stays(tmp_path: Path) -> None:
    asked, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    asked.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with lines.answers(out, lines.read(asked), "one") as found:
        found.write(lines.read(asked)[0], answer="x")
    for text, settings in (
        (out.read_text(), "other"),
        ("my notes", "one"),
        ("{}\n", "one"),
        (out.read_text() * 2, "one"),
    ):
        out.write_text(text)
        with pytest.raises(ConfigError, match="--out|twice"), lines.answers(out, lines.read(asked), settings):
            pass
        assert out.read_text() == text


def test_one_process_writes(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no file locks on this system")
    with (
        lines.answers(tmp_path / "out.jsonl", [], ""),
        pytest.raises(InUseError, match="Another process"),
        lines.answers(tmp_path / "out.jsonl", [], ""),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either --prompt"),
        (["--prompt", "x", "--in", "a"], "either --prompt"),
        (["--in", "a"], "go together"),
        (["--in", "a", "--out", "b", "--image", "c"], "belong to --prompt"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], words: str) -> None:
    found = CliRunner().invoke(app, ["run", "nowhere", "--method", "fastv", *arguments])
    assert found.exit_code == 2 and words in " ".join(found.output.split())


class _Forgetful:
    """Answers with the question itself, and fails where one of a batch is "bad"."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def ask(self, questions: Sequence[lines.Question]) -> list[dict[str, str]]:
        self.sizes.append(len(questions))
        if any(one.prompt == "bad" for one in questions):
            raise RuntimeError("out of memory")
        return [{"answer": one.prompt} for one in questions]


def test_a_batch_that_fails_is_asked_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("one", "bad", "three")))
    monkeypatch.setattr(offline, "_measured", lambda asker, line: offline._Pending(line, line.question(), 5))
    asker: Any = _Forgetful()
    found = lines.read(asked)
    with lines.answers(tmp_path / "answers.jsonl", found, "") as out:
        assert offline.answer(asker, found, out, 4, lambda text: None) == 1
    assert asker.sizes == [3, 1, 1, 1]
    rows = [json.loads(row) for row in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row.get("answer") for row in rows] == ["one", None, "three"]
    assert rows[1]["error"] == "RuntimeError: out of memory"
