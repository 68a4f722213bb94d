"""TensorBoard's event file: the records are those of its own library, and one that cannot be written is left."""

import struct
import subprocess
import sys
import textwrap

import numpy as np
from etils import epath
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from asymvq_jax.training.board import Board


def read_events(path):
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_events_are_written_at_once_as_the_library_writes_them(tmp_path):
    board = Board(epath.Path(tmp_path / "board"), first_step=5)
    board.scalar("held_out/l1", 0.25, 5)
    board.picture("pictures", np.full((4, 6, 3), 200, np.uint8), 6)
    (file,) = (tmp_path / "board").iterdir()
    version, start, scalar, picture = read_events(file)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (5, event_pb2.SessionLog.START)
    assert (scalar.step, scalar.summary.value[0].tag, scalar.summary.value[0].simple_value) == (5, "held_out/l1", 0.25)
    assert (picture.step, picture.summary.value[0].image.height, picture.summary.value[0].image.width) == (6, 4, 6)
    oracle = RecordWriter(str(tmp_path / "oracle"))
    for event in (version, start, scalar, picture):
        oracle.write(event.SerializeToString())
    oracle.close()
    assert file.read_bytes() == (tmp_path / "oracle").read_bytes()


def test_a_full_disk_is_told_once_and_nothing_is_printed_at_exit(tmp_path):
    program = """
        import logging, resource, signal, sys
        from importlib.util import find_spec
        import numpy as np
        from etils import epath
        from asymvq_jax.training.board import Board

        # tensorboardX would import them, which takes as long as all else that a run imports; they are there when asked
        # for.
        for name in ("torch", "boto3", "google.cloud.storage"):
            assert name not in sys.modules
            assert find_spec(name)
        logging.basicConfig(format="%(message)s")
        # As a quota does.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
        board = Board(epath.Path(sys.argv[1]), first_step=0)
        for step in range(3):
            board.picture("noise", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), step)
        board.flush()
        """

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "board")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("TensorBoard's file cannot be written")
