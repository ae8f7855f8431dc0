"""What the server keeps of a conversation: messages, images and regions, in memory alone.

Images are kept as the bytes that were sent, under keys that never leave the server. So no request can name a file or
another person's image.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any, Literal

from PIL import Image, ImageDraw

from tokenpacker.hf.regions.masks import read_mask
from tokenpacker.images import load_image
from tokenpacker.router import ScaleFactor
from tokenpacker.serve.picture_sources import PictureError
from tokenpacker.serve.questions import Question, Sampling

KEPT_BYTES, KEPT_S = 512 * 2**20, 24 * 3600.0
Budget = tuple["ScaleFactor | None", int]  # scale factor and most tokens of an image


class ByteStore:
    """Bytes under keys that cannot be guessed. Safe to use from many threads.

    Args:
        max_bytes: held at most; what was not used for longest goes first.
        keep_s: seconds since the last use.
    """

    def __init__(self, max_bytes: int = KEPT_BYTES, keep_s: float = KEPT_S):
        self.max_bytes, self.keep_s = max_bytes, keep_s
        self.bytes = 0
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._lock = Lock()

    def put(self, content: bytes) -> str:
        """Keeps bytes and returns their key."""
        key = secrets.token_urlsafe(24)
        with self._lock:
            self._kept[key] = time.monotonic(), content
            self.bytes += len(content)
            self._drop()
        return key

    def get(self, key: str) -> bytes | None:
        """The bytes of a key; None if they are not kept any more."""
        with self._lock:
            self._drop()
            if key not in self._kept:
                return None
            _, content = self._kept.pop(key)
            self._kept[key] = time.monotonic(), content
            return content

    def _drop(self) -> None:
        oldest = time.monotonic() - self.keep_s
        while self._kept and (self.bytes > self.max_bytes or next(iter(self._kept.values()))[0] < oldest):
            _, (_, content) = self._kept.popitem(last=False)
            self.bytes -= len(content)


@dataclass(frozen=True)
class Picture:
    """An image of a session.

    Args:
        key: of its file in the store.
        preview: a small copy as a data address.
    """

    key: str
    width: int
    height: int
    preview: str

    def load(self, store: ByteStore) -> Image.Image:
        """The image, upright, in RGB. Raises PictureError if it is not kept any more."""
        content = store.get(self.key)
        if content is None:
            raise PictureError("an image of this conversation is not kept any more; start a new one and add it again")
        return load_image(content)


@dataclass
class Region:
    """What one `<mask>` stands for.

    Args:
        image: index of its image.
        points: x and y in pixels: two corners of a box, an outline, the path of a brush; of a mask its bounds.
        width: of the brush.
        key: of the mask's file in the store.
    """

    image: int
    form: Literal["box", "polygon", "brush", "mask"]
    points: list[tuple[float, float]]
    width: float = 0.0
    key: str = ""

    def to_processor(self, picture: Picture, store: ByteStore) -> dict[str, Any]:
        """The region as the processor takes it. Raises PictureError for a mask that is not kept any more."""
        if self.form == "box":
            (x0, y0), (x1, y1) = self.points
            return {"box": [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]}
        if self.form == "polygon":
            return {"polygon": [[number for point in self.points for number in point]]}
        if self.form == "mask":
            content = store.get(self.key)
            if content is None:
                raise PictureError("a mask is not kept any more; add it again")
            return {"mask": read_mask(content)}  # type: ignore[arg-type]
        import numpy as np

        drawn = Image.new("1", (picture.width, picture.height))
        draw, radius = ImageDraw.Draw(drawn), self.width / 2
        draw.line(self.points, 1, round(self.width), "curve")
        for x, y in self.points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), 1)
        return {"mask": np.asarray(drawn)}


@dataclass
class Turn:
    """A question with the images and regions that came with it, and its answers, one for each budget."""

    question: str
    num_images: int
    regions: list[Region]
    answers: list[str]


@dataclass
class Session:
    """A conversation. It belongs to one browser tab.

    Attributes:
        regions: of the question that is being written.
        shown: index of the image on the page.
        asking: whether an answer is under way; None asks it to stop.
    """

    pictures: list[Picture] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    shown: int = 0
    asking: bool | None = False

    @property
    def num_asked(self) -> int:
        """Images that a question was asked about: the first ones."""
        return sum(turn.num_images for turn in self.turns)

    def question(self, turn: Turn, lane: int, budget: Budget, store: ByteStore, max_tokens: int) -> Question:
        """The conversation so far and a new turn, as a question.

        Args:
            lane: whose answers are continued, 0 or 1; before there was a second one, the first's are.

        Raises:
            ValueError: for images and masks that are not kept any more or cannot be read.
        """
        turns, pictures = [*self.turns, turn], self.pictures[: self.num_asked + turn.num_images]
        messages: list[dict[str, Any]] = []
        for each in turns:
            content = [{"type": "image"}] * each.num_images + [{"type": "text", "text": each.question}]
            messages.append({"role": "user", "content": content})
            if each is not turn:
                answer = each.answers[min(lane, len(each.answers) - 1)]
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        regions = [region for each in turns for region in each.regions]
        return Question(
            messages=tuple(messages),
            images=tuple(picture.load(store) for picture in pictures),
            regions=tuple((part.image, part.to_processor(pictures[part.image], store)) for part in regions),
            scale_factor=budget[0],
            max_image_tokens=budget[1],
            sampling=Sampling(temperature=0, max_tokens=max_tokens),
        )

    def save(self, settings: Sequence[Any], store: ByteStore) -> str:
        """Keeps a copy of the session and returns its key. Later turns do not change the copy."""
        kept = {"settings": list(settings), "session": asdict(self) | {"asking": False}}
        return store.put(json.dumps(kept).encode())


def restore(key: str, store: ByteStore) -> tuple[Session, list[Any]] | None:
    """A session and its settings as `Session.save` kept them; None if they are not kept any more."""
    content = store.get(key)
    if content is None:
        return None
    try:
        kept = json.loads(content)
    except ValueError:  # the key of an image
        return None
    values = kept["session"]
    turns = [Turn(**turn | {"regions": [Region(**part) for part in turn["regions"]]}) for turn in values["turns"]]
    pictures, regions = [Picture(**part) for part in values["pictures"]], [Region(**part) for part in values["regions"]]
    return Session(pictures, turns, regions, values["shown"]), kept["settings"]
