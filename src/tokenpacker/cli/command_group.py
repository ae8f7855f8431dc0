"""The class of `tokenpacker` and of its groups: finds commands, and reports mistakes for all of them."""

import sys
from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup

from tokenpacker.cli.errors import keeping, mistakes_in_one_line
from tokenpacker.text import check_text, did_you_mean

# Command -> what others call it. A word must stand once among the commands of one group.
OTHER_NAMES = {
    "ask": "answer caption describe generate infer inference predict prompt query run vqa",
    "batch": "bulk jobs jsonl offline ray",
    "chat": "conversation converse interactive repl talk",
    "check": "inspect lint stats validate verify",
    "compare": "ablate ablation projectors study",
    "convert": "import merge migrate save",
    "count": "cost size tiles tokenize tokens",
    "data": "annotations dataset datasets prepare",
    "engines": "accelerate deepspeed fsdp launch",
    "evaluate": "accuracy eval score test validate",
    "export": "executorch graph int8 onnx openvino quantise quantize transformers.js web",
    "get": "download fetch prepare pull",
    "models": "checkpoints download info list ls names zoo",
    "probe": "craft letters linear-probe probing read",
    "recipes": "configs list ls",
    "regions": "convert coco make masks refcoco",
    "serve": "api deploy endpoint host http openai server vllm",
    "show": "attention draw explain picture plot view visualise visualize",
    "speed": "bench benchmark flops latency measure memory plan profile time throughput",
    "ui": "app browser demo gradio gui page playground webui",
    "train": "fine-tune finetune fit learn lora pretrain recipe recipes sft",
}


class CommandGroup(TyperGroup):
    """Commands whose mistakes are reported in one line, an unknown command with the one that was meant."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """Runs a command line and ends the program with its exit code."""
        words = sys.argv[1:] if args is None else list(args)
        with mistakes_in_one_line(as_json="--json" in words):
            for word in words:
                check_text(word, repr(word))  # bytes that are not UTF-8; the name of a file may hold them
            sys.exit(super().main(args, *more, **{**options, "standalone_mode": False}) or 0)

    def invoke(self, ctx: Any) -> Any:
        """Runs a command. Ctrl-C is reported here, since typer's `main` ends on it without a word."""
        with keeping("nothing is kept: call it again to start anew"):
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` begin with. Raises ValueError for an unknown one, naming the one that was meant."""
        word = args[0]
        if word not in self.commands and not word.startswith("-") and not ctx.resilient_parsing:
            known = ", ".join(self.commands)
            meant = self.other_name(word) or did_you_mean(word, self.commands) or f"; it has {known}"
            raise ValueError(f"{ctx.command_path} has no command {word}{meant}")
        return super().resolve_command(ctx, args)

    def other_name(self, word: str) -> str:
        """Returns `; did you mean X?` for another name of the command X, or ""."""
        meant = [name for name in self.commands if word.lower() in OTHER_NAMES.get(name, "").split()]
        return f"; did you mean {meant[0]}?" if meant else ""
