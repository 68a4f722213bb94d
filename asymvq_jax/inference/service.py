"""A small HTTP service: picture, mask and perhaps a latent in, the finished picture out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import ImageError, InputError, UserError
from asymvq_jax.files.decoding import Array, opened
from asymvq_jax.files.formats import HEAD, picture_format
from asymvq_jax.files.masks import Channel, Mask, decode_mask
from asymvq_jax.files.pictures import Picture, decode_picture, encode_picture
from asymvq_jax.files.tensors import LatentFile, decode_latent_file, is_plain
from asymvq_jax.inference.batching import Batcher, BusyError, Job
from asymvq_jax.inference.blend import Blend
from asymvq_jax.inference.crop import Crop, Region
from asymvq_jax.inference.inpainting import Keep, Keeping, compose, margin_of, ways_of_keeping
from asymvq_jax.inference.latents import Layout, check_latent
from asymvq_jax.inference.whole import check_condition
from asymvq_jax.models.autoencoder import Autoencoder

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# What is read of the kinds that Pillow knows.
KINDS = ("PNG", "JPEG", "WEBP")
BANDS = 256
FILES = ("image", "mask", "latent")
# Seconds between two pieces of a request.
SLOWEST = 30


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        bytes: of the whole request.
        pixels: of a picture.
        waiting: pictures in the queue; more are turned away.
        batch: pictures at once.
        seconds: that a picture may take.
    """

    bytes: int = 32 * 2**20
    pixels: int = 2**22
    waiting: int = 64
    batch: int = 8
    seconds: float = 600


class TooLargeError(UserError):
    """More bytes or pixels than the service takes."""


@dataclass(frozen=True)
class Settings:
    """A request's fields; see `asymvq inpaint`."""

    keep: Keep | None
    blend: Blend | None
    band: int | None
    crop: Crop | None
    soft_mask: bool
    mask_channel: Channel | None
    invert_mask: bool
    latent_layout: Layout | None
    latent_scaled: bool | None
    format: str

    def keeping(self) -> Keeping:
        """How pixels are kept."""
        return ways_of_keeping(self.keep, self.blend, self.band, exact="crop_and_stitch" if self.crop else "")


def make_app(model: Autoencoder, limits: Limits) -> FastAPI:
    """The service of an autoencoder: POST /inpaint, and GET /health."""
    batcher = Batcher(model, limits.batch, limits.waiting)
    # Read here: while the batcher's thread calls the model, nnx takes its attributes away for a moment.
    config = model.config

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        with batcher:
            yield

    # The pages about the interface load scripts from elsewhere.
    app = FastAPI(title="asymvq-jax", lifespan=running, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, limits=limits)

    @app.get("/health")
    async def health() -> dict[str, int]:
        return {"waiting": batcher.waiting}

    @app.post("/inpaint", response_class=Response)
    async def inpaint(
        image: UploadFile,
        mask: UploadFile,
        latent: UploadFile | None = None,
        keep: Annotated[Keep | None, Form()] = None,
        blend: Annotated[Blend | None, Form()] = None,
        band: Annotated[int | None, Form(ge=0, le=BANDS)] = None,
        crop_and_stitch: Annotated[bool, Form()] = False,
        context: Annotated[float, Form(ge=1, le=100)] = 1.5,
        soft_mask: Annotated[bool, Form()] = False,
        mask_channel: Annotated[Channel | None, Form()] = None,
        invert_mask: Annotated[bool, Form()] = False,
        latent_layout: Annotated[Layout | None, Form()] = None,
        latent_scaled: Annotated[Literal["yes", "no"] | None, Form()] = None,
        format: Annotated[Literal["png", "webp", "jpeg"], Form()] = "png",
    ) -> Response:
        crop = Crop(context) if crop_and_stitch else None
        settings = Settings(
            keep, blend, band, crop, soft_mask, mask_channel, invert_mask, latent_layout,
            None if latent_scaled is None else latent_scaled == "yes", format.upper(),
        )  # fmt: skip
        sent = None if latent is None else await latent.read()
        work = await run_in_threadpool(_prepare, config, limits, settings, await image.read(), await mask.read(), sent)
        decoded = None
        if work.job is not None:
            waiting = asyncio.wrap_future(batcher.submit(work.job))
            decoded = await asyncio.wait_for(waiting, limits.seconds)
        data = await run_in_threadpool(_finish, work, decoded, settings)
        return Response(data, media_type=f"image/{format}", headers={"X-Asymvq-Mask": work.mask.describe()})

    _explain_errors(app)
    return app


