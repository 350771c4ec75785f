"""The comparison with transformers by its command, in its short form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_vs_transformers.py"


@pytest.mark.peers
def test_the_quick_form_measures_every_side_on_the_same_work(tmp_path):
    """Losses of exact sides are equal in fp32 and near in bf16; one document in place of several is not."""
    output = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", f"--output={output}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["losses_equal"] and {"processor", "amx_bf16", "torch"} <= report["environment"].keys()
    assert len(report["fp32"]) == 3 and len(report["bf16"]) == 4
    reference = report["fp32"]["phoenix"]["first_loss"]
    for group, allowed in (("fp32", 1e-4), ("bf16", 1e-2)):
        for side, values in report[group].items():
            assert values["tokens_per_second"] > 0 and values["peak_memory_gib"] > 0
            off = abs(values["first_loss"] - reference) / reference
            assert off > 1e-2 if side.endswith("one document") else off <= allowed, side
            assert (side == "phoenix") != ("phoenix_times_as_fast" in values)
