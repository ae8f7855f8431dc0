"""The model card of a carried model: what it is, how it was made, what was measured."""

import json
from pathlib import Path
from typing import Any

CARD = "README.md"
RECORD = "training.json"
PHASE_TITLES = {
    "encoder": "encoder (foundation)",
    "language": "language model (foundation)",
    "align": "stage 1: projector, captions",
    "instruct": "stage 2: projector and language model, questions",
    "region-tiny": "region stage 2: region module",
    "region-instruct-tiny": "region stage 3: projector, region module and language model",
}
BASELINES = (
    "Beside it: a public CNN+LSTM reports 87.6 % on the easy-VQA test questions. The most frequent answer to each"
    " wording, without looking (`tokenpacker.scenes.guessing`), gets 67.0 % on easy-VQA and 18.9 % on fine print."
)
REGION_BASELINES = (
    " On regions it gets 19.6 %; who knows every object, but is told the wrong ones as in `regions-shuffled`, gets"
    " 11.6 %."
)
REGIONS = (
    " It takes regions: masks and boxes that a user marks, each one token where the prompt says `<mask>`. Its start,"
    " the carried model without them, had the first four phases."
)
LIMITS = (
    "## Limits\n\nIt answers the kinds of questions it was trained on, in English, in a word or two. Photographs, other"
    " fonts and other questions are outside its world: its answers there mean nothing. It exists to show, test and"
    " measure the projector without downloading anything."
)
LEVELS = "▁▂▃▄▅▆▇█"


def add_accuracies(folder: Path | str, accuracies: list[dict[str, Any]]) -> None:
    """Replaces the evaluation results in a model's record and card.

    Args:
        accuracies: each with `task`, `scale_factor`, `correct`, `questions` and `image_tokens` (mean per image).

    Raises:
        ValueError: if the folder holds no training record.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise ValueError(f"{folder} holds no {RECORD}; give a folder that `tokenpacker train tiny` wrote")
    record = json.loads(path.read_text()) | {"accuracies": accuracies}
    path.write_text(json.dumps(record, indent=1) + "\n")
    write_card(folder, record)


def write_card(folder: Path | str, record: dict[str, Any]) -> None:
    """Writes the card for a training record (`training.json`)."""
    recipe = record["recipe"]
    projector = recipe["projector"]["name"]
    takes_regions = "regions" in record
    command = "tokenpacker train tiny --output runs/tiny"
    if takes_regions:
        command = f"{command}\ntokenpacker train tiny-regions --start runs/tiny --output runs/tiny-regions"
    elif projector != "token-packer":
        command += f"-{projector} --projector {projector} --foundation runs/tiny/state"
    command += "" if recipe["seed"] == 0 else f" --seed {recipe['seed']}"
    sections = [
        "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---",
        f"# tokenpacker tiny ({projector}{', regions' if takes_regions else ''})",
        _introduction(recipe, projector) + (REGIONS if takes_regions else ""),
        f"## Made by\n\n```sh\n{command}\n```\n\n{_circumstances(record)}",
        _accuracy_table(record["accuracies"], BASELINES + (REGION_BASELINES if takes_regions else "")),
        _phase_table(record["phases"]),
        LIMITS,
    ]
    (Path(folder) / CARD).write_text("\n\n".join(section for section in sections if section) + "\n")


def _introduction(recipe: dict[str, Any], projector: str) -> str:
    side = recipe["image_size"] // recipe["patch_size"]
    tokens = f"s = 2, 3, 4 give {side * side // 4}, {side * side // 9} and {side * side // 16} tokens per tile"
    count = tokens if projector == "token-packer" else f"every tile costs {side * side} tokens"
    vision = f"a ViT of {recipe['vision_layers']} layers and width {recipe['vision_dim']}"
    language = f"a LLaMA-style language model of {recipe['language_layers']} layers and width {recipe['language_dim']}"
    return (
        f"A vision-language model small enough to travel with its package: {vision} that reads"
        f" {recipe['image_size']}-pixel tiles as {side} x {side} patches, the {projector} projector ({count}), and"
        f" {language}. It knows two worlds only: easy-VQA and fine print. Weights are stored as float16 and used as"
        " float32."
    )


def _circumstances(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    facts = (
        f"Seed {record['recipe']['seed']}; {record['minutes']} minutes of training on {record['processors']} cores"
        f" ({record['threads']} threads); {versions}. The whole recipe and the loss curves are in `{RECORD}`."
    )
    return "\n\n".join([facts, *record.get("notes", [])])


def _accuracy_table(accuracies: list[dict[str, Any]], baselines: str) -> str:
    if not accuracies:
        return ""
    rows = ["## Accuracy", "", "Greedy answers, exact match, on the stored weights.", ""]
    rows += ["| task | s | right / questions | accuracy | tokens per image |", "|---|---|---|---|---|"]
    for entry in accuracies:
        share = 100 * entry["correct"] / entry["questions"]
        rows.append(
            f"| {entry['task']} | {entry['scale_factor'] or '-'} | {entry['correct']} / {entry['questions']} |"
            f" {share:.2f} % | {entry['image_tokens']:.0f} |"
        )
    rows += ["", baselines]
    return "\n".join(rows)


def _phase_table(phases: dict[str, Any]) -> str:
    rows = ["## Training", "", "| phase | steps | minutes | loss, first to last | curve |", "|---|---|---|---|---|"]
    for phase, history in phases.items():
        losses = [loss for _, loss in history["loss"]]
        rows.append(
            f"| {PHASE_TITLES[phase]} | {history['steps']} | {history['seconds'] / 60:.1f} |"
            f" {losses[0]:.3f} to {losses[-1]:.3f} | {_sparkline(losses)} |"
        )
    return "\n".join(rows)


def _sparkline(values: list[float], width: int = 24) -> str:
    """A curve in one line of text."""
    stride = max(1, len(values) // width)
    values = values[::stride]
    low, high = min(values), max(values)
    return "".join(LEVELS[round((value - low) / ((high - low) or 1) * (len(LEVELS) - 1))] for value in values)