def _explain_errors(app: FastAPI) -> None:
    """Every error is {"error": one line}, with a status that says whose it is."""

    def answer(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": text}, status, headers)

    @app.exception_handler(UserError)
    def wrong(_: Request, error: UserError) -> JSONResponse:
        return answer(413 if isinstance(error, TooLargeError) else 400, str(error))

    @app.exception_handler(BusyError)
    def busy(_: Request, error: BusyError) -> JSONResponse:
        return answer(503, str(error), {"Retry-After": "5"})

    @app.exception_handler(TimeoutError)
    def late(_: Request, __: TimeoutError) -> JSONResponse:
        return answer(503, "the picture took too long; try again later", {"Retry-After": "60"})

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"][1:]))
        wanted = "expected a file, sent as multipart/form-data" if field in FILES else first["msg"]
        return answer(400, f"{field}: {wanted}")


@dataclass(frozen=True)
class Work:
    """What a request asks for; no job where nothing is to be generated."""

    picture: Picture
    mask: Mask
    region: Region | None = None
    job: Job | None = None


def _prepare(
    config: ModelConfig, limits: Limits, settings: Settings, image: bytes, mask: bytes, latent: bytes | None
) -> Work:
    keeping = settings.keeping()
    if keeping.keep == "model":
        check_condition(config)
    elif settings.format == "JPEG":
        raise InputError("format=jpeg changes every pixel; expected png or webp where pixels are kept exactly")
    picture, read = _read(image, mask, settings, limits)
    edited = None if latent is None else _read_latent(latent)
    if read.empty:
        return Work(picture, read)
    region = None if settings.crop is None else settings.crop.region(read.values, config.downsampling)
    seen = picture if region is None else region.enter(picture)
    small = read.values if region is None else region.enter_mask(read.values)
    job = Job(seen.to_float(), small.astype(np.float32), margin=margin_of(config, keeping))
    if edited is not None:
        job.layout = settings.latent_layout or edited.layout
        job.scaled = edited.scaled if settings.latent_scaled is None else settings.latent_scaled
        check_latent(edited.values, config, seen.size, job.layout)
        job.latent = edited.values
    return Work(picture, read, region, job)


def _finish(work: Work, decoded: Array | None, settings: Settings) -> bytes:
    """The finished picture's file."""
    picture = work.picture
    if decoded is not None:
        picture, _ = compose(picture, decoded, work.mask.values, settings.keeping(), work.region)
    return encode_picture(picture, settings.format)[0]


def _read(image: bytes, mask: bytes, settings: Settings, limits: Limits) -> tuple[Picture, Mask]:
    for name, data in (("image", image), ("mask", mask)):
        kind = (picture_format(data[:HEAD]) or "").upper()
        if kind not in KINDS:
            raise ImageError(f"{name}: {kind or 'no picture'}; expected a file of one of {', '.join(KINDS)}")
        with opened(data, name) as head:
            pixels = head.size[0] * head.size[1]
        if pixels > limits.pixels:
            raise TooLargeError(f"{name}: {pixels} pixels; expected {limits.pixels} at most")
    picture = decode_picture(image, "image")
    read = decode_mask(
        mask, "mask", soft=settings.soft_mask, channel=settings.mask_channel, invert=settings.invert_mask
    )
    if read.size != picture.size:
        (h, w), (ih, iw) = read.size, picture.size
        raise InputError(f"the mask is {w} x {h} px and the picture {iw} x {ih} px; they must have the same size")
    return picture, read


def _read_latent(data: bytes) -> LatentFile:
    if not is_plain(data):
        raise InputError("latent: expected a .npy, .safetensors or .latent file")
    return decode_latent_file(data, "latent")


class Gate:
    """Turns requests away before their bodies are read: too many at once, or too large.

    A body whose length is not said is counted while it comes.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], limits: Limits) -> None:
        """Stands before an application."""
        self._app, self._limits = app, limits
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http" or scope["method"] == "GET":
            return await self._app(scope, receive, send)
        limits = self._limits
        large = f"the request is too large: expected {limits.bytes} bytes at most"
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > limits.bytes:
            return await JSONResponse({"error": large}, 413)(scope, receive, send)
        if self._inside >= limits.waiting + limits.batch:
            error = {"error": f"{self._inside} pictures wait already; try again later"}
            return await JSONResponse(error, 503, {"Retry-After": "5"})(scope, receive, send)
        seen, whole = 0, False

        async def counted() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), SLOWEST)
            except TimeoutError:
                raise HTTPException(408, f"nothing came for {SLOWEST} s") from None
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > limits.bytes:
                raise HTTPException(413, large)
            return message

        self._inside += 1
        try:
            await self._app(scope, counted, send)
        finally:
            self._inside -= 1
