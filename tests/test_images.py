"""Every kind of picture that people have on disk: the right pixels, or one line that names the file and the remedy."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenpacker.images import ImageError, ImageNote, image_size, load_image, load_unconverted


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(height: int, width: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


def picture(height: int = 40, width: int = 60) -> Image.Image:
    """A smooth gradient, so that lossy formats keep it within a few grey levels."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * y // height, 255 * x // width, np.full_like(y, 90)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def one_line_error(source) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_close(image: Image.Image, expected: Image.Image, tolerance: int) -> None:
    assert image.mode == "RGB"
    assert image.size == expected.size
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected.convert("RGB")).astype(int))
    assert difference.max() <= tolerance


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF"])
def test_a_path_gives_the_pixels_of_the_file(tmp_path, format):
    path = tmp_path / f"picture.{format.lower()}"
    grey = picture().convert("L")  # a GIF's palette holds every grey
    grey.save(path)
    assert_close(load_image(path), grey, 0)
    assert_close(load_image(str(path)), grey, 0)
    assert_close(load_image(path.read_bytes()), grey, 0)


def test_a_pillow_image_is_not_changed():
    given_image = picture().convert("P")
    load_image(given_image)
    assert given_image.mode == "P"


def test_cmyk_gives_the_colours_that_were_stored():
    tolerance = 12  # JPEG's loss
    assert_close(load_image(encoded(picture().convert("CMYK"), "JPEG", quality=95)), picture(), tolerance)


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    loaded = load_image(encoded(image, "PNG"))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_half_transparent_pixels_are_blended_with_white():
    loaded = load_image(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG"))
    assert loaded.getpixel((0, 0)) == (127, 127, 127)


def test_a_palette_with_a_transparent_entry_becomes_white_there():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    loaded = load_image(encoded(image, "PNG", transparency=1))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None]  # (1, 256)
    loaded = np.asarray(load_image(encoded(Image.fromarray(ramp), format)))
    assert np.array_equal(loaded[0, :, 0], np.arange(256))


TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def xmp(orientation: int) -> bytes:
    return b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


@pytest.mark.parametrize("format", ["PNG", "TIFF", "packed TIFF", "TIFF with XMP", "WEBP", "JPEG", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured_from_a_path_bytes_and_a_pillow_image_alike(tmp_path, orientation, format):
    options = {
        "TIFF": {"exif": oriented(orientation)},
        "packed TIFF": {"exif": oriented(orientation), "compression": "tiff_lzw"},
        "TIFF with XMP": {"tiffinfo": {700: xmp(orientation)}},
        "WEBP": {"exif": oriented(orientation), "lossless": True},
        "JPEG": {"exif": oriented(orientation), "quality": 98, "subsampling": 0},
        "MPO": {"exif": oriented(orientation), "quality": 98, "subsampling": 0},
    }.get(format, {"exif": oriented(orientation)})
    content = encoded(picture(), next(name for name in format.split() if name.isupper() and name != "XMP"), **options)
    expected = Image.fromarray(np.ascontiguousarray(TURNS[orientation](np.asarray(picture()))))
    path = tmp_path / "turned"
    path.write_bytes(content)
    decoded = Image.open(path)
    decoded.load()
    for source in (path, content, Image.open(path), decoded, decoded.copy()):
        assert image_size(source) == (expected.height, expected.width)
        loaded = load_image(source)
        assert_close(loaded, expected, 6 if "quality" in options else 0)
        assert image_size(loaded) == (expected.height, expected.width)  # not turned again
        assert_close(load_image(loaded), loaded, 0)


def with_late_metadata(png: bytes) -> bytes:
    """The PNG with its eXIf chunk moved behind the pixels."""
    start = png.index(b"eXIf") - 4
    stop = start + 12 + struct.unpack(">I", png[start : start + 4])[0]
    end = png.index(b"IEND") - 4
    return png[:start] + png[stop:end] + png[start:stop] + png[end:]


def test_exif_data_behind_the_pixels_of_a_png_are_honoured():
    content = with_late_metadata(encoded(picture(40, 60), "PNG", exif=oriented(6)))
    assert content.index(b"IDAT") < content.index(b"eXIf")
    assert image_size(content) == (60, 40)
    assert load_image(content).size == (40, 60)


def test_the_size_of_a_png_is_known_without_its_pixels():
    content = encoded(picture(40, 60), "PNG")
    place = content.index(b"IDAT") + 4
    damaged = content[:place] + bytes(20) + content[place + 20 :]
    assert image_size(damaged) == (40, 60)
    with pytest.raises(ImageError, match="the file is damaged"):
        load_image(damaged)


def test_an_animation_gives_its_first_frame_and_says_so():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.warns(ImageNote, match="holds several frames; only the first is used"):
        loaded = load_image(content)
    assert loaded.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["GIF", "TIFF"])
def test_the_frames_of_a_file_are_not_counted(format):
    """Pillow visits each, which takes minutes for a TIFF that holds nothing but beginnings of frames."""
    file = io.BytesIO()
    frames = [Image.new("L", (8, 8), shade) for shade in range(5)]
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    plugin = type(Image.open(file))
    with pytest.warns(ImageNote), mock.patch.object(plugin, "n_frames", property(lambda _: pytest.fail("counted"))):
        load_image(file.getvalue())


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_extreme_shapes_load(size):
    assert load_image(encoded(picture(*size), "PNG")).size == size[::-1]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_says_that_it_is_damaged(tmp_path, format):
    path = tmp_path / "cut.img"
    content = encoded(picture(200, 300), format)
    path.write_bytes(content[: len(content) // 2])
    message = one_line_error(path)
    assert str(path) in message
    assert "damaged" in message


def test_bad_files_are_named_with_a_remedy(tmp_path):
    empty, text = tmp_path / "empty.png", tmp_path / "notes.png"
    empty.touch()
    text.write_text("not an image")
    assert one_line_error(empty) == f"{empty} is empty (0 bytes); the download or copy failed, fetch it again"
    assert one_line_error(text).startswith(f"{text} is not an image that Pillow can read; give a PNG")
    assert one_line_error(tmp_path / "no.png") == f"{tmp_path / 'no.png'} does not exist; check the path"
    assert one_line_error(tmp_path).startswith(f"{tmp_path} is a folder")
    assert "null" in one_line_error("a\0b.png")


@pytest.mark.parametrize("size", [(20000, 20000), (13400, 13400)])
def test_too_many_pixels_are_refused_before_decoding(tmp_path, size):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(*size))
    assert f"{path} " in one_line_error(path)
    assert "178,956,970 pixels allowed; shrink it first" in one_line_error(path)
    with pytest.raises(ImageError, match="allowed"):
        image_size(path)


def test_a_large_image_within_the_limit_gives_no_warning_about_bombs():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(png_header(10000, 10000)) == (10000, 10000)


@pytest.mark.parametrize(
    "address", ["https://example.org/cat.png", "file:///etc/passwd", "FTP://x/y", "data:image/png;base64,AA"]
)
def test_addresses_are_not_fetched(address):
    assert "none is fetched; download the image and give its path" in one_line_error(address)


def test_things_that_are_no_images_name_their_type():
    assert "ndarray is not supported" in one_line_error(np.full((4, 4, 3), np.nan))
    assert "NoneType is not supported" in one_line_error(None)


def test_floating_point_and_wide_integer_pixels_are_refused():
    assert "floating-point pixels" in one_line_error(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)))
    assert "beyond 0..65535" in one_line_error(Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


LARGE_TEXTS = {
    "a packed text": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"words " * 400_000)),
    "an international text": png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"words " * 400_000)),
    "many texts": b"".join(png_chunk(b"tEXt", b"Comment\0" + b"w" * 2**23) for _ in range(9)),
    "one text": png_chunk(b"tEXt", b"Comment\0" + b"w" * (2**26 + 1)),
    "a colour profile": png_chunk(b"iCCP", b"press\0\0" + zlib.compress(bytes(2_700_000))),
    "a text that unpacks to much": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**26), 1)),
}


