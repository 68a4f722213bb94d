"""The HTTP service on loopback: what it gives, what it refuses, and many clients at once."""

import http.client
import io
import json
import runpy
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from flax import nnx
from processes import DEADLINE, ROOT

from asymvq_jax.commands.serve import main
from asymvq_jax.config import ModelConfig
from asymvq_jax.files.pictures import Picture, decode_picture, encode_picture
from asymvq_jax.inference import Crop, inpaint
from asymvq_jax.inference.batching import Batcher, BusyError, Job
from asymvq_jax.models.autoencoder import Autoencoder

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install -e '.[test]'")
service = pytest.importorskip("asymvq_jax.inference.service")

SIZES = {"encoder_channels": (8, 8, 8), "decoder_channels": (8, 8, 8), "encoder_blocks": 1, "decoder_blocks": 1}
CONFIG = ModelConfig(**SIZES, norm_groups=4)
LIMITS = service.Limits(bytes=200_000, pixels=64 * 64, waiting=8, batch=4)


@pytest.fixture(scope="module")
def model():
    return Autoencoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def port(model):
    """Of the service, in a thread."""
    config = uvicorn.Config(service.make_app(model, LIMITS), port=0, ws="none", log_level="warning")
    server = uvicorn.Server(config)
    listening = config.bind_socket()
    # Whoever comes before the server has started waits.
    listening.listen(128)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(DEADLINE)
    assert not thread.is_alive()


def picture(seed=0, size=(24, 32)):
    rng = np.random.default_rng(seed)
    mask = np.zeros((*size, 1), np.uint8)
    mask[5:15, 8:20] = 1
    return rng.integers(0, 256, (*size, 3)).astype(np.uint8), mask


def png(array):
    return encode_picture(Picture(array), "PNG")[0]


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def post(port, files, fields=None, *, chunked=False):
    """Sends a form; returns status and body."""
    boundary = uuid.uuid4().hex
    parts = []
    for name, data in files.items():
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="../../{name}"\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    for name, value in (fields or {}).items():
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        parts.append(head.encode())
    body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        pieces = iter([body[i : i + 8192] for i in range(0, len(body), 8192)]) if chunked else body
        connection.request("POST", "/inpaint", pieces, headers, encode_chunked=chunked)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def files(seed=0, **more):
    image, mask = picture(seed)
    return {"image": png(image), "mask": png(mask * 255), **more}


def test_a_picture_comes_back_as_the_library_makes_it(port, model):
    image, mask = picture()
    status, data = post(port, files())
    assert status == 200
    made = decode_picture(data).colour
    assert np.abs(made.astype(int) - inpaint(model, image, mask).image).max() <= 1
    rng = np.random.default_rng(5)
    latent = rng.normal(size=(4, 6, 8)).astype(np.float32)
    fields = {"keep": "exact", "blend": "none", "latent_scaled": "yes", "format": "webp"}
    status, data = post(port, files(latent=npy(latent)), fields, chunked=True)
    assert status == 200
    made = decode_picture(data).colour
    expected = inpaint(model, image, mask, latent, scaled=True, keep="exact", blend="none").image
    assert np.abs(made.astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(made[mask[..., 0] == 0], image[mask[..., 0] == 0])


def test_sixty_four_clients_lose_nothing(port, model):
    """Every picture is that client's own, and who is turned away is told so and served when it tries again."""
    turned_away, pause = [], threading.Event()

    def client(seed):
        image, mask = picture(seed)
        given = {"image": png(image), "mask": png(mask * 255)}
        while True:
            status, data = post(port, given, {"keep": "exact", "blend": "none"})
            if status == 200:
                made = decode_picture(data).colour
                kept = mask[..., 0] == 0
                return bool((made[kept] == image[kept]).all() and (made[~kept] != image[~kept]).any())
            assert status == 503, data
            assert "try again later" in json.loads(data)["error"]
            turned_away.append(seed)
            pause.wait(0.1)

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(client, range(64)))
    # Its queue holds 8, and 4 are decoded at once.
    assert turned_away


