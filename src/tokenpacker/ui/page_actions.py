"""What the events of the page do to a session. Without gradio; `chat_page` connects them with components."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from html import escape
from threading import BoundedSemaphore
from typing import Any

from PIL import Image

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.hf.regions.masks import mark_region
from tokenpacker.images import open_image
from tokenpacker.projectors import config_from_dict
from tokenpacker.router import AUTO
from tokenpacker.scenes import FinePrint, Regions
from tokenpacker.serve.limits import Limits
from tokenpacker.serve.picture_sources import PictureError, check_picture_file, read_address, read_pictures
from tokenpacker.serve.questions import Engine, Prepared
from tokenpacker.ui.sessions import Budget, ByteStore, Picture, Region, Session, Turn
from tokenpacker.ui.streaming import Growing, stream
from tokenpacker.ui.token_view import Explainer, data_address, draw_grid, plan
from tokenpacker.visualize import PackedImage

MARK = "<mask>"
MAX_TOKENS = 512  # of an answer
MAX_REGIONS, MAX_POINTS = 32, 5000  # of a conversation; of a region
MAX_PAINTED, MAX_LENGTH = 500_000_000, 5_000_000  # pixels of a stroke, overlaps included; length of a line
MASK_SHARE = 4  # what masks of a conversation may cover, in pixels of its images
PREPARING, PREPARING_S = 2, 20.0  # questions whose images and masks are held at once; seconds that others wait
EXAMPLES = {"test": (3, 11), "regions": (0, 2)}  # of the test scenes


def _drawn(points: Any, width: Any, picture: Picture) -> tuple[list[tuple[float, float]], float]:
    """Points and a brush's width as numbers that the image can have: points far outside move to a width from its edge.

    Raises:
        PictureError: for what is no number.
    """
    try:
        places, width = [(float(x), float(y)) for x, y in points], float(width)
    except (TypeError, ValueError, OverflowError):
        places, width = [], math.nan
    if not all(map(math.isfinite, (width, *(number for place in places for number in place)))):
        raise PictureError("this region has no place in the image; draw another")
    width = min(max(1.0, width), max(picture.width, picture.height))
    right, bottom = picture.width + width, picture.height + width
    return [(min(max(x, -width), right), min(max(y, -width), bottom)) for x, y in places], width


def _check_effort(places: Sequence[tuple[float, float]], form: str, width: float) -> None:
    """Raises PictureError for a region that takes seconds to draw."""
    length = sum(map(math.dist, places, places[1:]))
    painted = width * (length + width * len(places)) if form == "brush" else 0
    if length > MAX_LENGTH or painted > MAX_PAINTED:
        raise PictureError("this region is too long to be drawn; draw a shorter one, or a box")


def check_idle(session: Session) -> None:
    """Raises PictureError while an answer is under way."""
    if session.asking is not False:
        raise PictureError("an answer is under way; stop it, or wait")


@dataclass(frozen=True, kw_only=True)
class PageActions:
    """The actions of all sessions. They may be called from many threads.

    Args:
        model: that of the engine; it explains tokens.
    """

    engine: Engine
    model: TokenPackerForConditionalGeneration
    processor: TokenPackerProcessor
    limits: Limits = field(default_factory=Limits)
    store: ByteStore = field(default_factory=ByteStore)
    _preparing: BoundedSemaphore = field(init=False, default_factory=lambda: BoundedSemaphore(PREPARING))

    @cached_property
    def explainer(self) -> Explainer:
        """Explains tokens."""
        return Explainer(self.model, self.processor, self.store)

    @property
    def marking(self) -> bool:
        """Whether the model has regions."""
        return self.processor.region_token_id is not None

    @cached_property
    def scale_factors(self) -> list[int]:
        """The scale factors that the projector can have, from 1; its own where it has none else."""
        config, found = config_from_dict(self.processor.projector_config), []
        for factor in range(1, max(self.processor.patch_grid) + 1):
            with suppress(ValueError):
                config.token_grid((self.processor.patch_grid[0], self.processor.patch_grid[1]), factor)
                found.append(factor)
        return found

    @cached_property
    def budgets(self) -> tuple[int, int]:
        """The least and the most tokens that an image may have."""
        least = self.processor.image_layout((1, 1), scale_factor=max(self.scale_factors, default=None)).num_tokens
        most = self.processor.image_layout((1, 1), scale_factor=min(self.scale_factors, default=None)).num_tokens
        return least, (most + 1) * (self.processor.image_processor.max_tiles + 1)

    @cached_property
    def own_scale_factor(self) -> int:
        """The scale factor that the slider begins with."""
        return plan(self.processor, Image.new("RGB", (1, 1)), (None, self.budgets[1])).scale_factors[0]

    # Images and regions

    def add(self, session: Session, addresses: Sequence[str]) -> str:
        """Adds images in data addresses. Of several, those that can be used are added, and the others are named.

        Returns:
            What the reader should know, or "".

        Raises:
            ValueError: if none can be used, and for too many.
        """
        if len(session.pictures) + len(addresses) > self.limits.images:
            raise PictureError(f"a conversation has at most {self.limits.images} images; start a new one")
        notes, errors = [], []
        for number, address in enumerate(addresses, start=1):
            try:
                picture, is_animated = self._picture(session, address)
            except ValueError as error:
                errors.append(error)
                notes.append(f"File {number} of {len(addresses)} is left out: {str(error).rstrip('.')}.")
                continue
            session.pictures.append(picture)
            session.shown = len(session.pictures) - 1
            if is_animated:
                notes.append("Of an animated image the first frame is used.")
        if len(errors) == len(addresses) and errors:
            raise errors[0]
        return " ".join(dict.fromkeys(notes))

    def _picture(self, session: Session, address: str) -> tuple[Picture, bool]:
        """A picture that has a place in the conversation, and whether it is animated."""
        (image,) = read_pictures([address], (), self.limits)
        pixels = sum(picture.width * picture.height for picture in session.pictures) + image.width * image.height
        if pixels > self.limits.request_pixels:
            raise PictureError(
                f"the images of a conversation have at most {self.limits.request_pixels:,} pixels; shrink them"
            )
        content = read_address(address, (), self.limits)
        with open_image(content) as (_, file):
            is_animated = bool(getattr(file, "is_animated", False))
        return self._keep(image, content), is_animated

    def _keep(self, image: Image.Image, content: bytes) -> Picture:
        return Picture(self.store.put(content), image.width, image.height, data_address(image))

    def mark(self, session: Session, form: str, points: Any = (), width: float = 1, data: str = "") -> None:
        """Adds a region of the image that is shown.

        Args:
            data: of a mask, the address of its file.

        Raises:
            ValueError: for a region that cannot be used.
        """
        picture = session.pictures[session.shown]
        if not self.marking or form not in ("box", "polygon", "brush", "mask") or len(points) > MAX_POINTS:
            raise PictureError("this region cannot be used; draw a simpler one")
        places, width = _drawn(points, width, picture)
        _check_effort(places, form, width)
        if form == "box" and len(places) != 2:
            raise PictureError(f"a box has two corners, not {len(places)}; draw another")
        self._check_room(session, form)
        key = ""
        if form == "mask":
            content = read_address(data, (), self.limits)
            check_picture_file(content, self.limits)
            key = self.store.put(content)
        region = Region(session.shown, form, places, width, key)  # type: ignore[arg-type]
        marked = mark_region(region.to_processor(picture, self.store), (picture.height, picture.width))
        if form == "mask":
            top, left, bottom, right = marked.bounds
            region.points = [(left, top), (right, bottom)]
        session.regions.append(region)

    def _check_room(self, session: Session, form: str) -> None:
        """Raises PictureError if a question would hold too many masks: each takes a byte for a pixel of its image."""
        regions = [region for turn in session.turns for region in turn.regions] + session.regions
        if len(regions) >= MAX_REGIONS:
            raise PictureError(f"a conversation has at most {MAX_REGIONS} regions; clear those of this question")
        images = [region.image for region in regions if region.form != "box"] + [session.shown]
        covered = sum(session.pictures[image].width * session.pictures[image].height for image in images)
        most = MASK_SHARE * self.limits.request_pixels
        if form != "box" and covered > most:
            raise PictureError(f"the drawn regions of a conversation cover at most {most:,} pixels; draw boxes")

    def remove(self, session: Session, number: int, text: str) -> str:
        """Removes an image of the coming question, and its regions. Returns the text without their marks.

        Raises:
            ValueError: for an image that a question was asked about, and while an answer is under way.
        """
        check_idle(session)
        if not session.num_asked <= number < len(session.pictures):
            raise PictureError(f"image {number + 1} was asked about and stays; start a new conversation")
        text = self.unmark(session, text, [place for place, part in enumerate(session.regions) if part.image == number])
        session.regions = [replace(part, image=part.image - (part.image > number)) for part in session.regions]
        del session.pictures[number]
        session.shown = max(0, min(session.shown - (session.shown > number), len(session.pictures) - 1))
        return text

    def unmark(self, session: Session, text: str, numbers: Collection[int]) -> str:
        """Removes regions of the coming question by their places. Returns the text without their marks.

        Raises:
            PictureError: while an answer is under way.
        """
        check_idle(session)
        session.regions = [region for place, region in enumerate(session.regions) if place not in numbers]
        start, *parts = text.split(MARK)
        kept = start + "".join(part if place in numbers else MARK + part for place, part in enumerate(parts))
        return " ".join(kept.split()) if numbers else text

    # What is shown

    def stage(self, session: Session, budget: Budget) -> dict[str, Any]:
        """What the page's script draws. Raises ValueError for a budget that no image can meet."""
        grid = None
        if session.pictures:
            grid = draw_grid(self._plan(session.pictures[session.shown], budget))
        last = session.turns[-1].regions if session.turns and not session.regions else session.regions
        regions = [vars(region) | {"key": ""} for region in last]
        return {"shown": session.shown, "grid": grid, "regions": regions, "marking": self.marking}

    def count(self, session: Session, budget: Budget) -> str:
        """The exact number of image tokens, before a model runs. Raises ValueError as `stage`."""
        if not session.pictures and budget[0] == AUTO:
            return "<p>each tile gets tokens by its detail; add an image</p>"
        if not session.pictures:
            tokens = plan(self.processor, Image.new("RGB", (1, 1)), budget).layout.num_tokens
            return f"<p><b>{tokens:,}</b> tokens for an image of one tile</p>"
        plans = [self._plan(picture, budget) for picture in session.pictures]
        tokens, full = sum(each.layout.num_tokens for each in plans), sum(each.num_full_tokens for each in plans)
        images = f"{len(plans)} images" if len(plans) > 1 else "the image"
        return f"<p><b>{tokens:,}</b> tokens for {images}, instead of {full:,} at one per patch</p>"

    def _plan(self, picture: Picture, budget: Budget) -> PackedImage:
        return plan(self.processor, picture.load(self.store) if budget[0] == AUTO else picture, budget)

    def chat(self, session: Session, lane: int, more: Sequence[Turn] = ()) -> str:
        """HTML of the messages of a lane, 0 or 1, and of further turns. What people and models wrote is escaped."""
        messages, start = "", 0
        for turn in (*session.turns, *more):
            names = ", ".join(f"image {number + 1}" for number in range(start, start + turn.num_images))
            start += turn.num_images
            asked = turn.question
            for number in range(asked.count(MARK) if self.marking else 0):
                asked = asked.replace(MARK, f"[region {number + 1}]", 1)
            messages += f'<p class="asked">{f"<small>{names}</small> " if names else ""}{escape(asked)}</p>'
            if lane < len(turn.answers):
                messages += f'<p class="answer">{escape(turn.answers[lane]) or "..."}</p>'
        which = ("Conversation", "Second conversation")[lane]
        return f'<div class="chat" role="log" tabindex="0" aria-label="{which}"><div>{messages}</div></div>'

    # Asking

    def ask(self, session: Session, text: str, budgets: Sequence[Budget]) -> Iterator[tuple[Turn, list[Growing]]]:
        """Yields the turn and its answers, one for each budget, as they grow. They join the session at the end.

        Answers come one after the other, so that the times to the first token are those of an answer alone.

        Raises:
            ValueError: for an empty question, one that is too long, and what the model cannot take.
            QueueFullError, ClosedError, TimeoutError: as `stream`.
        """
        self._check(session, text)
        turn = Turn(text, len(session.pictures) - session.num_asked, list(session.regions), [])
        all_growing: list[Growing] = []
        session.asking = True
        try:
            for lane, budget in enumerate(budgets):
                prepare = partial(self._prepare, session, turn, lane, budget)
                with closing(
                    stream(self.engine, prepare, self.limits.request_s, lambda: session.asking is None)
                ) as steps:
                    for growing in steps:
                        all_growing[lane:] = [growing]
                        turn.answers[lane:] = [growing.text]
                        yield turn, all_growing
                if session.asking is None:
                    break
        finally:
            if any(turn.answers):
                session.turns.append(turn)
                del session.regions[: len(turn.regions)]  # others may have been drawn meanwhile
            session.asking = False

    def _prepare(self, session: Session, turn: Turn, lane: int, budget: Budget) -> Prepared:
        """The prompt of a question. Its images and masks, which may take 600 MB, are let go at the end.

        Raises:
            PictureError: if others hold theirs for too long.
        """
        if not self._preparing.acquire(timeout=PREPARING_S):
            raise PictureError("the server is busy with the images of other questions; try again in a minute")
        try:
            return self.engine.prepare(session.question(turn, lane, budget, self.store, MAX_TOKENS))
        finally:
            self._preparing.release()

    def _check(self, session: Session, text: str) -> None:
        check_idle(session)
        if not text.strip():
            raise PictureError("the question is empty; write one")
        if len(text) + sum(len(turn.question) for turn in session.turns) > self.limits.characters:
            raise PictureError(f"a conversation has at most {self.limits.characters:,} characters; start a new one")
        if 2 * len(session.turns) + 1 > self.limits.messages:
            raise PictureError(f"a conversation has at most {self.limits.messages} messages; start a new one")
        marks, marked = text.count(MARK), len(session.regions)
        if self.marking and marks != marked:
            raise PictureError(f"the question has {marks} {MARK} for {marked} regions; write one for each region")

    # Examples

    @cached_property
    def examples(self) -> list[tuple[str, Image.Image, list[Region]]]:
        """Questions with their image and regions, from the package's own scenes."""
        found: list[tuple[str, Image.Image, list[Region]]] = []
        for index in EXAMPLES["test"]:
            sample = FinePrint("test")[index]
            found.append((sample.questions[0].text, sample.image, []))
        for index in EXAMPLES["regions"] if self.marking else ():
            sample = Regions("test", "box")[index]
            asked = sample.questions[0]
            boxes = [sample.regions[number] for number in asked.regions]
            found.append((asked.text, sample.image, [Region(0, "box", [(b[0], b[1]), (b[2], b[3])]) for b in boxes]))
        return found

    def example(self, number: int) -> tuple[Session, str]:
        """A new session with an example's image, and its question."""
        text, image, regions = self.examples[number]
        file = io.BytesIO()
        image.save(file, "PNG")
        return Session([self._keep(image, file.getvalue())], [], list(regions)), text
