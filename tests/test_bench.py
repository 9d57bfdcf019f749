"""Tests of chapter `nbs/appendix/82_bench.ipynb`."""
import csv
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest

from ddpo_scratch.workshop import bench
from ddpo_scratch.workshop.bench import Contender, Work, command_of, main, run_epochs


@pytest.mark.slow
def test_the_command_leaves_a_table():
    "A row for each contender and round; parts of an epoch are no longer than the whole."
    with TemporaryDirectory() as room:
        subprocess.run(
            [sys.executable, "-m", "ddpo_scratch.workshop.bench", "--rounds", "2", "--out", room,
             "--work", '{"samples": 4, "steps": 2, "batch": 2, "micro_batch_size": 16}'],
            check=True, capture_output=True)
        rows = list(csv.DictReader((Path(room) / "bench.csv").open(encoding="utf-8")))
    assert [(row["round"], row["contender"]) for row in rows] == [
        ("1", "ours"), ("1", "plain"), ("2", "plain"), ("2", "ours")]
    for row in rows:
        parts = sum(float(row[name]) for name in ("sampling", "decoding", "training"))
        assert 0 < parts <= float(row["total"]) and float(row["peak"]) > 1e8
        assert float(row["floor_sampling"]) > 0 and float(row["floor_training"]) > 0


def test_bad_arguments_end_in_a_line():
    "No traceback: what was given, and what may be."
    for flags, match in ((["--work", "nonsense"], "'nonsense'.*JSON with some of samples, steps"),
                         (["--work", '{"sample": 3}'], "'sample'.*some of samples, steps"),
                         (["--rounds", "0"], "at least 1, not 0")):
        with patch.object(sys, "argv", ["bench", *flags]), pytest.raises(SystemExit, match=match):
            main()


def test_both_do_the_same_work():
    "As many rows with a gradient and without, in calls of one step or of as many as may be."
    work = Work(samples=4, steps=2, batch=2, micro_batch_size=4)
    seen = []
    def watched(pipe, calls, work):
        seen.append(list(calls))
        return {}
    with patch.object(bench, "floor", watched):
        for contender in ("plain", "ours"): run_epochs(contender, work, lambda seconds: None, 1)
    plain, ours = seen
    assert plain == [(8, False)] * 2 + [(4, True)] * 4
    assert ours == [(8, False)] * 2 + [(8, True)] * 2


def test_trls_worker_is_found():
    "A file of the package, which another environment's Python runs."
    python, file, _ = command_of("TRL", Work(), "its/python", "room")
    assert python == "its/python" and Path(file).is_file()


def test_a_contender_that_fails_says_why():
    "What it has said on stderr is in the error."
    contender = Contender([sys.executable, "-c", "print('hello'); raise SystemExit('no model')"])
    with pytest.raises(RuntimeError, match="(?s)has ended.*no model"): contender.epoch()
    contender.end()
