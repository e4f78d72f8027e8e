"""Where spans are found in a prompt, and the table of their tokens, against a walk from token to token."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.engine.tokens.spans import find_layout
from mllm_squeeze.engine.tokens.table import first_table
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.layout import Tile, TokenLayout

IMAGE, TEXT = 9, 5
SQUARE = Tile(1, 2, 2)
# Newlines behind each row, a CLS token in front of each frame, tokens behind the last row, several frames.
TILES = [
    (SQUARE,),
    (Tile(1, 2, 3, row_separators=1), Tile(1, 1, 4)),
    (Tile(3, 2, 2, frame_lead=1, tail=2),),
    (Tile(2, 1, 3, row_separators=2, frame_lead=2, tail=1), SQUARE, SQUARE),
    (),
]


def features(*lengths: int, tiles: tuple[tuple[Tile, ...], ...] | None = None) -> Features:
    return Features("image", lengths, ((),) * len(lengths) if tiles is None else tiles)


def find(rows: list[list[int]], found: Features, grouped: bool = False) -> TokenLayout:
    return find_layout(torch.tensor(rows), None, {"image": found}, {"image": IMAGE}, ("image",) if grouped else ())


def told(layout: TokenLayout) -> list[tuple[int, int, tuple[tuple[int, int], ...]]]:
    return [(span.sample, span.item, span.runs) for span in layout.spans]


def test_neighbours_are_told_apart_by_their_lengths() -> None:
    layout = find([[IMAGE] * 5 + [TEXT] * 3, [TEXT, *[IMAGE] * 4, TEXT, *[IMAGE] * 2]], features(2, 3, 4, 2))
    assert told(layout) == [(0, 0, ((0, 2),)), (0, 1, ((2, 3),)), (1, 2, ((1, 4),)), (1, 3, ((6, 2),))]


def test_text_inside_a_span_breaks_its_run() -> None:
    layout = find([[IMAGE, IMAGE, TEXT, IMAGE, TEXT, IMAGE, IMAGE, IMAGE]], features(4, 2))
    assert told(layout) == [(0, 0, ((0, 2), (3, 1), (5, 1))), (0, 1, ((6, 2),))]
    assert first_table(layout, torch.device("cpu")).place.tolist() == [[0, 1, 3, 5], [6, 7, 0, 0]]


def test_an_item_without_tokens_is_no_span() -> None:
    layout = find([[TEXT] * 3, [TEXT, IMAGE, IMAGE]], features(0, 2))
    assert told(layout) == [(1, 1, ((1, 2),))]


def test_beams_repeat_the_items_of_a_row() -> None:
    rows = [[IMAGE, IMAGE, TEXT, IMAGE]] * 2 + [[TEXT, TEXT, TEXT, IMAGE]] * 2
    layout = find(rows, features(2, 1, 1))
    assert [(span.sample, span.item) for span in layout.spans] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (3, 2)]


def test_each_run_is_an_item_where_lengths_are_not_told() -> None:
    rows = [[TEXT, IMAGE, IMAGE, TEXT, IMAGE], [IMAGE, TEXT, TEXT, TEXT, TEXT]]
    layout = find(rows, Features("image", None))
    assert told(layout) == [(0, 0, ((1, 2),)), (0, 1, ((4, 1),)), (1, 2, ((0, 1),))]


def test_tiles_without_text_between_them_are_one_picture() -> None:
    found = features(4, 4, 4, tiles=((SQUARE,),) * 3)
    layout = find([[*[IMAGE] * 8, TEXT, *[IMAGE] * 4]], found, grouped=True)
    assert [(span.item, span.items, span.runs) for span in layout.spans] == [(0, 2, ((0, 8),)), (2, 1, ((9, 4),))]


@pytest.mark.parametrize("lengths", [(3,), (2, 3)])
def test_a_picture_in_two_prompts_is_refused(lengths: tuple[int, ...]) -> None:
    placeholders = sum(lengths)
    rows = [[TEXT, *[IMAGE] * (placeholders - 1)], [IMAGE, *[TEXT] * (placeholders - 1)]]
    with pytest.raises(UnsupportedInputError, match=f"item {len(lengths) - 1} has placeholders in samples 0 to 1"):
        find(rows, features(*lengths))


@pytest.mark.parametrize("count", [0, 3])
def test_placeholders_that_do_not_match_are_refused(count: int) -> None:
    with pytest.raises(UnsupportedInputError, match=f"holds {count} image placeholders, the encoder gave 2 tokens"):
        find([[*[IMAGE] * count, TEXT]], features(2))


def test_the_table_says_what_the_tiles_say() -> None:
    lengths = [sum(tile.length for tile in tiles) or 7 for tiles in TILES]
    ids = [[token for length in lengths for token in [*[IMAGE] * length, TEXT]]]
    layout = find(ids, features(*lengths, tiles=tuple(TILES)))
    table = first_table(layout, torch.device("cpu"))
    assert table.current == tuple(lengths)
    assert table.mask.sum(1).tolist() == lengths
    for row, (span, tiles) in enumerate(zip(layout.spans, TILES, strict=True)):
        length = span.length
        walked = [(n, *cell) if cell[0] >= 0 else (-1,) * 4 for n, t in enumerate(tiles) for cell in t.coordinates()]
        assert table.grid[row, :length].tolist() == ([list(cell) for cell in walked] or [[-1] * 4] * length)
        assert (table.grid[row, length:] == -1).all()
        assert table.place[row, :length].tolist() == list(span.columns)
        assert table.origin[row, :length].tolist() == list(range(length))
    assert all(one.start < other.start for one, other in pairwise(layout.spans))


def test_tokens_that_the_mask_hides_are_no_part_of_a_span() -> None:
    ids = torch.tensor([[TEXT, *[IMAGE] * 6, TEXT, *[IMAGE] * 4], [*[IMAGE] * 4, TEXT, *[IMAGE] * 4, TEXT, TEXT, TEXT]])
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, [2, 3, 7, 10]] = False
    real[1, 5:9] = False
    found = features(6, 4, 4, 4, tiles=((Tile(1, 2, 3),), (SQUARE,), (SQUARE,), (SQUARE,)))
    layout = find_layout(ids, real, {"image": found}, {"image": IMAGE}, ())
    assert told(layout) == [(0, 0, ((1, 1), (4, 3))), (0, 1, ((8, 2), (11, 1))), (1, 2, ((0, 4),))]
    assert [span.length for span in layout.spans] == [4, 3, 4]
    assert [span.tiles for span in layout.spans] == [(), (), (SQUARE,)]
    table = first_table(layout, torch.device("cpu"))
    assert table.current == (4, 3, 4)
    rows = [origin[mask].tolist() for origin, mask in zip(table.origin, table.mask, strict=True)]
    assert rows == [[0, 3, 4, 5], [0, 1, 3], [0, 1, 2, 3]]
    columns = [place[mask].tolist() for place, mask in zip(table.place, table.mask, strict=True)]
    assert columns == [[1, 4, 5, 6], [8, 9, 11], [0, 1, 2, 3]]
    assert not layout.visual[~real].any()
