"""kill -9 at random points of every stage that writes: what is started again ends as if nothing had happened.

Points are drawn over the calls that write, sync and rename (before, in the middle of, or after one), and
one in five over time.  Kills form chains: what a kill left is started again and killed again, until a run
comes to its end; then its result is compared with an uninterrupted run's.

    PHOENIX_TEST_POINTS=50 PHOENIX_TEST_SEED=7    more points a stage; the seed that a failure printed
"""

import dataclasses
import os
import shutil

import pytest
from children import KILLS, KINDS
from stages import STAGES, Stage, assert_same

POINTS = int(os.environ.get("PHOENIX_TEST_POINTS") or 5)


@pytest.mark.parametrize("name", STAGES)
def test_killed_at_random(children, inputs, root, draw, name):
    kill_and_compare(children, Stage(name, inputs, **STAGES[name]), root, draw, POINTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_killed_at_ten_random_points(children, inputs, root, draw, name):
    kill_and_compare(children, Stage(name, inputs, **STAGES[name]), root, draw, 10)


@pytest.mark.slow
def test_torchrun_killed_at_ten_random_points(children, inputs, root, draw):
    kill_and_compare(children, Stage("sft", inputs, 2, torchrun=True), root, draw, 10)


def test_no_checkpoint_too_many_after_a_kill_before_the_older_ones_go(children, inputs, root):
    stage = Stage("sft", inputs)
    whole = children.run(stage.job(root / "whole"))
    counted = [event for event in whole.events if event.kind in KINDS]
    renamed = next(n for n, event in enumerate(counted, 1) if event.other.endswith("/step_000004"))
    assert children.run(stage.job(root / "killed"), renamed, "kill after").codes == [-9]
    assert children.run(stage.job(root / "killed")).codes == [0]
    kept = [
        sorted(path.name for path in (root / n / "out" / "checkpoints").iterdir())
        for n in ("whole", "killed")
    ]
    assert kept[1] == kept[0]


def kill_and_compare(children, stage: Stage, root, draw, points: int) -> None:
    whole = children.run(dataclasses.replace(stage, torchrun=False).job(root / "whole"))
    assert not any(whole.codes), whole.output
    expected, place = stage.result(root / "whole"), root / "killed"
    kills = inside = finished = 0

    def compare(job) -> None:
        assert not any(job.codes), job.output
        assert_same(stage.result(place), expected)
        shutil.rmtree(place)

    while kills < points or (3 * inside < kills and kills < 6 * points):  # chance alone is no failure
        fresh = not place.exists()
        if draw.random() < 0.2 and not stage.torchrun:  # torchrun: most of its time is no work of ours
            running = children.start(stage.job(place))
            killed = running.kill_after(draw.uniform(0, 0.7 * whole.seconds))
            job = running.wait()
        else:
            at = draw.randint(1, int(0.9 * whole.calls))
            job = children.run(stage.job(place), at, draw.choice(KILLS))
            killed = job.killed
            assert killed or not fresh, f"ended by itself before call {at} of {whole.calls}: {job.output}"
        if killed:
            kills, inside = kills + 1, inside + job.inside_a_save
            stage.assert_sound(place)
        else:
            compare(job)
            finished += 1
    compare(children.run(stage.job(place)))
    line = f"{kills} kills, {inside} inside a save, {finished + 1} runs ended identical"
    print(f"{stage.name}{' by torchrun' if stage.torchrun else ''}: {line}")
    assert 3 * inside >= kills, line
