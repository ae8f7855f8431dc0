"""Pictures of conversations about regions."""

import numpy as np

from tokenpacker.visualize.conversation_page import LINE, draw_conversation


def differing(one, other) -> int:
    return int((np.asarray(one) != np.asarray(other)).any(axis=2).sum())


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
