"""What the pages of results share: pictures as data, questions with their answers, and the templates."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

import tokenpacker
from tokenpacker.evaluate.answer_rows import AnswerRow
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.results.elastic_curve import number, span
from tokenpacker.visualize import draw_regions

MAX_EXAMPLES = 12  # of a task
MAX_IMAGES = 4  # of a question
MAX_TEXT = 600  # characters of a question, a prompt or an answer
PICTURE_SIDE, QUALITY = 448, 82  # pixels of the longer side; of JPEG
PICTURE_BYTES = 3_400_000  # of all pictures, so that a page stays below 5 MB
FIGURE_COLORS = 64


@dataclass(frozen=True)
class Reply:
    """An answer as a page shows it; `label` is the plan or the run."""

    label: str
    row: AnswerRow


@dataclass(frozen=True)
class Example:
    """A question with its pictures and its answers. `missing` says why there are no pictures."""

    id: str
    replies: Sequence[Reply]
    question: BenchQuestion | None
    pictures: Sequence[str] = ()
    missing: str = ""

    @property
    def prompt(self) -> str:
        """What the model was asked."""
        return self.replies[0].row.prompt


@dataclass
class Pictures:
    """Makes examples, and keeps count of what their pictures take of a page."""

    left: int = PICTURE_BYTES
    parts: int = 1
    _share: int = field(init=False, default=0)

    def begin_task(self) -> None:
        """Gives the next task its share of what is left, and no more."""
        self._share = self.left // max(1, self.parts)
        self.parts -= 1

    def example(self, id: str, replies: Sequence[Reply], question: BenchQuestion | None, missing: str) -> Example:
        """The example with the pictures of its question.

        Args:
            missing: why the data cannot be read; empty if they can.
        """
        if question is None or missing:
            reason = f"No pictures: the data cannot be read ({missing})." if missing else "The data no longer have it."
            return Example(id, replies, question, missing=reason)
        try:
            addresses = [_photo(image) for image in _opened(question)]
        except (OSError, ValueError) as error:
            return Example(id, replies, question, missing=f"No picture: {' '.join(str(error).split())}.")
        if (size := sum(map(len, addresses))) > self._share:
            return Example(id, replies, question, missing="No picture: the page would grow beyond 5 MB.")
        self._share -= size
        self.left -= size
        more = f"{others} more images are not shown." if (others := len(question.images) - MAX_IMAGES) > 0 else ""
        return Example(id, replies, question, addresses, more)


def one_of_each_image(ids: Iterable[str], questions: Mapping[str, BenchQuestion]) -> list[str]:
    """The first ids, at most `MAX_EXAMPLES`, without a second question about the same image."""
    chosen: dict[str, str] = {}
    for id in ids:
        chosen.setdefault(questions[id].image_key if id in questions else id, id)
        if len(chosen) == MAX_EXAMPLES:
            break
    return list(chosen.values())


def figure_address(picture: Image.Image) -> str:
    """A drawn figure as a data URI."""
    buffer = io.BytesIO()
    picture.quantize(FIGURE_COLORS, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def write_page(path: Path, template: str, **content: Any) -> Path:
    """Writes a page from a template of this folder, all values escaped; returns the path."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tokenpacker.evaluate.results", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "span": span, "shown": shown}
    style = (files("tokenpacker.visualize") / "report.css").read_text(encoding="utf-8")
    page = environment.get_template(template).render(version=tokenpacker.__version__, style=Markup(style), **content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def shown(text: str) -> str:
    """A text in at most `MAX_TEXT` characters."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text):,} characters)"


def _opened(question: BenchQuestion) -> list[Image.Image]:
    """The first images of a question, not larger than a picture; regions are drawn on its only image."""
    images = [image.copy() for image in question.open_images()[:MAX_IMAGES]]
    if (regions := question.extra.get("regions")) and len(images) == 1:
        images = [draw_regions(images[0], list(enumerate(regions, 1)))]
    for image in images:
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return images


def _photo(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
