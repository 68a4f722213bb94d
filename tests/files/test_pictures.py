"""Pictures of every kind: what is read, what a written file keeps, and that damaged ones end in one line."""

import io
import struct
import zlib
from collections import Counter

import cv2
import numpy as np
import pytest
import tifffile
from fuzzing import TIMES, tell
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from asymvq_jax.errors import ImageError, OutputError, UserError
from asymvq_jax.files import images
from asymvq_jax.files.decoding import FLOAT, MOST_PIXELS
from asymvq_jax.files.formats import HEAD, picture_format
from asymvq_jax.files.masks import understand
from asymvq_jax.files.pictures import (
    Picture,
    check_fits,
    decode_picture,
    decode_shown,
    encode_picture,
    png16,
    read_picture,
    read_size,
    write_picture,
)

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (20, 30, 3)).astype(np.uint8)
WIDE = RNG.integers(0, 65536, (20, 30, 3)).astype(np.uint16)


def _saved(image, kind, **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def _tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def _cv2(array, suffix):
    return cv2.imencode(suffix, array[..., ::-1])[1].tobytes()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_cv2(WIDE, ".png"), id="png"),
        pytest.param(_cv2(WIDE, ".tif"), id="tiff of OpenCV, compressed"),
        pytest.param(_tiff(WIDE, photometric="rgb"), id="tiff"),
        pytest.param(_tiff(WIDE.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), id="planes"),
        pytest.param(_tiff(WIDE, photometric="rgb", compression="zlib", predictor=True), id="tiff, deflated"),
        pytest.param(b"P6 30 20\n65535\n" + WIDE.astype(">u2").tobytes(), id="ppm"),
        pytest.param(png16(WIDE), id="our own png"),
    ],
)
def test_sixteen_bits_are_kept(data):
    picture = decode_picture(data)
    np.testing.assert_array_equal(picture.colour, WIDE)
    assert picture.alpha is None
    np.testing.assert_array_equal(decode_shown(data), np.round(WIDE / 257))
    np.testing.assert_allclose(picture.to_float(), WIDE / 32767.5 - 1, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_are_written(tmp_path, channels):
    """Pillow and OpenCV, which know nothing of each other, read what we write."""
    array = RNG.integers(0, 65536, (9, 13, channels)).astype(np.uint16)
    colours = 1 if channels < 3 else 3
    picture = Picture(array[..., :colours], array[..., colours:] if channels in (2, 4) else None)
    assert write_picture(tmp_path / "a.png", picture) == ()
    again = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(again.colour, picture.colour)
    if picture.alpha is not None:
        np.testing.assert_array_equal(again.alpha, picture.alpha)
    theirs = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)
    assert theirs.dtype == np.uint16
    np.testing.assert_array_equal(theirs.reshape(9, 13, -1)[..., 0], array[..., 2 if channels > 2 else 0])
    with Image.open(tmp_path / "a.png") as opened:
        opened.load()
    lost = write_picture(tmp_path / "a.webp", picture)
    assert "8 bits" in lost[0]


def test_grey_and_colour_of_the_same_values_are_read_alike():
    grey = _saved(Image.fromarray(WIDE[..., 0]), "PNG")
    colour = png16(np.repeat(WIDE[..., :1], 3, -1))
    np.testing.assert_array_equal(decode_shown(grey), decode_shown(colour))


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floating_point_is_read_as_it_is_shown(shape, kind):
    values = np.linspace(0, 1, int(np.prod(shape))).reshape(shape).astype(kind)
    picture = decode_picture(_tiff(values, photometric="rgb" if len(shape) == 3 else "minisblack"))
    np.testing.assert_array_equal(picture.colour.reshape(shape), np.round(values.astype(np.float32) * 65535))
    assert FLOAT in picture.notes
    for wrong, message in ((values * 255, "pixels from 0 to 255: expected 0"), (values * np.nan, "not finite")):
        with pytest.raises(ImageError, match=message):
            decode_picture(_tiff(wrong.astype(np.float32), photometric="rgb" if len(shape) == 3 else "minisblack"))


