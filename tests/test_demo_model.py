"""The pictures, the questions, the trained model in the box, and the script that trains it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from mllm_squeeze import demo
from mllm_squeeze.demo import build, pack, pictures, questions, train
from mllm_squeeze.demo.tower import labels, see


@pytest.fixture(scope="module")
def boxed() -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(demo.folder(), dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(demo.folder())


def scenes(count: int, seed: int = 5) -> list[pictures.Scene]:
    rng = np.random.default_rng(seed)
    return [pictures.draw(rng)[1] for _ in range(count)]


def test_same_seed_same_pictures_and_questions() -> None:
    one, two, other = (list(demo.held_out(6, seed)) for seed in (3, 3, 4))
    assert [item.question for item in one] == [item.question for item in two] != [item.question for item in other]
    assert all(a.picture.tobytes() == b.picture.tobytes() for a, b in zip(one, two, strict=True))
    assert one[0].picture.tobytes() != other[0].picture.tobytes()


def test_boxes_lie_in_the_picture_and_do_not_overlap() -> None:
    for scene in scenes(100):
        assert pictures.MANY[0] <= len(scene.things) <= pictures.MANY[1]
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= pictures.SIDE and 0 <= top < bottom <= pictures.SIDE
        for one, two in combinations(scene.things, 2):
            a, b = one.box, two.box
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_a_box_holds_the_colour_of_its_thing() -> None:
    picture, scene = pictures.draw(np.random.default_rng(8))
    pixels = np.asarray(picture).astype(int)
    for thing in scene.things:
        left, top, right, bottom = thing.box
        off = np.abs(pixels[top:bottom, left:right] - pictures.COLOURS[thing.colour]).max(-1)
        assert (off <= 8).mean() > 0.2


def test_patches_are_those_under_the_box() -> None:
    for scene in scenes(20):
        for index, thing in enumerate(scene.things):
            left, top, right, bottom = thing.box
            rows = range(top // pictures.PATCH, (bottom - 1) // pictures.PATCH + 1)
            columns = range(left // pictures.PATCH, (right - 1) // pictures.PATCH + 1)
            under = {row * pictures.GRID + column for row in rows for column in columns}
            patches = scene.patches(index)
            assert 1 <= len(patches) <= 9 and set(patches) <= under


def named_in(text: str, options: Any) -> list[str]:
    found = text.lower().strip("?.").split()
    return [word for word in options if word in found]


def expected(scene: pictures.Scene, text: str, kind: str) -> str:
    """The answer, worked out from the words of the question alone."""
    plurals = {"crosses" if shape == "cross" else shape + "s": shape for shape in pictures.SHAPES}
    colours, digits = named_in(text, pictures.COLOURS), named_in(text, pictures.DIGITS)
    shapes = named_in(text, pictures.SHAPES) + [plurals[word] for word in named_in(text, plurals)]
    fitting = [
        thing
        for thing in scene.things
        if thing.colour in (colours or [thing.colour])
        and thing.shape in (shapes or [thing.shape])
        and thing.digit in (digits or [thing.digit])
    ]
    if kind == "count":
        return str(len(fitting))
    assert len(fitting) == 1, text
    if kind == "place":
        left, top, right, bottom = fitting[0].box
        column = ("left", "", "right")[int((left + right) / 2 // (pictures.SIDE / 3))]
        row = ("top", "", "bottom")[int((top + bottom) / 2 // (pictures.SIDE / 3))]
        return "-".join(word for word in (row, column) if word) or "centre"
    return str(getattr(fitting[0], kind))


def test_answers_follow_from_the_scene() -> None:
    rng = np.random.default_rng(11)
    kinds = set()
    for scene in scenes(60):
        for question in demo.ask(scene, rng, 12):
            assert question.answer == expected(scene, question.text, question.kind), question
            kinds.add(question.kind)
    assert kinds == set(questions.KINDS)


def test_every_word_is_in_the_vocabulary() -> None:
    tokens = build.tokenizer()
    rng = np.random.default_rng(12)
    for scene in scenes(20):
        for question in demo.ask(scene, rng, 20):
            ids = tokens(f"{question.text} {question.answer}")["input_ids"]
            assert tokens.unk_token_id not in ids
            assert len(tokens(question.answer)["input_ids"]) == 1


def test_packed_questions_read_like_chats(boxed: tuple[Any, Any]) -> None:
    model, processor = boxed
    painted = pack.paint(np.random.default_rng(3), 2, (5, 9))
    batch = pack.pack(painted.scenes, processor.tokenizer, np.random.default_rng(4), 3)
    again = np.random.default_rng(4)
    texts = [demo.prompt(processor, q.text) for scene in painted.scenes for q in demo.ask(scene, again, 3)]
    with torch.no_grad():
        features = see(model, painted.pixels)
        tower = model.model.vision_tower(painted.pixels, output_hidden_states=True)
        torch.testing.assert_close(features, tower.hidden_states[model.config.vision_feature_layer])
        _, right = train.answer_loss(model, batch, features[:, 1:], processor.tokenizer.eos_token_id)
        for row, text in enumerate(texts):
            pixels = painted.pixels[row // 3][None]
            ids = processor.tokenizer(text.replace("<image>", "<image>" * pack.TOKENS), return_tensors="pt")
            word = model(**ids, pixel_values=pixels).logits[0, -1].argmax()
            assert bool(word == batch.answers.flatten()[row]) == bool(right.flatten()[row])


def test_the_model_answers(boxed: tuple[Any, Any]) -> None:
    scores = demo.accuracy(*boxed, demo.held_out(100, seed=21))
    assert set(scores) <= {"overall", *questions.KINDS}
    assert scores["overall"] >= 0.95, scores


def test_a_png_of_the_right_size_is_not_resampled(boxed: tuple[Any, Any], tmp_path: Any) -> None:
    from PIL import Image

    _, processor = boxed
    item = next(demo.held_out(1, seed=2))
    item.picture.save(tmp_path / "picture.png")
    text = demo.prompt(processor, item.question)
    inputs = processor(images=Image.open(tmp_path / "picture.png"), text=text, return_tensors="pt")
    straight = (np.asarray(item.picture, dtype=np.float32) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(inputs["pixel_values"][0].permute(1, 2, 0), straight, atol=1e-5)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == pictures.GRID**2


def test_padded_batch_gives_the_logits_of_single_prompts(boxed: tuple[Any, Any]) -> None:
    model, processor = boxed
    items = list(demo.held_out(5, seed=6))
    texts = [demo.prompt(processor, item.question) for item in items]
    together = processor(images=[item.picture for item in items], text=texts, padding=True, return_tensors="pt")
    assert (together["attention_mask"] == 0).any() and together["attention_mask"][:, -1].all()
    with torch.no_grad():
        logits = model(**together).logits[:, -1]
        for row, (item, text) in enumerate(zip(items, texts, strict=True)):
            single = model(**processor(images=item.picture, text=text, return_tensors="pt")).logits[0, -1]
            torch.testing.assert_close(logits[row], single, atol=1e-4, rtol=0)


def test_a_chat_of_several_turns_runs(boxed: tuple[Any, Any]) -> None:
    model, processor = boxed
    item = next(demo.held_out(1, seed=7))
    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": item.answer}]}
    second = {"role": "user", "content": [{"type": "text", "text": "Count the stars."}]}
    text = processor.apply_chat_template([first, reply, second], add_generation_prompt=True)
    inputs = processor(images=item.picture, text=text, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert written.shape[1] > inputs["input_ids"].shape[1]


def test_labels_agree_with_the_scene() -> None:
    for scene in scenes(5):
        dense, counts = labels(scene)
        assert counts.sum() == 4 * len(scene.things)
        for index, thing in enumerate(scene.things):
            for patch in scene.patches(index):
                assert dense[0, patch] == list(pictures.COLOURS).index(thing.colour) + 1


def test_a_deeper_model_answers_as_before(boxed: tuple[Any, Any]) -> None:
    model, processor = boxed
    deeper = train.deepen(model).eval()
    assert len(deeper.model.language_model.layers) == len(model.model.language_model.layers) + 1
    item = next(demo.held_out(1, seed=9))
    inputs = processor(images=item.picture, text=demo.prompt(processor, item.question), return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(deeper(**inputs).logits, model(**inputs).logits)


def test_a_small_run_trains_saves_and_lowers_the_loss(tmp_path: Any) -> None:
    plan = train.Plan(tower_steps=8, tower_batch=2, tower_rate=3e-3, batch=2, questions=4, every=6)
    model = build.model(build.config(width=32, tower_layers=3, layers=2))
    seen = train.train_tower(model, plan)
    assert seen[-1] < seen[0]
    before = model.model.vision_tower.state_dict()["embeddings.class_embedding"].clone()
    losses = train.train_answers(model, plan, replace(train.ANSWERS, steps=12, rate=3e-3))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert torch.equal(before, model.model.vision_tower.state_dict()["embeddings.class_embedding"])
    train.save(model, tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
