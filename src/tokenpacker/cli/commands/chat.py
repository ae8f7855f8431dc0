"""`tokenpacker chat`: a conversation about images, by keyboard or from a pipe."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tokenpacker.cli import options
from tokenpacker.cli.arguments import check_picture
from tokenpacker.cli.errors import EXIT_CODE, INTERRUPTED, mistake
from tokenpacker.cli.loading import load_model
from tokenpacker.cli.model_files import CARRIED_REGIONS
from tokenpacker.cli.output import image_notes_on_stderr, print_error, print_json, print_note, print_piece
from tokenpacker.cli.region_arguments import Region, read_region
from tokenpacker.text import check_text, did_you_mean

if TYPE_CHECKING:
    from tokenpacker.cli.conversation import Conversation
    from tokenpacker.visualize import PackedImage

HELP = (
    "/image PATH adds an image to your next question; /mask FILE, /box x0,y0,x1,y1 or /polygon x,y,x,y,x,y,... marks"
    " what it calls <mask>, with N: before it in image N; /unmark forgets these marks; /picture FILE draws images,"
    " marks and words so far; /clear starts anew, /help says this again, /quit leaves; Ctrl-C stops an answer."
)
QUIT, REGIONS = ("/quit", "/exit"), ("/mask", "/box", "/polygon")
COMMANDS = ("/image", *REGIONS, "/unmark", "/picture", "/clear", "/help", *QUIT)


def chat(
    model: options.Model = None,
    scale_factor: options.AutoScaleFactor = None,
    max_image_tokens: options.MaxImageTokens = None,
    max_new_tokens: options.MaxNewTokens = 256,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Talk about images, by keyboard or from a pipe.

    /image PATH adds an image, /help lists all commands, /quit leaves, Ctrl-C stops an answer.
    From a pipe, or with --json, the exit code is 2 if a line failed.

    Examples:
        tokenpacker chat --scale-factor 2
        printf '/image sign.png\\nwhat number is in the red box?\\n' | tokenpacker chat --json
    """
    budget: dict[str, Any] = {"scale_factor": scale_factor, "max_image_tokens": max_image_tokens}
    loaded, processor = load_model(model or CARRIED_REGIONS, verbose, device, dtype, **budget)
    from tokenpacker.cli.conversation import Conversation

    session = Session(Conversation(loaded, processor, max_new_tokens=max_new_tokens, **budget), quiet=as_json)
    print_note(HELP)
    interrupted = False
    try:
        for line in _lines(quiet=as_json):
            if not session.handle(line):
                break
    except KeyboardInterrupt:  # while waiting for a pipe
        interrupted = True
    if as_json:
        print_json({"turns": session.turns})
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if session.failed and (as_json or not sys.stdin.isatty()):
        raise typer.Exit(EXIT_CODE)


class Session:
    """What the user types, line by line.

    Args:
        quiet: collect answers in `turns` and do not print them.
    """

    def __init__(self, conversation: "Conversation", quiet: bool = False):
        self.conversation = conversation
        self.quiet = quiet
        self.waiting: list[PackedImage] = []  # images for the next question
        self.marked: list[Region] = []  # regions for the next question
        self.files: set[Path] = set()  # of the images, which must not be overwritten
        self.turns: list[dict[str, Any]] = []
        self.failed = False  # whether any line failed

    def handle(self, line: str) -> bool:
        """Does what a line says; False if the user leaves. A mistake is printed and changes nothing."""
        command, argument = [*line.strip().split(None, 1), "", ""][:2]
        if command in QUIT:
            return False
        try:
            check_text(line, "the line")
            if command.startswith("/"):
                self._run(command, argument)
            elif line.strip():
                self._ask(line.strip())
        except KeyboardInterrupt:  # while an image or a prompt was prepared; `Conversation.ask` stops an answer
            print_note("stopped")
        except Exception as error:
            told = mistake(error)
            if told is None:
                raise
            self.failed = True
            print_error(told)
            self.turns.append({"input": line.strip(), "error": told})
        return True

    def _run(self, command: str, argument: str) -> None:
        path = argument.strip().strip("'\"")
        if command == "/image":
            self._add_image(path)
        elif command in REGIONS:
            self._add_region(argument)
        elif command == "/unmark":
            self.marked = []
            print_note("No region is marked for the next question.")
        elif command == "/picture":
            self._draw(path)
        elif command == "/clear":
            self.conversation.clear()
            self.waiting, self.marked = [], []
            print_note("The conversation starts anew.")
        elif command == "/help":
            print_note(HELP)
        else:
            meant = did_you_mean(command, COMMANDS) or "; /help lists the commands"
            raise ValueError(f"{command} is no command{meant}")

    def _add_image(self, path: str) -> None:
        from tokenpacker.images import load_image

        if not path:
            raise ValueError("/image needs a path, for example /image photo.jpg")
        with image_notes_on_stderr():
            packed = self.conversation.pack(load_image(path))
        self.waiting.append(packed)
        self.files.add(Path(path).resolve())
        size = f"{packed.image.height} x {packed.image.width}"
        print_note(f"{path}: {size}, {packed.layout.num_tokens} tokens; ask your question.")

    def _add_region(self, text: str) -> None:
        """Marks a region in the last image, or in the one whose number stands before it."""
        if not text:
            raise ValueError("a region is missing; write for example /box 10,10,60,40")
        images, number = [*self.conversation.images, *self.waiting], len(self.marked) + 1
        region = read_region(text, [packed.image for packed in images])
        self.conversation.check_region(region, images[region.image], number)
        self.marked.append(region)
        print_note(f"region {number} is in image {region.image + 1}; it is <mask> number {number} of your question.")

    def _draw(self, path: str) -> None:
        """Draws images, marks and words so far as one picture."""
        from tokenpacker.visualize import draw_conversation

        if not self.conversation.messages:
            raise ValueError("nothing was said yet that /picture could draw; ask a question first")
        out = Path(path)
        check_picture(out, "/picture", in_folder=True)
        if out.resolve() in self.files:
            raise ValueError(f"/picture {out} would overwrite an image of this conversation; choose another name")
        images = [packed.image for packed in self.conversation.images]
        regions = [(region.image, region.form) for region in self.conversation.regions]
        draw_conversation(images, regions, self.conversation.said()).save(out)
        print_note(f"{out} shows the conversation so far.")

    def _ask(self, question: str) -> None:
        on_text = (lambda _: None) if self.quiet else print_piece
        answer = self.conversation.ask(question, self.waiting, on_text, self.marked)
        told = [region.to_dict() for region in self.marked]
        if answer.text or not answer.interrupted:
            self.waiting, self.marked = [], []
        if not self.quiet:
            print_piece("\n")
        print_note(("stopped; " if answer.interrupted else "") + answer.summary())
        self.turns.append({"question": question, "regions": told, **answer.to_dict()})


def _lines(quiet: bool) -> Iterator[str]:
    """Lines from the keyboard or a pipe, until they end or Ctrl-C comes twice in a row."""
    if quiet or not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # absent on Windows; its import gives `input` history and editing
        import readline  # noqa: F401
    stops = 0
    while stops < 2:
        try:
            line = input("> ")
        except EOFError:  # Ctrl-D
            return
        except KeyboardInterrupt:
            stops += 1
            if stops == 1:
                print_note("\nCtrl-C once more, or /quit, leaves.")
            continue
        stops = 0
        yield line
