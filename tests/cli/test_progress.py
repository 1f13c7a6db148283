# SPDX-License-Identifier: Apache-2.0
"""Where standard error is no terminal, a line tells now and then how far the work is."""

import time

import pytest

from spon_cli import progress


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


def test_short_work_writes_no_line(capsys):
    with progress.progress_bars() as stage:
        stage("Training")(1, 2)
    assert capsys.readouterr().err == ""