def test_numbers_that_could_mean_anything_are_refused():
    for array, message in (
        (WIDE[..., 0].astype(np.uint32) * 60000, "32-bit|uint32"),
        (np.zeros((20, 30, 5), np.uint8), "5 channels"),
    ):
        with pytest.raises(ImageError, match=message):
            decode_picture(_tiff(array, photometric="minisblack", planarconfig="contig"), "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "LAB", "YCbCr", "I;16"])
def test_modes(mode):
    image = Image.fromarray(COLOUR)
    image = Image.fromarray(WIDE[..., 0]) if mode == "I;16" else image.convert(mode)
    picture = decode_picture(_saved(image, "JPEG" if mode == "YCbCr" else "TIFF"))
    assert picture.colour.shape == (20, 30, 1 if mode in ("1", "L", "LA", "I;16") else 3)
    assert (picture.alpha is not None) == (mode in ("LA", "RGBA"))
    assert any("sRGB" in note for note in picture.notes) == (mode in ("CMYK", "LAB"))
    if mode == "L":
        np.testing.assert_array_equal(picture.colour[..., 0], np.asarray(image))


def test_a_palette_of_greys_is_grey():
    grey = Image.fromarray(COLOUR[..., 0]).convert("P")
    assert decode_picture(_saved(grey, "PNG")).colour.shape[2] == 1
    assert decode_picture(_saved(Image.fromarray(COLOUR).convert("P"), "GIF")).colour.shape[2] == 3


def _exif(orientation=None):
    exif = Image.Exif()
    exif[0x8298], exif[0x9003] = "(c) Somebody", "2024:01:01 00:00:00"
    if orientation:
        exif[0x0112] = orientation
    return exif


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6" b="1"/></x:xmpmeta>'


def _profile(space="sRGB"):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_metadata_survive(tmp_path, suffix, bits):
    text = PngInfo()
    text.add_text("parameters", "a fox")
    text.add_itxt("title", "狐")
    data = _saved(
        COLOUR, "PNG", exif=_exif(), pnginfo=text, dpi=(300, 200), icc_profile=_profile(),
    )  # fmt: skip
    picture = decode_picture(data)
    if bits == 16:
        picture = Picture(picture.colour.astype(np.uint16) * 257, None, picture.metadata)
    lost = write_picture(tmp_path / f"a.{suffix}", picture)
    with Image.open(tmp_path / f"a.{suffix}") as result:
        result.load()
        assert result.getexif()[0x8298] == "(c) Somebody"
        assert result.getexif().get_ifd(0x8769) or result.getexif().get(0x9003)
        assert result.info["icc_profile"] == _profile()
        if suffix == "png":
            assert result.info["parameters"] == "a fox"
            assert result.info["title"] == "狐"
        else:
            assert any("text chunks (parameters, title)" in line for line in lost)
        if suffix == "webp":
            assert any("resolution" in line for line in lost)
        else:
            np.testing.assert_allclose(result.info["dpi"], (300, 200), atol=1)


def test_xmp_survives_without_the_orientation_that_was_applied(tmp_path):
    picture = decode_picture(_saved(COLOUR, "JPEG", xmp=XMP))
    assert picture.size == (30, 20)
    for suffix in ("png", "jpg", "webp"):
        write_picture(tmp_path / f"a.{suffix}", picture)
        again = read_picture(tmp_path / f"a.{suffix}")
        assert again.size == (30, 20)
        assert again.metadata.xmp == XMP.replace(b' tiff:Orientation="6"', b"")


def test_a_profile_of_other_channels_is_not_embedded():
    grey = Picture(COLOUR[..., :1], None, decode_picture(_saved(COLOUR, "PNG", icc_profile=_profile())).metadata)
    data, lost = encode_picture(grey, "PNG")
    assert "icc_profile" not in Image.open(io.BytesIO(data)).info
    assert "profile" in lost[0]
    assert decode_picture(_saved(Image.fromarray(COLOUR).convert("CMYK"), "TIFF")).metadata.profile is None


def test_a_png_s_gamma_survives(tmp_path):
    body = b"gAMA" + struct.pack(">I", 100000)
    chunk = struct.pack(">I", 4) + body + struct.pack(">I", zlib.crc32(body))
    data = _saved(COLOUR, "PNG")
    write_picture(tmp_path / "a.png", decode_picture(data[:33] + chunk + data[33:]))
    with Image.open(tmp_path / "a.png") as result:
        assert result.info["gamma"] == 1.0


def test_a_png_s_code_for_its_colours_survives(tmp_path):
    """As HDR pictures have it."""
    body = b"cICP" + bytes([9, 16, 0, 1])
    chunk = struct.pack(">I", 4) + body + struct.pack(">I", zlib.crc32(body))
    for data in (_saved(COLOUR, "PNG"), png16(WIDE)):
        picture = decode_picture(data[:33] + chunk + data[33:])
        write_picture(tmp_path / "a.png", picture)
        assert chunk in (tmp_path / "a.png").read_bytes()
        assert any("cICP" in lost for lost in write_picture(tmp_path / "a.webp", picture))


def test_a_long_compressed_text_is_no_reason_to_refuse_a_picture():
    """Programs write their whole workflow into a PNG."""
    info = PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    assert len(decode_picture(_saved(COLOUR, "PNG", pnginfo=info)).metadata.texts["workflow"]) == 3_000_000


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_channels_of_no_stated_meaning_are_left_out_and_said(kind):
    array = np.dstack([COLOUR, COLOUR[..., :1]]).astype(kind)
    picture = decode_picture(_tiff(array, photometric="rgb", extrasamples=["unspecified"]))
    np.testing.assert_array_equal(picture.colour, array[..., :3])
    assert picture.alpha is None
    assert any("whose meaning the file does not say" in note for note in picture.notes)


def test_what_a_file_has_beyond_one_picture_is_said():
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 200, 90)]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        picture = decode_picture(_saved(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert abs(int(picture.colour[0, 0, 0]) - 10) < 3
        assert any("of 3 frames or pages the first" in note for note in picture.notes)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_head_and_body_agree_on_the_size(tmp_path, kind):
    for orientation in range(1, 9):
        path = tmp_path / f"a{orientation}"
        path.write_bytes(_saved(COLOUR, kind, exif=_exif(orientation)))
        assert read_size(path) == read_picture(path).size == ((30, 20) if orientation > 4 else (20, 30))
        with Image.open(path) as stored:
            stored.load()
            if kind == "PNG":
                from PIL import ImageOps

                np.testing.assert_array_equal(read_picture(path).colour, np.asarray(ImageOps.exif_transpose(stored)))


def test_head_and_body_agree_on_a_deep_turned_tiff_and_on_exif_behind_the_pixels(tmp_path):
    (tmp_path / "a.tif").write_bytes(_tiff(WIDE, photometric="rgb", extratags=[(274, "H", 1, 6, True)]))
    assert read_size(tmp_path / "a.tif") == (30, 20)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").colour, np.rot90(WIDE, -1))
    data = _saved(COLOUR, "PNG")
    body = b"eXIf" + _exif(6).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "late.png").write_bytes(data[:-12] + chunk + data[-12:])
    assert read_size(tmp_path / "late.png") == read_picture(tmp_path / "late.png").size == (30, 20)


def test_painting_into_a_cut_out():
    """Kept pixels are the file's own, also where they are not seen; the fill is opaque; the rest shows as it should."""
    alpha = np.full((20, 30, 1), 255, np.uint8)
    alpha[:, 20:], alpha[:5] = 0, 128
    picture = Picture(COLOUR, alpha)
    mask = np.zeros((20, 30, 1), np.float32)
    mask[8:12, 15:25] = 1
    shown = np.full((20, 30, 3), 0.5, np.float32)
    kept = mask[..., 0] == 0
    done = picture.painted(shown, mask, kept)
    np.testing.assert_array_equal(done.colour[kept], COLOUR[kept])
    np.testing.assert_array_equal(done.alpha[kept], alpha[kept])
    assert (done.alpha[~kept] == 255).all()
    assert (done.colour[~kept] == 191).all()
    faded = np.maximum(picture.to_float(), 0)
    through = picture.painted(faded, mask * 0, np.zeros_like(kept))
    np.testing.assert_array_equal(through.alpha, alpha)
    visible = np.broadcast_to(alpha > 0, COLOUR.shape)
    expected = np.maximum(picture.shown(), 127)
    assert np.abs(through.shown().astype(int) - expected)[visible].max() <= 1


def test_grey_stays_grey():
    done = Picture(COLOUR[..., :1]).painted(images.to_float(COLOUR), np.ones((20, 30, 1)), np.zeros((20, 30), bool))
    assert done.colour.shape == (20, 30, 1)
    np.testing.assert_allclose(done.colour[..., 0], COLOUR.mean(-1), atol=0.51)


def test_limits_of_formats(tmp_path):
    check_fits("a.png", (8, 20000))
    for name, width in (("a.webp", 16384), ("a.JPG", 65536)):
        check_fits(name, (8, width - 1))
        with pytest.raises(OutputError, match=rf"{width} x 8 px cannot be written as .*name a \.png file"):
            check_fits(name, (8, width))
        with pytest.raises(OutputError, match="cannot be written as"):
            images.write(tmp_path / name, np.zeros((1, width, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def _bomb(width, height):
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    packed = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_large_pictures_are_read_where_they_are_wanted(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(_bomb(2**17, 2**17))
    for read in (read_picture, read_size, images.read):
        with pytest.raises(ImageError, match=r"bomb\.png has more than 179 million pixels"):
            read(tmp_path / "bomb.png")
    assert read_size(tmp_path / "bomb.png", large=True) == (2**17, 2**17)
    assert MOST_PIXELS > 1e8
    # A small stand-in for a panorama.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr("asymvq_jax.files.decoding.MOST_PIXELS", 200)
    images.write(tmp_path / "a.png", COLOUR)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", large=True).colour, COLOUR)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(ImageError, match="unless large pictures are asked for"):
        read_picture(tmp_path / "a.png")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html></html>", "it is a web page"),
        (b"<?xml version='1.0'?><svg/>", "XML or SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer; fetch"),
        (b"\xff\x0a" + bytes(50), "JPEG XL picture, which cannot be read"),
        (b"II*\0" + bytes(100), "not a readable picture"),
        (b"some text", "no known format"),
        (b"\x93NUMPY\x01\0", "a NumPy array"),
        (b'[{"segmentation": {}}]', "JSON, such as an annotation"),
        (b"\0\0\0\x18ftypisom" + bytes(50), "a video"),
        (b"%PDF-1.7", "a PDF document"),
        (b"#?RADIANCE\n", "high dynamic range"),
        (_tiff(WIDE[..., 0], photometric=32803), "a camera's raw picture"),
        (_tiff(COLOUR, photometric="rgb", subfiletype=1), "a camera's raw picture, of which only a thumbnail"),
        (HEIC, "HEIC"),
    ],
)
def test_what_is_no_picture_is_called_what_it_is(data, message):
    with pytest.raises(ImageError, match=rf"^a\.png .*{message}"):
        decode_picture(data, "a.png")


def test_heic_is_read_with_its_reader(monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    data = _saved(np.full((32, 48, 3), 90, np.uint8), "HEIF", quality=90)
    assert picture_format(data[:HEAD]) == "HEIC"
    assert abs(decode_shown(data).astype(int) - 90).max() < 4


KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "PCX", "SGI", "QOI")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "YCbCr", "LAB")


def _odd_file(rng):
    """A small picture of a random kind, most often damaged: cut off, or bits flipped, or its head changed."""
    height, width = (1, int(rng.integers(1, 2000))) if rng.random() < 0.1 else rng.integers(1, 60, 2)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
    kind, mode = KINDS[rng.integers(len(KINDS))], MODES[rng.integers(len(MODES))]
    image = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    several = {"save_all": True, "append_images": [image]} if kind in ("GIF", "TIFF", "WEBP") else {}
    try:
        data = bytearray(_saved(image, kind, exif=_exif(int(rng.integers(1, 9))), **several))
    except (OSError, KeyError, ValueError):
        data = bytearray(_saved(image if mode in ("F", "LAB") else image.convert("RGB"), "TIFF"))
    damage = rng.integers(4)
    if damage == 0:
        del data[rng.integers(len(data)) :]
    elif damage == 1:
        for _ in range(rng.integers(1, 30)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif damage == 2:
        data[rng.integers(min(64, len(data)))] = rng.integers(256)
    return bytes(data)


def _outcome(data, index):
    """The picture, and the one line that reading or writing it, or taking it for a mask, ended in."""
    picture = None
    try:
        picture = decode_picture(data, "a")
        check_fits("a.webp", picture.size)
        encode_picture(picture, ("PNG", "JPEG", "WEBP")[index % 3])
        understand(picture, soft=bool(index % 2))
    except UserError as error:
        return picture, str(error)
    return picture, ""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_file_gives_a_picture_or_one_line():
    rng = np.random.default_rng(TIMES)
    outcomes = Counter[str]()
    for index in range(300 * TIMES):
        data = _odd_file(rng)
        picture, message = _outcome(data, index)
        outcomes["refused in one line" if picture is None else "read, refused as masks" if message else "read"] += 1
        assert "\n" not in message
        if picture is None:
            assert message
            with pytest.raises(UserError):
                decode_shown(data, "a")
            continue
        assert picture.colour.dtype in (np.uint8, np.uint16)
        assert picture.colour.shape[2] in (1, 3)
        if picture.alpha is not None:
            assert picture.alpha.shape == (*picture.size, 1)
            assert picture.alpha.dtype == picture.colour.dtype
        np.testing.assert_array_equal(decode_shown(data, "a"), picture.to_uint8())
    tell("odd and damaged pictures", outcomes)
    assert 0.2 < outcomes["refused in one line"] / outcomes.total() < 0.8
