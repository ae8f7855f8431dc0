"""The examples run, shortened."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_a_vlm_is_trained_in_two_stages_and_asked_about_unseen_pictures():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_a_vlm.py", "--steps", "2", "--unseen", "2", "--scale-factor", "4"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    phases = re.findall(r"^(.+?) +step +2  loss (\d+\.\d{3})  +\d+ s$", done.stdout, flags=re.MULTILINE)
    assert [name for name, _ in phases] == ["vision encoder", "language model", "stage 1", "stage 2"]
    assert re.search(r"^On 2 unseen pictures, \d+\.\d% of 20 answers are right\.$", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^Guessing, .* gets \d+\.\d% right\.$", done.stdout, flags=re.MULTILINE)


def test_the_story_fits_in_one_file():
    assert len((EXAMPLES / "train_a_vlm.py").read_text().splitlines()) <= 250
