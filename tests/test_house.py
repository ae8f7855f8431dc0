"""The rules that keep the package small enough to hold in one's head."""

import ast
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "tokenpacker"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted({path.parent for path in FILES})
MAX_LINES, MAX_FILES = 400, 14

# From the bottom; a room imports from its own layer and from those before it. The package's own files are the core.
LAYERS = (
    {"", "projectors"},
    {"hf"},
    {"checkpoints", "plugins", "scenes", "visualize"},
    {"data"},
    {"evaluate"},
    {"train"},
    {"carried"},
    {"export", "serve", "speed"},
    {"batch", "compare", "ui"},
    {"cli", "demo"},
)
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imported_rooms(path: Path) -> set[str]:
    """Rooms whose modules a file imports, those of `if TYPE_CHECKING` left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    inside = [name.split(".")[1] for name in names if name.startswith("tokenpacker.")]
    return {name if (PACKAGE / name).is_dir() else "" for name in inside}


def test_every_room_has_its_layer():
    assert {room_of(path) for path in FILES} == set(RANK)


@pytest.mark.parametrize("room", sorted(RANK), ids=lambda room: room or "core")
def test_imports_point_down(room):
    entry_points = {PACKAGE / "__main__.py"}  # `python -m tokenpacker` is the command line
    files = [path for path in FILES if room_of(path) == room and path not in entry_points]
    wrong = {(path.name, other) for path in files for other in imported_rooms(path) if RANK[other] > RANK[room]}
    assert not wrong


def test_a_file_name_stands_once():
    """Except for a command, which has the name of what it runs."""
    names = Counter(path.name for path in FILES if "commands" not in path.parts and not path.name.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_a_room_has_about_a_dozen_files():
    sizes = {str(room.relative_to(PACKAGE)): len(list(room.glob("*.py"))) for room in ROOMS}
    assert {room: size for room, size in sizes.items() if size > MAX_FILES} == {}


def test_a_file_is_read_in_one_sitting():
    sizes = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: size for path, size in sizes.items() if size > MAX_LINES} == {}
