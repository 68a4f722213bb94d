"""The limit on waiting for others, and where a run's time goes."""

import threading
import time

import jax
import pytest

from asymvq_jax.devices import waiting
from asymvq_jax.devices.waiting import Watch
from asymvq_jax.errors import CheckpointError, ExitCode, LostPeerError, NonFiniteError
from asymvq_jax.training.clock import Clock, StepTimes


class _Service:
    """JAX's coordination service, as far as it is used; the other process has got to `count`."""

    def __init__(self, count: int) -> None:
        self.notes = {f"{waiting.NOTES}/1": f"{count} the results of step 3"}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite == key.startswith(waiting.NOTES)
        self.notes[key] = value

    def key_value_dir_get(self, folder):
        assert folder in (waiting.NOTES, waiting.FAILURES)
        return [(key, value) for key, value in self.notes.items() if key.startswith(folder)]


@pytest.mark.parametrize(
    ("count", "expected"), [(1, "process 1 has not arrived (last at the results of step 3)"), (2, "")]
)
def test_a_wait_beyond_the_limit_ends_the_process_and_names_who_is_missing(
    count, expected, monkeypatch, capsys, caplog
):
    monkeypatch.setattr(waiting, "_client", lambda: _Service(count))
    monkeypatch.setattr("jax.process_count", lambda: 2)
    left = []
    with Watch(0.2, "start again", left.append) as watch:
        with watch.waiting("the first"):
            pass
        with watch.waiting("the checkpoint of step 3"):
            end = time.monotonic() + 60
            while not left and time.monotonic() < end:
                time.sleep(0.01)
    assert left[0] == ExitCode.LOST_PEER
    error = capsys.readouterr().err
    assert "error: waiting for the checkpoint of step 3 since" in error
    assert "longer than run.wait_limit=0.2; start again" in error
    assert expected in error
    assert ("has not arrived" in error) == bool(expected)
    assert "the run ends after 0 s" in caplog.text


def test_a_wait_within_the_limit_is_nobodys_business(caplog, capsys):
    left = []
    with Watch(30.0, "", left.append) as watch, watch.waiting("nothing"):
        pass
    assert (left, caplog.text, capsys.readouterr().err) == ([], "", "")


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (CheckpointError("a checkpoint cannot be written"), "2 a checkpoint cannot be written"),
        (OSError(28, "no space"), "2 [Errno 28] no space"),
        (NonFiniteError("step 3: l1 not finite"), "1 step 3: l1 not finite"),
        # These come of another process's end.
        (jax.errors.JaxRuntimeError("connection closed"), None),
        (LostPeerError("it has ended"), None),
    ],
)
def test_what_fails_in_one_process_ends_the_others_with_its_words_and_code(error, note, monkeypatch, capsys):
    service, left = _Service(0), []
    monkeypatch.setattr(waiting, "_client", lambda: service)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(waiting, "LOOK", 0.001)
    with pytest.raises(type(error)), Watch(30.0, "", left.append):
        raise error
    failures = {key: value for key, value in service.notes.items() if key.startswith(waiting.FAILURES)}
    assert failures == ({} if note is None else {f"{waiting.FAILURES}/0": note})
    if note is None:
        return
    monkeypatch.setattr(waiting, "GRACE", 0.001)
    # One that fails by itself goes on to its own end.
    watch = Watch(30.0, "", left.append)
    watch.fails()
    watch._listen()
    assert left == []
    ended = threading.Event()
    with Watch(30.0, "", lambda code: (left.append(code), ended.set())):
        assert ended.wait(60)
    code, _, text = note.partition(" ")
    assert left == [int(code)]
    assert capsys.readouterr().err == f"error: process 0 has failed: {text}\n"


def test_every_second_is_charged_to_one_kind(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    clock = Clock()
    spend(1)
    with clock.spending("restore"):
        spend(2)
    clock.continues({"steps": 10.0, "lost": 4.0})
    clock.begin()
    for _ in range(4):
        with clock.spending("input"):
            spend(1)
        spend(3)
    lap = clock.lap(4)
    assert (lap.steps_per_second, lap.waiting, lap.total) == (4 / 16, 4 / 16, 33)
    with clock.spending("evaluate"):
        spend(5)
        with clock.spending("compile"):
            spend(2)
    spend(8)
    assert clock.spent["evaluate"] == 5
    assert clock.total == 48
    expected = {"start": 1, "restore": 2, "compile": 2, "steps": 30, "input": 4, "evaluate": 5, "save": 0, "lost": 4}
    assert clock.spent == expected
    assert clock.goodput == 30 / 48


def test_steps_are_timed_and_pauses_are_not():
    times = StepTimes()
    for result in (1, 2, 3, None, 4, 5):
        times.add(result)
    taken = times.take()
    assert set(taken) == {"p50", "p95", "max"}
    assert 0 <= taken["p50"] <= taken["p95"] <= taken["max"] < 60
    assert times.take() == {}
    times.close()
