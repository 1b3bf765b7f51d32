"""The CPU kernels take as many threads as they are given, and results do not depend on how many these are."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from tests.process import environment

PROGRAM = pathlib.Path(__file__).with_name("thread_count.py")


def test_results_do_not_depend_on_the_number_of_threads():
    counts = 1, 2, 8
    runs = [
        subprocess.Popen(
            [sys.executable, PROGRAM],
            env=environment(PJRT_NPROC=str(count)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for count in counts
    ]
    found = [json.loads(run.communicate(timeout=120)[0]) for run in runs]
    if "reason" in found[0]:
        pytest.skip(found[0]["reason"])
    assert [one["threads"] for one in found] == [*counts]
    for one in found[1:]:
        assert one["digests"] == found[0]["digests"]
