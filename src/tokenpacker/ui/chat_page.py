"""The page of `tokenpacker ui`, put together with gradio: images under their tokens, budgets, the conversation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import gradio as gr

from tokenpacker.router import AUTO
from tokenpacker.serve.picture_sources import PictureError
from tokenpacker.ui.page_actions import MARK, PageActions, check_idle
from tokenpacker.ui.sessions import Budget, Session, restore
from tokenpacker.ui.streaming import sentence

HERE = Path(__file__).parent
STAGE = """<div class="stage-bar"><label class="stage-add"><input type="file" multiple aria-label="Add images"
accept="image/png,image/jpeg,image/webp,image/gif,image/tiff"><span aria-hidden="true">Add images</span></label>
<div class="stage-strip" role="group" aria-label="Images"></div></div>
<div class="stage-tools" role="group" aria-label="Tools"></div><div class="stage-view"></div>
<p class="stage-say" role="alert"></p>"""
CHOOSE = "<p>Choose a token in the image: click it, or go to the image and use the arrow keys.</p>"
LINKED = "Whoever has this address sees this conversation and its images, for a day after its last use."
EXPIRED = "The conversation of this address is not kept any more, or never was."
TO_ADDRESS = "key => location.origin + location.pathname + '?session=' + key"
BUTTON = {"button_primary_background_fill": "#c2410c", "button_primary_background_fill_hover": "#9a3412"}


def theme() -> gr.themes.Base:
    """The system's fonts, since gradio's own would be fetched from another host, and colours of enough contrast."""
    both = BUTTON | {f"{name}_dark": value for name, value in BUTTON.items()}
    colours = {
        "button_primary_text_color": "white",
        "slider_color": "#c2410c",
        "slider_color_dark": "#fd7e14",
        "body_text_color_subdued": "#52525b",
        "block_info_text_color": "#52525b",
        "input_placeholder_color": "#6b6b75",
    }
    return gr.themes.Default(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(**both, **colours)


def _note(text: str) -> str:
    return f'<p class="note" role="alert">{escape(text)}</p>' if text else ""


def _whole(name: str, value: Any, least: int, most: int) -> int:
    """A slider's value as a whole number. Raises PictureError for what the slider cannot have."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise PictureError(f"the {name} must be a number from {least:,} to {most:,}; move its slider")
    return round(value)


