"""Bytes of a picture file to arrays, in the depth that the file has."""

from __future__ import annotations

import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from asymvq_jax.errors import ImageError
from asymvq_jax.files.formats import HEAD, picture_format

Array = npt.NDArray[Any]

# Pillow's own bound, from which on it takes a picture for an attack on the memory.
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
# From half of that bound on it warns, in words about its own code.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Of a compressed text or profile, which is 1 MB; programs that write their whole workflow into a PNG need more.
PngImagePlugin.MAX_TEXT_CHUNK = 2**25
# Of damaged metadata, which `metadata.read_metadata` reports.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# These log what they raise.
for _name in ("PIL", "tifffile"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)
_LIMIT = threading.Lock()
_ORIENTATION = 0x0112


class UnknownKindError(ImageError):
    """A file that Pillow does not know."""


class Pixels(NamedTuple):
    """What a file's pixels are.

    Attributes:
        colour: (h, w, 1) for grey or (h, w, 3), uint8 or uint16, upright.
        alpha: (h, w, 1) of the same type, or None.
        notes: what was changed in reading, a line each.
        turned: whether the file's orientation was applied.
    """

    colour: Array
    alpha: Array | None
    notes: tuple[str, ...] = ()
    turned: bool = False


@contextmanager
def opened(data: bytes | IO[bytes], name: str, *, large: bool = False) -> Iterator[Image.Image]:
    """A picture that Pillow has opened, of which only the head is read.

    Args:
        data: the file.
        name: how messages call it.
        large: whether pictures of more than `MOST_PIXELS` are wanted.

    Raises:
        ImageError: the file cannot be read, here or in the body of `with`.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    with _readable(name, stream), _unlimited() if large else nullcontext(), _open(stream) as image:
        _check_size(name, image.size, large)
        yield image


def _open(stream: IO[bytes]) -> Image.Image:
    head = stream.read(HEAD)
    stream.seek(0)
    if picture_format(head) == "HEIC":
        try:
            import pillow_heif
        except ImportError:
            raise ImageError(
                "is a HEIC picture: install pillow-heif (pip install pillow-heif), or convert it to PNG or JPEG"
            ) from None
        pillow_heif.register_heif_opener()
    return Image.open(stream)


@contextmanager
def _readable(name: str, stream: IO[bytes]) -> Iterator[None]:
    """Turns the errors that broken pictures raise into an ImageError that names the picture."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name} {error}") from None
    except UnidentifiedImageError:
        # Pillow's own words name an object in memory.
        raise UnknownKindError(f"{name} is not a readable picture: {_describe(stream)}") from None
    except Image.DecompressionBombError:
        raise ImageError(_too_large(name)) from None
    except MemoryError:
        raise ImageError(f"{name} needs more memory than there is") from None
    # Pillow's readers raise what their parsing trips over: OSError, SyntaxError, struct.error, IndexError, KeyError ...
    except Exception as error:
        raise ImageError(f"{name} is not a readable picture: {_reason(error)}") from None


def _describe(stream: IO[bytes]) -> str:
    """Why nothing can read a file."""
    stream.seek(0)
    head = stream.read(512)
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; fetch the picture with: git lfs pull"
    if re.match(rb"\s*<(!doctype\s+html|html)", head, re.IGNORECASE):
        return "it is a web page"
    if re.match(rb"\s*<(\?xml|svg)", head):
        return "it is XML or SVG, not pixels"
    kind = picture_format(head[:HEAD])
    if kind == "JPEG XL":
        return "it is a JPEG XL picture, which cannot be read here; convert it to PNG or JPEG"
    if kind is not None:
        return f"damaged, or of a kind of {kind} that cannot be read here"
    what = next((what for beginning, what in _STRANGERS if re.match(beginning, head, re.DOTALL)), None)
    return "no known format" if what is None else f"it is {what}"


