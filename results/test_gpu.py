"""A dry run of gpu.sh on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parent
SHOWN = {  # what the file of each part has when it has passed
    "versions": "transformers 5", "tests": " passed in ", "builtin": '{"step": 1, ',
    "benchmark": "| short | ", "sampling": "| model.generate | ", "memory": "| 0.5M | 16 | 6 | ",
    "times_tables": '{"step": 1, '}


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes most of a minute; SLOW=1 python -m pytest runs it")
def test_every_part_passes_and_writes_its_file(tmp_path):
    environment = os.environ | {"TINY": "1", "PYTHON": sys.executable, "PYTHONPATH": ""}
    shown = subprocess.run([RESULTS / "gpu.sh", tmp_path], env=environment, capture_output=True, text=True)
    ends = shown.stdout.rpartition("\n\n")[2].splitlines()
    assert [end.split(",")[0] for end in ends[:-1]] == [f"{part}: passed" for part in SHOWN], shown.stdout
    for part, text in SHOWN.items():
        assert text in (tmp_path / f"{part}.txt").read_text()
    assert shown.returncode == 0 and len([*tmp_path.iterdir()]) == len(SHOWN) + 1