class ChatPage:
    """Makes the page and connects its events.

    Attributes:
        blocks: the page, as gradio has it.
    """

    def __init__(self, name: str, actions: PageActions):
        self.actions = actions
        with gr.Blocks(title=f"tokenpacker: {name}", analytics_enabled=False) as self.blocks:
            gr.Markdown(f"# tokenpacker\n{escape(name)}: a slider decides how many tokens the model reads of an image")
            # the page is told of the callback; the one of gradio has an address in memory in its name
            self.session = gr.State(Session(), delete_callback=bool)  # type: ignore[arg-type]
            with gr.Row():
                with gr.Column(min_width=320):
                    self._add_image()
                with gr.Column(min_width=320):
                    self._add_conversation()
            self._connect()

    def _add_image(self) -> None:
        limits = self.actions.limits
        self.stage = gr.HTML(
            self.actions.stage(Session(), self._start),
            html_template=STAGE,
            js_on_load=(HERE / "stage.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            pictures=[],
            asked=0,
            limits={"body_bytes": limits.body_bytes, "image_bytes": limits.image_bytes},
        )
        self.token = gr.HTML(CHOOSE, elem_classes="token")

    @property
    def _start(self) -> tuple[int | None, int]:
        return (self.actions.own_scale_factor if self.actions.scale_factors else None, self.actions.budgets[1])

    @property
    def _least_factor(self) -> int:
        """The lower end of the slider; 0 stands for "auto"."""
        return 0 if self.actions.processor.router is not None else min(self.actions.scale_factors, default=1)

    def _add_conversation(self) -> None:
        self.compare = gr.Checkbox(label="Compare with a second budget", container=False)
        with gr.Row():
            first = self._add_lane("", 0)
            with gr.Column(min_width=250, visible=False) as self.second:
                second = self._add_lane("Second ", 1)
        self.lanes = list(zip(first, second, strict=True))
        self.note = gr.HTML()
        with gr.Row(equal_height=True):
            self.question = gr.Textbox(
                label="Question",
                placeholder="Ask about the images",
                container=False,
                max_lines=4,
                max_length=self.actions.limits.characters,
                scale=4,
                min_width=180,
            )
            self.send = gr.Button("Ask", variant="primary", min_width=80)
            self.stop = gr.Button("Stop", min_width=80, visible=False)
        with gr.Row():
            self.examples = [gr.Button(text, size="sm", min_width=130) for text, *_ in self.actions.examples]
        with gr.Row():
            self.new = gr.Button("New conversation", size="sm", min_width=130)
            self.link = gr.Button("Link to this conversation", size="sm", min_width=130)
        self.address = gr.Textbox(label="Link", info=LINKED, interactive=False, visible=False, buttons=["copy"])

    def _add_lane(self, which: str, lane: int) -> list[gr.Component]:
        """Sliders, count, conversation and cost of a budget."""
        factors, (least, most) = self.actions.scale_factors, self.actions.budgets
        with gr.Column(min_width=250):
            scale = gr.Slider(
                self._least_factor,
                max(factors, default=2),
                value=self._start[0],
                step=1,
                label=f"{which}scale factor".capitalize(),
                info="s x s patches in a token" + ("" if self._least_factor else "; 0: each tile by its detail"),
                visible=bool(factors),
                buttons=[],
            )
            limit = gr.Slider(
                least,
                most,
                value=most,
                step=1,
                label=f"{which}token budget".capitalize(),
                info="tokens of an image",
                buttons=[],
            )
            count = gr.HTML(self.actions.count(Session(), self._start), elem_classes="count")
            chat = gr.HTML(self.actions.chat(Session(), lane))
            cost = gr.HTML(elem_classes="count")
        for slider in (scale, limit):  # `_budgets` checks their values; gradio would log a traceback for each refusal
            vars(slider)["preprocess"] = lambda value: value
        return [scale, limit, count, chat, cost]

    def _connect(self) -> None:
        scales, limits, self.counts, self.chats, self.costs = self.lanes
        self.settings: list[Any] = [scales[0], limits[0], self.compare, scales[1], limits[1]]
        given = [self.session, self.question, *self.settings]
        self.shown = [self.session, self.question, self.stage, *self.counts, self.token, self.note]
        everything = [*self.shown, *self.chats, *self.costs]
        quick: dict[str, Any] = {
            "queue": True,
            "show_progress": "hidden",
            "concurrency_limit": 8,
            "concurrency_id": "quick",
        }
        last = {**quick, "trigger_mode": "always_last"}
        for name in ("upload", "turn", "remove", "mark", "unmark", "clear"):
            getattr(self.stage, name)(self._acting(getattr(self, f"on_{name}")), given, self.shown, **quick)
        # One after the other. For "always_last", gradio would send the first event's data again.
        in_order = {**quick, "trigger_mode": "multiple", "concurrency_id": "explain", "concurrency_limit": 1}
        self.stage.pick(self.on_pick, given, [self.token, self.note], **in_order)
        for setting in self.settings:
            setting.change(self._acting(lambda *_: None), given, self.shown, **last)
        self.compare.change(lambda wanted: gr.Column(visible=wanted), self.compare, self.second, **quick)
        asked: dict[str, Any] = {"concurrency_limit": 32, "show_progress": "hidden"}
        outputs = [*everything, self.send, self.stop]
        gr.on([self.send.click, self.question.submit], self.on_ask, given, outputs, **asked)
        self.stop.click(self.on_stop, self.session, None, show_progress="hidden", concurrency_limit=None)
        for number, button in enumerate(self.examples):
            button.click(self._starting(number), self.settings, everything, **quick)
        self.new.click(self._starting(None), self.settings, everything, **quick)
        self.link.click(self.on_link, given, self.address, **quick).then(
            None, self.address, self.address, js=TO_ADDRESS
        )
        self.restored = [*everything, *self.settings, self.second]
        self.blocks.load(self.on_load, None, self.restored, **quick)

    # Events

    def _budgets(self, values: Any) -> list[Budget]:
        """The budgets of one lane or two, from the values of the settings. Raises PictureError for what none can be."""
        factors, (least, most) = self.actions.scale_factors, self.actions.budgets
        lanes: list[Budget] = []
        for factor, limit in (values[:2], values[3:]):
            scale = _whole("scale factor", factor, self._least_factor, max(factors)) if factors else None
            lanes.append((AUTO if scale == 0 else scale, _whole("token budget", limit, least, most)))
        return lanes if values[2] else lanes[:1]

    def _view(self, session: Session, question: str, values: Any, note: str = "", new: bool = True) -> list[Any]:
        """Values of `shown`.

        Args:
            new: whether the page does not have the images yet.
        """
        counts: list[Any] = []
        stage: Any = gr.skip()
        try:
            budgets = self._budgets(values)
            counts = [self.actions.count(session, budget) for budget in budgets]
            pictures: Any = {"pictures": [picture.preview for picture in session.pictures]} if new else {}
            stage = gr.HTML(self.actions.stage(session, budgets[0]), asked=session.num_asked, **pictures)
        except ValueError as error:
            note = note or sentence(error)
        counts += [""] * (2 - len(counts))
        return [session, question, stage, *counts, CHOOSE, _note(note)]

    def _all(self, session: Session, question: str, values: Any, note: str = "") -> list[Any]:
        """Values of `shown`, and of chats and costs."""
        chats = [self.actions.chat(session, lane) for lane in (0, 1)]
        return [*self._view(session, question, values, note), *chats, "", ""]

    def _acting(
        self, act: Callable[[Session, dict[str, Any], str], tuple[str, str] | None]
    ) -> Callable[..., list[Any]]:
        """An event's function: changes the session, and shows it.

        Args:
            act: returns the question and a note, or None if they stay as they are.
        """

        def run(event: gr.EventData, session: Session, question: str, *values: Any) -> list[Any]:
            note, before = "", len(session.pictures)
            try:
                question, note = act(session, event._data or {}, question) or (question, "")
            except Exception as error:
                note = sentence(error)
            return self._view(session, question, values, note, new=len(session.pictures) != before)

        return run

    def on_upload(self, session: Session, data: dict[str, Any], question: str) -> tuple[str, str]:
        """Images were chosen, dropped or pasted."""
        return question, self.actions.add(session, data["data"])

    def on_turn(self, session: Session, data: dict[str, Any], question: str) -> None:
        """Another image is to be shown."""
        session.shown = min(max(0, int(data["image"])), len(session.pictures) - 1)

    def on_remove(self, session: Session, data: dict[str, Any], question: str) -> tuple[str, str]:
        """An image is to go, with its regions."""
        return self.actions.remove(session, int(data["image"]), question), ""

    def on_mark(self, session: Session, data: dict[str, Any], question: str) -> tuple[str, str]:
        """A region was drawn. The question gets its mark."""
        self.actions.mark(session, **{name: data[name] for name in ("form", "points", "width", "data") if name in data})
        return f"{question.rstrip()} {MARK}".lstrip(), ""

    def on_unmark(self, session: Session, data: dict[str, Any], question: str) -> tuple[str, str]:
        """The last region of the question is to go, and so is its mark."""
        if not session.regions:
            raise PictureError("the question has no region; draw one")
        return self.actions.unmark(session, question, [len(session.regions) - 1]), ""

    def on_clear(self, session: Session, data: dict[str, Any], question: str) -> tuple[str, str]:
        """The regions of the question are to go, and so are their marks."""
        check_idle(session)
        session.regions = []
        return " ".join(question.replace(MARK, "").split()), ""

    def on_pick(self, event: gr.EventData, session: Session, question: str, *values: Any) -> tuple[str, str]:
        """A token was chosen."""
        try:
            place = [int(event._data[name]) for name in ("tile", "row", "col")]
            picture = session.pictures[session.shown]
            return self.actions.explainer.explain(picture, self._budgets(values)[0], *place), ""
        except Exception as error:
            return CHOOSE, _note(sentence(error))

    def on_ask(self, session: Session, question: str, *values: Any) -> Iterator[list[Any]]:
        """A question was sent."""
        rest: list[Any] = [gr.skip()] * len(self.shown)
        asking, idle = ([gr.Button(visible=not busy), gr.Button(visible=busy)] for busy in (True, False))
        try:
            begun = False
            for turn, growing in self.actions.ask(session, question, self._budgets(values)):
                if not begun:
                    rest[1], rest[-1], begun = "", "", True
                chats = [self.actions.chat(session, lane, [turn]) for lane in (0, 1)]
                costs = [f"<p>{part.summary()}</p>" for part in growing] + [""] * (2 - len(growing))
                yield [*rest, *chats, *costs, *asking]
                rest[1] = gr.skip()
            if not any(turn.answers):  # it was stopped
                rest[1] = question
            rest[2] = gr.HTML(asked=session.num_asked)
            yield [*rest, *[gr.skip()] * 4, *idle]
        except Exception as error:
            told = [*rest[:-1], _note(sentence(error))]
            told[1] = question
            yield [*told, *(self.actions.chat(session, lane) for lane in (0, 1)), gr.skip(), gr.skip(), *idle]

    def on_stop(self, session: Session) -> None:
        """The answer is to end here."""
        session.asking = None if session.asking else session.asking

    def _starting(self, number: int | None) -> Callable[..., list[Any]]:
        def run(*values: Any) -> list[Any]:
            session, question = (Session(), "") if number is None else self.actions.example(number)
            return self._all(session, question, values)

        return run

    def on_link(self, session: Session, question: str, *values: Any) -> gr.Textbox:
        """A link is wanted."""
        try:
            self._budgets(values)
        except PictureError:  # forged; a link that restores it would fail
            values = (*self._start, False, *self._start)
        return gr.Textbox(session.save([question, *values], self.actions.store), visible=True)

    def on_load(self, request: gr.Request) -> list[Any]:
        """The page was opened, perhaps by a link."""
        key = request.query_params.get("session")
        if not key:  # the page is as it was made, and may have got an image meanwhile
            return [gr.skip()] * len(self.restored)
        kept = restore(key, self.actions.store)
        if kept is None:
            start = [*self._start, False, *self._start]
            return [*self._all(Session(), "", start, EXPIRED), *start, gr.skip()]
        session, (question, *values) = kept
        return [*self._all(session, question, values), *values, gr.Column(visible=values[2])]