# What people take for pictures, by its beginning.
_STRANGERS = (
    (rb"\x93NUMPY", "a NumPy array; write it as a picture: PIL.Image.fromarray(array).save(...)"),
    (rb"PK\x03\x04", "a zip archive; unpack it first"),
    (rb"%PDF", "a PDF document; export the page as PNG"),
    (rb"\x76\x2f\x31\x01|#\?(RADIANCE|RGBE)", "a picture of high dynamic range; save it with 8 or 16 bits"),
    (rb"P7\s", "a PAM picture; convert it to PNG"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a video; save the frame as PNG"),
    (rb"\s*[{\[]", "JSON, such as an annotation; draw what it describes as a picture"),
)


def _too_large(name: str) -> str:
    return (
        f"{name} has more than {MOST_PIXELS / 1e6:.0f} million pixels, which is taken for a mistake or an attack "
        "unless large pictures are asked for"
    )


def _check_size(name: str, size: tuple[int, int], large: bool) -> None:
    if min(size) < 1:
        raise ImageError("has no pixels")
    if not large and size[0] * size[1] > MOST_PIXELS:
        raise Image.DecompressionBombError


@contextmanager
def _unlimited() -> Iterator[None]:
    """Lifts Pillow's bound, which is a global variable."""
    with _LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def orientation(image: Image.Image, stream: IO[bytes] | None = None) -> int:
    """How an opened picture is to be turned, 1 to 8 as EXIF has it; 1 for TIFFs, which Pillow turns by itself.

    Args:
        image: as `opened` gives it.
        stream: its file, which spares decoding a PNG whose head has no EXIF and XMP.
    """
    if image.format == "TIFF":
        return 1
    known = image.info.keys() & {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}
    if image.format == "PNG" and not known and stream is not None and not _has_late_exif(stream):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    # The pixels can be read even where the EXIF block is broken.
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def _has_late_exif(stream: IO[bytes]) -> bool:
    """Whether a PNG has EXIF or text behind its pixels."""
    position, behind = stream.tell(), False
    stream.seek(8)
    try:
        while len(head := stream.read(8)) == 8:
            behind = behind or head[4:] == b"IDAT"
            if behind and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            stream.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
        return False
    finally:
        stream.seek(position)


def upright(array: Array, turn: int) -> Array:
    """An (h, w, ...) array as it is to be shown, by EXIF's orientation."""
    if turn in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        array = array[:, ::-1]
    if turn in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array)


def decode_pixels(image: Image.Image, data: bytes) -> Pixels:
    """The first frame of an opened picture, upright.

    Args:
        image: what `opened` gives for `data`, inside its `with`.
        data: the file.

    Raises:
        ImageError: pixels of which it is not known what they show.
    """
    if image.format == "TIFF" and (image.tag_v2.get(254, 0) & 1 or 50706 in image.tag_v2):  # type: ignore[attr-defined]
        # The picture itself is not the file's first.
        raise ImageError("is a camera's raw picture, of which only a thumbnail can be read: develop it to TIFF or PNG")
    # Before the pixels are loaded, when Pillow forgets it.
    stored = image.tag_v2.get(_ORIENTATION, 1) if image.format == "TIFF" else 1  # type: ignore[attr-defined]
    deep = _deep(image, data)
    turn = orientation(image, io.BytesIO(data))
    if deep is None:
        pixels = _from_pillow(image, data)
    else:
        pixels, turn = deep, stored if image.format == "TIFF" else turn
    if turn != 1:
        alpha = None if pixels.alpha is None else upright(pixels.alpha, turn)
        pixels = pixels._replace(colour=upright(pixels.colour, turn), alpha=alpha)
    return pixels._replace(turned=turn != 1 or stored != 1)


def _from_pillow(image: Image.Image, data: bytes) -> Pixels:
    image.load()
    notes = _bits(image, data)
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint16)[..., None]
        clear = image.info.get("transparency")
        alpha = None if clear is None else np.where(wide == clear, 0, 65535).astype(np.uint16)
        return Pixels(wide, alpha, notes)
    if image.mode == "I":
        return Pixels(_from_integers(np.asarray(image))[..., None], None, notes)
    if image.mode == "F":
        return Pixels(from_floats(np.asarray(image)[..., None]), None, (*notes, FLOAT))
    if image.format == "TIFF" and 0 in image.tag_v2.get(338, ()):  # type: ignore[attr-defined]
        notes = (*notes, EXTRA)
    image, converted = _to_grey_or_rgb(image)
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[2] in (2, 4):
        return Pixels(array[..., :-1], array[..., -1:], (*notes, *converted))
    return Pixels(array, None, (*notes, *converted))


