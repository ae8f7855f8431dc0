import random

from tokenpacker.scenes import fine_print
from tokenpacker.scenes.dense_labels import HEAD_INDEX, HEADS, UNKNOWN, label_tiles
from tokenpacker.scenes.scene import Item, Scene
from tokenpacker.tiling import TileGrid, choose_tile_grid

TILE = (96, 96)


def scene_of(*items: Item, size: int = 96) -> Scene:
    return Scene(height=size, width=size, background=(255, 255, 255), items=items)


def word(box, text="cat", **kwargs) -> Item:
    return Item(kind="word", text=text, color="red", rgb=(255, 0, 0), box=box, font_size=16, **kwargs)


def named(labels, head, row, column):
    value = int(labels[HEAD_INDEX[head], row, column])
    return None if value == 0 else "unknown" if value == UNKNOWN else HEADS[head][value - 1]


def test_the_patches_of_a_word_say_word_color_and_letters():
    (labels,) = label_tiles(scene_of(word((16, 16, 40, 32))), TileGrid(1, 1), TILE, 8)
    assert named(labels, "word", 2, 3) == "cat"
    assert named(labels, "color", 3, 4) == "red"
    assert named(labels, "left", 2, 2) == "c"
    assert named(labels, "right", 2, 4) == "t"
    assert named(labels, "word", 2, 6) is None


def test_a_framed_number_labels_its_whole_box():
    number = Item(
        kind="number", text="42", color="blue", rgb=(0, 0, 255), box=(24, 24, 40, 40), font_size=16,
        frame="red", frame_box=(16, 16, 48, 48),
    )  # fmt: skip
    (labels,) = label_tiles(scene_of(number), TileGrid(1, 1), TILE, 8)
    assert (named(labels, "frame", 2, 2), named(labels, "tens", 2, 2), named(labels, "ones", 5, 5)) == ("red", "4", "2")


def test_a_word_cut_by_a_tile_border_counts_once_and_is_named_where_enough_is_visible():
    mostly_left = scene_of(word((60, 16, 108, 32)), size=192)  # 36 of 48 pixels in the left tile
    labels = label_tiles(mostly_left, TileGrid(2, 2), TILE, 8)
    assert named(labels[0], "word", 2, 9) == "cat"
    assert named(labels[1], "word", 2, 0) == "unknown"
    anchors = (labels[:4, HEAD_INDEX["anchor"]] > 0).sum(dim=(1, 2))
    assert anchors.tolist() == [1, 0, 0, 0]


def test_thumbnails_promise_no_reading():
    labels = label_tiles(scene_of(word((60, 16, 108, 32)), size=192), TileGrid(2, 2), TILE, 8)
    thumbnail = labels[-1]
    assert named(thumbnail, "kind", 1, 4) == "word"
    assert named(thumbnail, "word", 1, 4) == "unknown"
    assert not thumbnail[HEAD_INDEX["anchor"]].any()


def test_every_object_of_a_scene_has_one_anchor_among_the_tiles_without_the_thumbnail():
    for seed in range(10):
        scene = fine_print.make_scene(random.Random(seed))
        grid = choose_tile_grid((scene.height, scene.width), TILE)
        labels = label_tiles(scene, grid, TILE, 8)[: grid.rows * grid.cols]
        assert int((labels[:, HEAD_INDEX["anchor"]] > 0).sum()) == len(scene.items)