@pytest.mark.parametrize("text", LARGE_TEXTS)
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_a_png_with_large_texts_is_read_and_turned_as_it_says(tmp_path, text, before):
    content = encoded(picture(), "PNG", exif=oriented(6))
    place = content.index(before) - 4
    content = content[:place] + LARGE_TEXTS[text] + content[place:]
    path = tmp_path / "commented.png"
    path.write_bytes(content)
    expected = Image.fromarray(np.ascontiguousarray(TURNS[6](np.asarray(picture()))))
    for source in (path, content):
        assert image_size(source) == (60, 40)
        assert_close(load_image(source), expected, 0)


def test_the_orientation_in_a_small_text_is_kept_beside_a_large_one():
    orientation = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6))
    content = encoded(picture(), "PNG")
    place = content.index(b"IDAT") - 4
    for texts in (LARGE_TEXTS["a packed text"] + orientation, orientation + LARGE_TEXTS["a packed text"]):
        assert load_image(content[:place] + texts + content[place:]).size == (40, 60)


def test_a_png_with_large_texts_is_still_refused_for_too_many_pixels_and_damage():
    text = LARGE_TEXTS["a packed text"]
    huge = png_header(20000, 20000)
    assert "178,956,970 pixels allowed" in one_line_error(huge[:33] + text + huge[33:])
    content = encoded(picture(200, 300), "PNG")
    assert "damaged" in one_line_error(content[:33] + text + content[33 : len(content) // 2])


@pytest.mark.parametrize("mode", ["L", "RGBA", "RGB"])
def test_an_unconverted_picture_is_read_with_the_same_care(mode):
    content = encoded(picture(200, 300).convert(mode), "PNG", exif=oriented(6))
    read = load_unconverted(content[:33] + LARGE_TEXTS["a packed text"] + content[33:])
    assert read.mode == mode
    assert_close(read.convert("RGB"), load_image(content), 0)
    with pytest.raises(ImageError, match=r"cannot be decoded \(.*\); the file is damaged, save it anew"):
        load_unconverted(content[: len(content) // 2])


def test_damaged_metadata_does_not_spoil_the_picture():
    content = encoded(picture(), "JPEG", exif=b"Exif\0\0garbage, not a TIFF header", quality=95)
    assert load_image(content).size == picture().size


@settings(deadline=None)  # a loaded machine is no failure
@given(
    position=st.floats(0, 1), byte=st.integers(0, 255), format=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
)
def test_a_damaged_byte_gives_an_image_or_an_image_error(position, byte, format):
    content = bytearray(encoded(picture(), format))
    content[int(position * (len(content) - 1))] = byte
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImageError):
            assert load_image(bytes(content)).mode == "RGB"
