"""Pictures of conversations about regions."""

import numpy as np

from tokenpacker.visualize.conversation_page import LINE, SIDE, draw_conversation


def differing(one, other) -> int:
    return int((np.asarray(one) != np.asarray(other)).any(axis=2).sum())


def test_regions_that_begin_at_one_place_are_all_numbered(image_of):
    images, box = [image_of(40, 60)], (10.0, 12.0, 30.0, 30.0)
    one, two, three = (draw_conversation(images, [(0, box)] * times, []) for times in (1, 2, 3))
    outside = np.s_[:, : 36 + int(8 * SIDE / 60)]  # left of the tint, where the numbers reach to
    assert differing(np.asarray(one)[outside], np.asarray(two)[outside]) > 0
    assert differing(np.asarray(two)[outside], np.asarray(three)[outside]) > 0


def test_a_thin_image_has_room_for_a_number(image_of):
    page = draw_conversation([image_of(1, 500)], [(0, (100.0, 0.0, 300.0, 1.0))], [])
    plain = draw_conversation([image_of(1, 500)], [], [])
    assert page.height == plain.height > LINE
    assert differing(page, plain) > 200 * LINE // 2


def test_every_mark_of_the_words_bears_its_number(image_of):
    said = [(True, "is <mask> like <mask>?"), (False, "no")]
    one = draw_conversation([image_of(20, 20)], [], said)
    other = draw_conversation([image_of(20, 20)], [], [(True, "is [1] like [2]?"), (False, "no")])
    assert differing(one, other) == 0
