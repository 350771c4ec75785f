"""Signals, a reader that has gone, leftovers, two runs in one folder: on one rank and on two, none hangs."""

import fcntl
import signal

import pytest
from stages import Stage, assert_same

SLOW_SAVES = {"max_steps": 4, "eval_steps": 4, "save_steps": 99}  # the one save is the signal's


def stopped_and_whole(children, stage: Stage, root) -> None:
    """It can be started again, and ends as a run that was never stopped."""
    again = children.run(stage.job(root / "stopped"))
    assert not any(again.codes), again.output
    whole = children.run(stage.job(root / "whole"))
    assert not any(whole.codes), whole.output
    expected, found = stage.result(root / "whole"), stage.result(root / "stopped")
    assert_same(
        {k: found[k] for k in found if k != "files"}, {k: v for k, v in expected.items() if k != "files"}
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_signals_that_go_on_during_the_save_do_no_harm(children, inputs, root, draw, world_size):
    """SIGTERM at a call, and at every later one that writes, syncs or renames, those of the save too."""
    stage = Stage("sft", inputs, world_size, changes=SLOW_SAVES)
    at = draw.randint(4, 16)  # before the first step has ended
    job = children.run(stage.job(root / "stopped"), at, "terminate on")
    assert set(job.codes) == {75} and "Traceback" not in job.output, job.output
    assert list((root / "stopped" / "out" / "checkpoints").glob("step_*"))
    stopped_and_whole(children, stage, root)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_ranks_saves(children, inputs, root, number, world_size):
    stage = Stage(
        "sft", inputs, world_size, changes={"max_steps": 2000, "eval_steps": 2000, "save_steps": 999}
    )
    running = children.start(stage.job(root))
    while running.alive() and running.calls() < 30:
        pass
    running.signal(number)
    job = running.wait()
    assert set(job.codes) == {75} and "Traceback" not in job.output, (job.codes, job.output)
    stage.assert_sound(root)
    assert list((root / "out" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_reader_that_has_gone_ends_nothing(children, inputs, root, world_size):
    stage = Stage("sft", inputs, world_size)
    job = stage.job(root)
    job.environment["PHOENIX_NOBODY_READS"] = "1"
    children.run(job)
    assert not any(job.codes), job.output


@pytest.mark.parametrize("world_size", [1, 2])
def test_leftovers_hang_no_rank(children, inputs, root, world_size):
    """A folder of a killed save, one without its manifest, half a file: they go, or are passed over."""
    stage = Stage("sft", inputs, world_size)
    assert not any(children.run(stage.job(root / "whole")).codes)
    for name in (".step_000002.tmp", ".step_000009.tmp", "step_000001", "step_000009"):
        folder = root / "left" / "out" / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "shard_00000.safetensors").write_bytes(b"half")
    job = children.run(stage.job(root / "left"))
    assert not any(job.codes), job.output
    left = {path.name for path in (root / "left" / "out" / "checkpoints").iterdir()}
    assert left <= {"step_000003", "step_000004", "step_000009"}
    expected, found = stage.result(root / "whole"), stage.result(root / "left")
    assert_same(
        {k: found[k] for k in found if k != "files"}, {k: v for k, v in expected.items() if k != "files"}
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_second_in_a_run_folder_is_refused(children, inputs, root, world_size):
    stage = Stage("sft", inputs, world_size)
    job = stage.job(root)
    (root / "out").mkdir()
    with open(root / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        children.run(job)
    assert set(job.codes) == {2} and job.output.count("error: ") == 1, job.output
    assert f"{root / 'out'}: another process trains in this folder" in job.output
    assert [path.name for path in (root / "out").iterdir()] == [".lock"]