@pytest.mark.parametrize(
    ("change", "fields", "status", "message"),
    [
        ({"image": None}, {}, 400, "image: expected a file"),
        ({"image": None}, {"image": "/etc/passwd"}, 400, "image: expected a file"),
        ({"image": b"text"}, {}, 400, "image: no picture; expected"),
        ({"image": b"GIF89a" + bytes(20)}, {}, 400, "image: GIF; expected"),
        ({"image": png(picture()[0])[:200]}, {}, 400, "image is not a readable picture"),
        ({"image": png(np.zeros((65, 64, 3), np.uint8))}, {}, 413, "image: 4160 pixels; expected 4096 at most"),
        ({"image": png(np.zeros((8, 8, 3), np.uint8))}, {}, 400, "must have the same size"),
        ({"image": bytes(300_000)}, {}, 413, "the request is too large"),
        ({"latent": b"PK\3\4" + bytes(90)}, {}, 400, "latent: expected a .npy, .safetensors"),
        ({"latent": npy(np.zeros((4, 5, 5), np.float32))}, {}, 400, "the latent has shape (4, 5, 5)"),
        ({}, {"keep": "all"}, 400, "keep: "),
        ({}, {"band": "-1"}, 400, "band: "),
        ({}, {"crop_and_stitch": "yes", "keep": "model"}, 400, "does not go with crop_and_stitch"),
        ({}, {"keep": "exact", "format": "jpeg"}, 400, "format=jpeg changes every pixel"),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_bad_requests_are_told(port, change, fields, status, message, chunked):
    given = {name: data for name, data in (files() | change).items() if data is not None}
    answered, data = post(port, given, fields, chunked=chunked)
    assert (answered, message in json.loads(data)["error"]) == (status, True), data
    assert "Traceback" not in data.decode()


def test_nothing_to_generate_and_crop_and_stitch(port, model, monkeypatch):
    image, mask = picture()
    status, data = post(port, files(mask=png(mask * 0)))
    assert status == 200
    np.testing.assert_array_equal(decode_picture(data).colour, image)
    monkeypatch.setattr(service, "Crop", lambda context: Crop(context, 16))
    status, data = post(port, files(), {"crop_and_stitch": "true"})
    assert status == 200
    made = decode_picture(data).colour
    np.testing.assert_array_equal(made[mask[..., 0] == 0], image[mask[..., 0] == 0])


def test_one_bad_latent_of_a_batch_fails_alone(model):
    image, mask = picture()
    pixels, values = image.astype(np.float32) / 127.5 - 1, mask.astype(np.float32)
    batcher = Batcher(model, most=4, waiting=4)
    jobs = [Job(pixels, values) for _ in range(3)]
    jobs[1].latent = np.full((4, 6, 8), np.nan, np.float32)
    results = [batcher.submit(job) for job in jobs]
    # Who gives up is left out.
    assert batcher.submit(Job(pixels, values)).cancel()
    with pytest.raises(BusyError, match="4 pictures wait already"):
        batcher.submit(Job(pixels, values))
    with batcher:
        first, last = results[0].result(DEADLINE), results[2].result(DEADLINE)
        np.testing.assert_array_equal(first, last)
        with pytest.raises(ValueError, match="not finite"):
            results[1].result(DEADLINE)
    with pytest.raises(BusyError):
        batcher.submit(Job(pixels, values))


def test_the_node_for_comfyui(port, model):
    """What it sends and gives, with the tensors that ComfyUI hands to nodes."""
    torch = pytest.importorskip("torch")
    node = runpy.run_path(str(ROOT / "integrations" / "comfyui" / "asymvq_decode.py"))["AsymvqDecode"]()
    assert set(node.INPUT_TYPES()["required"]) == {"image", "mask", "keep", "blend", "address"}
    image, mask = picture()
    latent = np.random.default_rng(5).normal(size=(2, 4, 6, 8)).astype(np.float32)
    tensors = torch.from_numpy(np.stack([image, image[::-1]]) / np.float32(255)), torch.from_numpy(mask[None, ..., 0])
    address = f"http://127.0.0.1:{port}/"
    (made,) = node.run(*tensors, "exact", "none", address, {"samples": torch.from_numpy(latent)})
    for number, original in enumerate((image, image[::-1])):
        expected = inpaint(model, original, mask, latent[number], scaled=False, keep="exact", blend="none").image
        assert np.abs(made[number].numpy() * 255 - expected).max() < 1.01
    with pytest.raises(RuntimeError, match=r"asymvq serve: 400 .*the latent has shape \(4, 6, 7\)"):
        node.run(*tensors, "model", "none", address, {"samples": torch.zeros(2, 4, 6, 7)})
    with pytest.raises(RuntimeError, match="no asymvq serve at"):
        node.run(*tensors, "model", "none", "http://127.0.0.1:1")


def test_command_line_messages(capsys, monkeypatch):
    for options, message in ((["--port=0"], "--port 0"), (["--most-pixels=0"], "--most-pixels 0: expected 1 or more")):
        assert main(options) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([]) == 2
    assert "pip install -e '.[serve]'" in capsys.readouterr().err
