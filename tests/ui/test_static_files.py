"""What the page without a server is made of, and the models and places that are refused before an export."""

from __future__ import annotations

import hashlib
import io
import tarfile
from base64 import b64encode

import pytest
from huggingface_hub import cached_assets_path
from huggingface_hub.utils import httpx

from tokenpacker.hf import TokenPackerProcessor, carried_model_path
from tokenpacker.hf.versions import HAS_EXPORTERS
from tokenpacker.ui import npm_packages, static_page
from tokenpacker.ui.npm_packages import NpmPackage, unpack
from tokenpacker.ui.static_page import write_static_page

pytest.importorskip("onnxscript", reason="the export needs onnxscript")
pytestmark = pytest.mark.skipif(not HAS_EXPORTERS, reason="this version of transformers has no exporters")


def archive_of(**files: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/dist/{name}.mjs")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    return stream.getvalue()


@pytest.fixture
def package():
    content = archive_of(wanted="export {};", other="no")
    digest = b64encode(hashlib.sha512(content).digest()).decode()
    return content, NpmPackage("@some/package", "1.2.3", f"sha512-{digest}", ("dist/wanted.mjs",))


@pytest.fixture(autouse=True)
def registry(monkeypatch, tmp_path):
    """An empty cache, and a registry that answers with what is put into the list, or not at all."""
    answers, asked = [], []

    def get(address, **_):
        asked.append(address)
        if not answers:
            raise httpx.ConnectError("no route to host")
        return httpx.Response(200, content=answers[0], request=httpx.Request("GET", address))

    monkeypatch.setattr(httpx, "get", get)
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    return answers, asked


def test_a_package_is_fetched_once_and_only_the_needed_files_are_written(package, registry, tmp_path):
    (content, wanted), (answers, asked) = package, registry
    answers.append(content)
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        unpack(wanted, folder)
        assert [path.name for path in folder.iterdir()] == ["wanted.mjs"]
    assert asked == ["https://registry.npmjs.org/@some/package/-/package-1.2.3.tgz"]


def test_another_archive_than_expected_is_refused(package, registry, tmp_path):
    registry[0].append(archive_of(wanted="export const other = 1;"))
    with pytest.raises(OSError, match="SHA-512 differs"):
        unpack(package[1], tmp_path)
    assert list(cached_assets_path("tokenpacker", namespace="npm").iterdir()) == []


def test_without_a_network_the_message_says_where_to_put_the_archive(package, registry, tmp_path):
    content, wanted = package
    with pytest.raises(
        OSError, match=r"no route to host\); run `npm pack @some/package@1\.2\.3` elsewhere, and put"
    ) as told:
        unpack(wanted, tmp_path)
    cache = cached_assets_path("tokenpacker", namespace="npm")
    assert f"put some-package-1.2.3.tgz into {cache}" in str(told.value)
    (cache / "some-package-1.2.3.tgz").write_bytes(content)
    unpack(wanted, tmp_path)
    assert (tmp_path / "wanted.mjs").is_file()


def test_npms_variable_names_another_registry(package, monkeypatch):
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://npm.example.org/mirror/")
    assert package[1].address == "https://npm.example.org/mirror/@some/package/-/package-1.2.3.tgz"


def test_a_folder_that_is_taken_is_refused_before_anything_is_fetched(tiny_model, registry, tmp_path):
    processor = TokenPackerProcessor.from_pretrained(carried_model_path())
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already; choose another folder, or pass --overwrite"):
        write_static_page(tiny_model, processor, tmp_path)
    with pytest.raises(ValueError, match="is no model's folder and is not replaced"):
        write_static_page(tiny_model, processor, tmp_path, overwrite=True)
    assert registry[1] == []


def test_a_page_never_replaces_the_model_that_it_shows(tiny_model, registry, tmp_path):
    processor = TokenPackerProcessor.from_pretrained(carried_model_path())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="which is read; choose another folder to write"):
        write_static_page(tiny_model, processor, tmp_path, overwrite=True, sources=[tmp_path])
    assert (tmp_path / "config.json").read_text() == "{}"
    assert registry[1] == []


@pytest.mark.parametrize(
    ("option", "value"), [("image_mode", "pad"), ("antialias", False), ("thumbnail_source", "canvas")]
)
def test_a_processor_that_the_page_does_not_know_is_refused(tiny_model, tmp_path, option, value):
    processor = TokenPackerProcessor.from_pretrained(carried_model_path())
    setattr(processor.image_processor, option, value)
    with pytest.raises(ValueError, match=f"model mine has {option}={value!r}, and the page knows"):
        write_static_page(tiny_model, processor, tmp_path / "page", name="mine")


def test_a_model_that_is_too_large_for_a_tab_is_refused(tiny_model, tmp_path, monkeypatch):
    processor = TokenPackerProcessor.from_pretrained(carried_model_path())
    monkeypatch.setattr(static_page, "MAX_WEIGHT_BYTES", 100_000)
    with pytest.raises(ValueError, match="MB of weights in float32, and a page takes 0; use a server instead"):
        write_static_page(tiny_model, processor, tmp_path / "page")


def test_the_files_of_the_page_belong_to_the_package():
    names = {path.name for path in static_page.STATIC.iterdir()}
    assert {"index.html", "style.css", "page.js", "tiling.js", "sequence.js"} <= names
    ours = [
        (static_page.STATIC / name).read_text(encoding="utf-8").count("\n") for name in ("tiling.js", "sequence.js")
    ]
    assert sum(ours) <= 500  # the processor, written a second time, stays small
    assert npm_packages.RUNTIME.version in npm_packages.RUNTIME.archive
