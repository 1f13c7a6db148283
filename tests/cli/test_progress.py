# SPDX-License-Identifier: Apache-2.0
"""Where standard error is no terminal, a line tells now and then how far the work is."""

import io
import itertools
import threading
import time

import pytest
from commands import run

from spon_cli import progress
from spon_cli.commands import quickstart


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (40, "40 s"), (95, "2 min"), (3580, "1 h 0 min"), (3900, "1 h 5 min")]
)
def test_durations_in_words(seconds, words):
    assert progress.duration(seconds) == words


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    with progress.progress_bars() as stage:
        advance = stage("Calibrating")
        advance(4, 4)
        advance = stage("Training")
        time.sleep(0.12)
        advance(1, 5, "KL 0.312")
        time.sleep(0.12)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Training, 0 s so far"
    assert lines[-1] == "Training: 1 of 5, KL 0.312, 0 s so far, about 1 s left"
    assert 2 <= len(lines) <= 6


def test_rows_are_counted_beside_the_work_at_hand(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    with progress.row_bars(3, lambda row: f"{row['name']} is there") as (stage, done):
        done({"name": "old"}, True)
        done({"name": "dense"}, False)
        stage("teal: training")(2, 4)
        time.sleep(0.12)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "dense is there"
    assert lines[-1].startswith("Rows: 2 of 3, 0 s so far, about 0 s left; teal: training: 2 of 4, 0 s so far")


class FakeClock(progress.Clock):
    """Time that goes on only when somebody says so; who waits for it runs at its moments, before it goes on."""

    def __init__(self):
        self.time, self.due, self.changed = 0.0, None, threading.Condition()

    def now(self):
        return self.time

    def wait(self, event, seconds):
        with self.changed:
            self.due = self.time + seconds
            self.changed.notify_all()
            while self.time < self.due and not event.is_set():
                self.changed.wait(0.01)
        return event.is_set()

    def advance(self, seconds):
        end = self.time + seconds
        while self.time < end:
            with self.changed:
                assert self.changed.wait_for(lambda: self.due is not None and self.due > self.time, timeout=10)
                self.time = min(end, self.due)
                self.changed.notify_all()
        with self.changed:
            self.changed.wait_for(lambda: self.due > self.time, timeout=10)


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(progress, "clock", clock)
    return clock


def test_the_log_of_quickstart_has_a_line_at_least_every_half_minute(monkeypatch, clock, tiny_model_dir, tmp_path):
    """Each part of the work takes minutes, in one step and without a word of its own; also before there are bars."""
    for name, seconds in {
        "text_sources": 40, "_announcement": 35, "smollm2_gguf": 95, "load": 45, "calibrated": 130, "train": 400,
        "save": 31, "evaluate_variants": 100, "show_evaluations": 61,
    }.items():  # fmt: skip
        real = getattr(quickstart, name)

        def slow(*arguments, real=real, seconds=seconds, **options):
            clock.advance(seconds)
            return real(*arguments, **options)

        monkeypatch.setattr(quickstart, name, slow)
    monkeypatch.setattr(quickstart, "smollm2_gguf", lambda: clock.advance(95) or tiny_model_dir)
    lines = []
    for module in (progress, quickstart):
        monkeypatch.setattr(module, "note", lambda text: lines.append((clock.now(), text)))
    code, _, err = run("quickstart", "-o", tmp_path / "work", "--windows", "4")
    assert (code, err) == (0, "")
    times = [0.0, *(moment for moment, _ in lines), clock.now()]
    assert clock.now() > 900
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) <= 30
    assert all(text for _, text in lines)
    said = "\n".join(text for _, text in lines)
    for words in ("Working, 25 s so far", "Fetching the model", "Evaluating: 4 of ", "Next:"):
        assert words in said


def test_the_first_steps_say_how_long_the_rest_takes(monkeypatch, clock):
    lines = []
    monkeypatch.setattr(progress, "note", lambda text: lines.append((clock.now(), text)))
    with progress.progress_bars() as stage:
        bar = stage("Training")
        for step in range(1, 5):
            clock.advance(4)
            bar(step, 100)
    assert lines == [(12.0, "Training: 3 of 100, 12 s so far, about 6 min left")]


def test_bars_of_a_block_inside_are_gone_at_its_end(monkeypatch, clock):
    lines = []
    monkeypatch.setattr(progress, "note", lines.append)
    with progress.progress_bars() as outer:
        with progress.progress_bars() as inner:
            inner("Loading")
            clock.advance(25)
        clock.advance(25)
        outer("Reading")(1, 2)
        clock.advance(25)
    assert lines == ["Loading, 25 s so far", "Working, 50 s so far", "Reading: 1 of 2, 25 s so far, about 25 s left"]


def test_a_terminal_has_one_display_of_bars(monkeypatch):
    monkeypatch.setattr(type(progress.err), "is_terminal", True)
    monkeypatch.setattr(progress.err, "_file", io.StringIO())  # None before, and again: `file` is then sys.stderr
    with progress.progress_bars() as outer:
        outer("Whole")(1, 2)
        with progress.progress_bars() as inner:
            inner("Part")
            assert [task.description for task in progress._bars.tasks] == ["Whole", "Part"]
        assert [task.finished for task in progress._bars.tasks] == [False, True]
    assert progress._bars is None


def test_short_work_writes_no_line(capsys):
    with progress.progress_bars() as stage:
        stage("Training")(1, 2)
    assert capsys.readouterr().err == ""
