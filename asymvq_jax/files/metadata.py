"""What a picture's file says beside its pixels: profile, EXIF, XMP, resolution, texts; from one format to another."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

_ORIENTATION = ExifTags.Base.Orientation
# What of a TIFF's own tags is about the picture and not about how the file is laid out.
_TIFF_TAGS = {
    *(269, 270, 271, 272, 305, 306, 315, 316, 18246, 18249, 33432, 34665, 34853),
    *(0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F),
}
_PNG_COLOUR = ("gamma", "srgb", "chromaticity")


@dataclass(frozen=True)
class Metadata:
    """Everything in a picture's file that is not pixels, none of which turns the picture.

    Attributes:
        profile: the ICC colour profile.
        exif: EXIF, as the formats embed it, without orientation and thumbnail.
        xmp: the XMP packet.
        dpi: horizontal and vertical resolution.
        texts: PNG's text chunks by keyword.
        comment: JPEG's or GIF's comment.
        colour: PNG's gamma and the like, where there is no profile, as Pillow has them.
        lost: what could not be read or kept, a line each.
    """

    profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    texts: dict[str, str] = field(default_factory=dict)
    comment: bytes | None = None
    colour: dict[str, Any] = field(default_factory=dict)
    lost: tuple[str, ...] = ()


NOTHING = Metadata()


def read_metadata(image: Image.Image) -> Metadata:
    """Of a picture that Pillow has opened and loaded."""
    info, lost = image.info, []
    try:
        exif = _exif(image)
    # Cameras and editors write EXIF that no reader takes; the picture does not depend on it.
    except Exception as error:
        exif = None
        lost.append(f"EXIF metadata cannot be read: {error or type(error).__name__}")
    try:
        pages = int(getattr(image, "n_frames", 1))
    # Frames beyond the first may be damaged.
    except Exception:
        pages = 2
    if pages > 1:
        lost.append(f"of {pages} frames or pages the first is used")
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp if isinstance(xmp, bytes) else None
    texts = {
        str(name): str(text)
        for name, text in (getattr(image, "text", None) or {}).items()
        if name not in ("XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type xmp")
    }
    comment = info.get("comment")
    comment = comment.encode() if isinstance(comment, str) else comment if isinstance(comment, bytes) else None
    profile = info.get("icc_profile")
    return Metadata(
        profile=profile if isinstance(profile, bytes) and len(profile) > 128 else None,
        exif=exif,
        xmp=None if xmp is None else _upright_xmp(xmp),
        dpi=_resolution(info.get("dpi")),
        texts=texts,
        comment=comment,
        colour={name: info[name] for name in _PNG_COLOUR if name in info and not profile},
        lost=tuple(lost),
    )


def _exif(image: Image.Image) -> bytes | None:
    exif = image.getexif()
    kept = Image.Exif()
    for tag, value in exif.items():
        if tag != _ORIENTATION and (image.format != "TIFF" or tag in _TIFF_TAGS):
            kept[tag] = value
    for group in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if group in exif and (inside := exif.get_ifd(group)):
            kept[group] = dict(inside)
    return kept.tobytes() if len(kept) else None


def _upright_xmp(xmp: bytes) -> bytes:
    xmp = re.sub(rb'\s*tiff:Orientation="[0-9]"', b"", xmp)
    return re.sub(rb"<tiff:Orientation>[0-9]</tiff:Orientation>", b"", xmp)


def _resolution(dpi: object) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in dpi)  # type: ignore[attr-defined]
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 0 < x < 1e6 and 0 < y < 1e6 else None


def profile_space(profile: bytes) -> str:
    """The colour space that an ICC profile is for: "RGB", "GRAY", "CMYK" ..."""
    return profile[16:20].decode("latin-1").strip()


def save_options(metadata: Metadata, kind: str, *, grey: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What `PIL.Image.save` is to be given so that a file says the same.

    Args:
        metadata: what was read.
        kind: Pillow's name of the format, "PNG", "JPEG" or "WEBP".
        grey: whether one channel is written (without alpha).

    Returns:
        The options, and what this format cannot say, a line each.
    """
    options: dict[str, Any] = {}
    lost: list[str] = []
    if metadata.profile is not None:
        space = profile_space(metadata.profile)
        if space == ("GRAY" if grey else "RGB"):
            options["icc_profile"] = metadata.profile
        else:
            lost.append(f"the colour profile is one for {space}, which the pixels written are not")
    if metadata.exif is not None:
        if kind == "JPEG" and len(metadata.exif) > 65533:
            lost.append("the EXIF metadata is too long for a JPEG")
        else:
            options["exif"] = metadata.exif
    if metadata.xmp is not None and kind != "PNG":
        if kind == "JPEG" and len(metadata.xmp) > 65504:
            lost.append("the XMP metadata is too long for a JPEG")
        else:
            options["xmp"] = metadata.xmp
    if metadata.dpi is not None:
        if kind == "WEBP":
            lost.append("WebP has no place for the resolution")
        else:
            options["dpi"] = metadata.dpi
    if kind == "PNG":
        options["pnginfo"] = _png_chunks(metadata)
    elif metadata.texts:
        lost.append(f"only PNG holds text chunks ({', '.join(metadata.texts)})")
    if metadata.colour and kind != "PNG" and metadata.colour.get("gamma", 0.45455) != 0.45455:
        lost.append("only PNG holds a gamma value")
    if "cicp" in metadata.colour and kind != "PNG":
        lost.append("only PNG holds a cICP chunk, which says what the colours are (as of HDR pictures)")
    if metadata.comment is not None and kind == "JPEG":
        options["comment"] = metadata.comment
    return options, (*metadata.lost, *lost)


def _png_chunks(metadata: Metadata) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for name, text in metadata.texts.items():
        chunks.add_itxt(name, text) if not text.isascii() else chunks.add_text(name, text)
    if metadata.comment is not None:
        chunks.add_text("Comment", metadata.comment.decode("latin-1"))
    if metadata.xmp is not None:
        chunks.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode("utf-8", "replace"))
    if "cicp" in metadata.colour:
        chunks.add(b"cICP", metadata.colour["cicp"])
    if "gamma" in metadata.colour:
        chunks.add(b"gAMA", struct.pack(">I", round(metadata.colour["gamma"] * 100000)))
    if "srgb" in metadata.colour:
        chunks.add(b"sRGB", bytes([metadata.colour["srgb"]]))
    if "chromaticity" in metadata.colour:
        chunks.add(b"cHRM", struct.pack(">8I", *(round(value * 100000) for value in metadata.colour["chromaticity"])))
    return chunks