EXTRA = "channels beside the colours, whose meaning the file does not say, are left out"
FLOAT = "floating-point pixels are kept in 16 bits"


def from_floats(values: Array) -> Array:
    """Floating-point pixels in [0, 1] to uint16; raises ImageError for any others, which could mean anything."""
    if not np.isfinite(values).all():
        raise ImageError("has floating-point pixels that are not finite (NaN or infinity)")
    # Half precision ends at 65504.
    values = values.astype(np.float32) if values.dtype == np.float16 else values
    low, high = float(values.min()), float(values.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ImageError(
            f"has floating-point pixels from {low:g} to {high:g}: expected 0 (black) to 1 (white); "
            "scale them, or save 8 or 16 bits"
        )
    return np.round(np.clip(values, 0, 1) * 65535).astype(np.uint16)


def _from_integers(values: Array) -> Array:
    """32-bit integers; what Pillow makes of 16-bit files has 16 bits."""
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"has 32-bit pixels from {values.min()} to {values.max()}: expected 16 bits at most; save 8 or 16 bits"
        )
    return values.astype(np.uint16)


def _to_grey_or_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """In mode L, LA, RGB or RGBA, and what that changed."""
    mode = image.mode
    if mode in ("CMYK", "LAB"):
        return _to_srgb(image), (f"{mode} colours are converted to sRGB",)
    clear = image.has_transparency_data
    grey = mode in ("1", "L", "LA", "La")
    if mode in ("P", "PA") and image.palette is not None:
        colours = np.frombuffer(bytes(image.palette.getdata()[1]), np.uint8)
        colours = colours[: len(colours) // len(image.palette.mode) * len(image.palette.mode)]
        colours = colours.reshape(-1, len(image.palette.mode))[:, :3]
        grey = bool((colours == colours[:, :1]).all())
    wanted = ("L" if grey else "RGB") + ("A" if clear else "")
    if mode == wanted:
        return image, ()
    if mode in ("La", "RGBa", "P", "PA", "1") or clear:
        # By way of RGBA, since few modes convert to LA.
        image = image.convert("RGBA" if clear else "RGB")
        if grey:
            bands = image.split()
            return (Image.merge("LA", (bands[0], bands[3])) if clear else bands[0]), ()
        return image, ()
    return image.convert(wanted), ()


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        source = ImageCms.createProfile("LAB")
    elif profile:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))  # type: ignore[assignment]
    else:
        return image.convert("RGB")
    try:
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:
        return image.convert("RGB")
    assert converted is not None
    return converted


def _bits(image: Image.Image, data: bytes) -> tuple[str, ...]:
    """A note where the file has more bits a channel than Pillow gives."""
    bits = 8
    if image.format in ("AVIF", "HEIF") and (at := data.find(b"pixi", 0, 2**16)) > 0:
        # The box of ISO/IEC 23008-12: version and flags, the number of channels, the bits of each.
        bits = max(data[at + 9 : at + 9 + data[at + 8]], default=8)
    elif image.format == "JPEG2000" and not image.mode.startswith("I") and (at := data.find(b"ihdr", 0, 2**10)) > 0:
        bits = (data[at + 14] & 0x7F) + 1
    return (f"{bits} bits a channel are read as 8",) if bits > 8 else ()


def _deep(image: Image.Image, data: bytes) -> Pixels | None:
    """Colours of more than 8 bits, which Pillow would cut down to 8; None where there are none."""
    if image.format == "PNG" and data[24] == 16 and data[25] in (2, 4, 6):
        # Pillow sees whether the file is whole; OpenCV fills what is missing.
        image.load()
        return _from_bgr(_imdecode(data), grey=data[25] == 4)
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (1,))  # type: ignore[attr-defined]
        if max(bits) > 8 and not image.mode.startswith(("I", "F")):
            return _from_tiff(data)
    if image.format == "PPM" and image.mode == "RGB":
        return _from_pnm(data)
    return None


def _imdecode(data: bytes) -> Array | None:
    """OpenCV's reading of a file, without what it would write to stderr about a damaged one."""
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)


