"""The GPU suite: a dry run on the CPU passes, and what breaks is reported and not hidden."""

import json
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"


@pytest.fixture
def suite(load_script):
    return load_script("gpu_suite")


@pytest.fixture
def run(suite, monkeypatch, tmp_path, capsys):
    """run(arguments) -> exit code, the JSON lines of stdout, the file."""

    def run(*arguments):
        output = tmp_path / "suite.json"
        monkeypatch.setattr(sys, "argv", [str(SUITE), f"--output={output}", *arguments])
        code = suite.main()
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        return code, lines, json.loads(output.read_text()) if output.exists() else {}

    return run


def test_a_dry_run_passes_every_check(run):
    code, lines, report = run("--dry-run")
    assert code == 0 and report["complete"] and report["results"] == lines
    assert all(result["ok"] for result in lines), lines
    steps = [result for result in lines if result["name"].startswith("step")]
    assert len(steps) == 5 and all(step["tokens_per_second"] > 0 for step in steps)
    assert {"device", "torch", "python", "date"} <= report.keys()


def test_a_failing_check_is_reported_and_the_others_go_on(run, suite, monkeypatch):
    """The head off by 1e-4 fails its own checks in fp32."""
    right = suite.linear_logps

    def wrong(*inputs, **options):
        stats = right(*inputs, **options)
        return stats._replace(logps=stats.logps * 1.0001)

    monkeypatch.setattr(suite, "linear_logps", wrong)
    for other in ("packed_equals_one_by_one", "cached_equals_full", "training_step"):
        monkeypatch.setattr(suite, other, lambda *_, **__: {})
    code, lines, report = run("--dry-run")
    failed = [result for result in lines if not result["ok"]]
    assert code == 1 and report["complete"] and report["results"] == lines
    assert {result["name"] for result in failed} >= {
        "label_log_probs kept fp32",
        "label_log_probs recomputed fp32",
    }
    assert all(
        "label_log_probs" in result["name"] and "times that of plain torch" in result["error"]
        for result in failed
    )


def test_an_interrupted_run_writes_what_it_has(run, suite, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "cached_equals_full", interrupted)
    code, lines, report = run("--dry-run")
    assert code == 1 and not report["complete"] and len(report["results"]) == len(lines) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_full_run_says_so(run):
    assert run() == (2, [], {})
