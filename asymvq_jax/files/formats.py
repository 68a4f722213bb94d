"""Kinds of files by their names and by their first bytes."""

from __future__ import annotations

from pathlib import PurePath

# Endings of the pictures that Pillow reads (HEIC with pillow-heif).
_PICTURES = """
    .apng .avif .avifs .bmp .dds .dib .gif .heic .heics .heif .heifs .hif .icb .ico .j2k .jfi .jfif .jif .jp2 .jpe
    .jpeg .jpf .jpg .jpx .mpo .pbm .pcx .pfm .pgm .png .pnm .ppm .psd .qoi .ras .sgi .tga .tif .tiff .vda .vst .webp
    .xbm .xpm
"""
PICTURES = frozenset(_PICTURES.split())
# Endings of what lies beside pictures and is not opened to find out; cameras' raw files are TIFFs that begin with a
# thumbnail.
_OTHERS = """
    .arrow .arw .avi .bin .caption .cfg .ckpt .cr2 .cr3 .csv .db .dng .doc .docx .gz .html .ini .jax .json .jsonl
    .latent .lock .log .md .mkv .mov .mp4 .nef .npy .npz .ods .orf .parquet .partial .pdf .pickle .pkl .pt .pth .py .raf
    .rst .rw2 .safetensors .sha256 .svg .tar .toml .tsv .txt .webm .xlsx .xml .xmp .yaml
    .yml .zip
"""
OTHERS = frozenset(_OTHERS.split())
# How many bytes `picture_format` needs.
HEAD = 32

_BEGINNINGS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"BM": "BMP",
    b"8BPS": "PSD",
    b"DDS ": "DDS",
    b"qoif": "QOI",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
}
# Brands of ISO media files, ISO/IEC 23008-12.
_BRANDS = {
    "AVIF": (b"avif", b"avis"),
    "HEIC": (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"),
}


def picture_format(head: bytes) -> str | None:
    """The picture format that a file's first `HEAD` bytes are of, or None."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        # The compatible brands follow, because the first is often only "some picture".
        brands = [head[8:12], *(head[i : i + 4] for i in range(16, len(head), 4))]
        return next((name for name, known in _BRANDS.items() if any(brand in known for brand in brands)), None)
    if len(head) > 2 and head[:1] == b"P" and head[1:2] in b"123456fF" and head[2:3].isspace():
        return "PNM"
    # Two bytes alone begin many other files; a BMP's fields 6 to 9 are reserved, and zero.
    if head[:2] == b"BM" and head[6:10] != bytes(4):
        return None
    return next((name for start, name in _BEGINNINGS.items() if head.startswith(start)), None)


def named_as_picture(path: PurePath) -> bool:
    """Whether the name ends as a picture's."""
    return path.suffix.lower() in PICTURES


def named_as_other(path: PurePath) -> bool:
    """Whether the name ends as that of a common file that is not a picture."""
    return path.suffix.lower() in OTHERS