def _from_bgr(array: Array | None, *, grey: bool = False) -> Pixels:
    if array is None or array.dtype not in (np.uint8, np.uint16):
        raise ImageError("has pixels of a kind that cannot be read")
    array = array[..., None] if array.ndim == 2 else array
    alpha = np.ascontiguousarray(array[..., 3:]) if array.shape[2] == 4 else None
    colour = array[..., :1] if grey or array.shape[2] == 1 else array[..., 2::-1]
    return Pixels(np.ascontiguousarray(colour), alpha)


def _from_pnm(data: bytes) -> Pixels | None:
    head = re.match(rb"P6(?:\s+|\s*#[^\n]*\n)+(\d+)(?:\s+|\s*#[^\n]*\n)+(\d+)(?:\s+|\s*#[^\n]*\n)+(\d+)\s", data)
    if head is None or int(head[3]) < 256:
        return None
    width, height, most = (int(part) for part in head.groups())
    if len(data) - head.end() < 6 * width * height:
        raise ImageError("is cut off")
    values = np.frombuffer(data, ">u2", 3 * width * height, head.end()).reshape(height, width, 3)
    return Pixels(np.round(values.astype(np.float64) * (65535 / most)).clip(0, 65535).astype(np.uint16), None)


def read_tiff(data: bytes, name: str, *, large: bool = False) -> Pixels:
    """The first page of a TIFF that Pillow does not know, such as colours in floating point.

    Raises:
        ImageError: it cannot be read in another way either.
    """
    stream = io.BytesIO(data)
    with _readable(name, stream):
        return _from_tiff(data, large=large)


def _reason(error: Exception) -> str:
    """The first line of a reader's message, without objects in memory."""
    if not isinstance(error, (OSError, SyntaxError, ValueError)):
        return f"it is damaged ({type(error).__name__})"
    return re.sub(r"<[^>]*>\s*", "", str(error)).strip().partition("\n")[0] or "it is damaged"


def _from_tiff(data: bytes, *, large: bool = True) -> Pixels:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        # 3 is a palette.
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE or len(page.shape) not in (2, 3):
            raise ImageError(f"is a TIFF of a kind that cannot be read, of shape {page.shape}")
        if not large and page.imagewidth * page.imagelength > MOST_PIXELS:
            raise Image.DecompressionBombError
        array = _tiff_array(page, data)
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and array.ndim == 3:
            array = array.transpose(1, 2, 0)
        inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        known = (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE)
        associated, unspecified = page.extrasamples[:1] == (1,), page.extrasamples[:1] == (0,)
        photometric, kind = page.photometric, tifffile.PHOTOMETRIC(page.photometric).name
    array = array[..., None] if array.ndim == 2 else array
    if kind in ("CFA", "LINEAR_RAW"):
        raise ImageError("is a camera's raw picture: develop it to TIFF or PNG")
    if photometric not in known or array.shape[2] not in (1, 2, 3, 4):
        raise ImageError(
            f"is a TIFF of {array.shape[2]} channels ({kind}): expected grey or RGB, with or without alpha"
        )
    notes: tuple[str, ...] = ()
    if array.dtype.kind == "f":
        array, notes = from_floats(array), (FLOAT,)
    elif array.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"has pixels of type {array.dtype}: expected 8 or 16 bits, or floating point from 0 to 1")
    most = np.iinfo(array.dtype).max
    array = most - array if inverted else array
    colours = 1 if array.shape[2] < 3 else 3
    alpha = np.ascontiguousarray(array[..., colours:]) if array.shape[2] > colours else None
    if alpha is not None and unspecified:
        alpha, notes = None, (*notes, EXTRA)
    colour = np.ascontiguousarray(array[..., :colours])
    if alpha is not None and associated:
        share = np.maximum(alpha, 1).astype(np.float64)
        colour = np.round(np.minimum(colour / share, 1) * most).astype(array.dtype)
    return Pixels(colour, alpha, notes)


def _tiff_array(page: Any, data: bytes) -> Array:
    """A page as it is stored; OpenCV knows compressions for which tifffile needs more packages."""
    try:
        return np.asarray(page.asarray())
    except ValueError:
        array = _imdecode(data)
        if array is None:
            raise
        return array[..., (2, 1, 0, 3)[: array.shape[2]]] if array.ndim == 3 else array
