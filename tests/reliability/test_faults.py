"""The n-th write, sync or rename fails, once or from then on: a sentence, nothing half-written, and a second
run that ends as if nothing had happened."""

import errno
import re

import pytest
from children import KINDS
from stages import STAGES, Stage, assert_same

ERRORS = {errno.ENOSPC: "No space left on device", errno.EIO: "Input/output error"}


@pytest.mark.parametrize("name", STAGES)
def test_a_spread_of_calls_fails(children, inputs, root, draw, name):
    fail_and_compare(children, Stage(name, inputs, **STAGES[name]), root, draw, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_every_call_fails(children, inputs, root, draw, name):
    """Every one up to the fiftieth; of a stage with more, fifty over all."""
    fail_and_compare(children, Stage(name, inputs, **STAGES[name]), root, draw, 50)


def test_all_ranks_hear_of_a_disk_that_is_full_for_the_model(children, inputs, root):
    """Rank 0 alone writes it; the others wait at each tensor that is gathered, and must not wait for ever."""
    stage = Stage("sft", inputs, 2)
    whole = children.run(stage.job(root / "whole"))
    counted = [event for event in whole.events if event.kind in KINDS]
    first = next(n for n, event in enumerate(counted, 1) if "/.model." in event.path)
    job = children.run(stage.job(root / "full"), first, "fail on", error=errno.ENOSPC)
    assert job.codes == [2, 2] and "Traceback" not in job.output, job.output
    assert f"cannot write {root / 'full' / 'out' / 'model'}: " in job.output
    assert not any(children.run(stage.job(root / "full")).codes)
    assert_same(stage.result(root / "full"), stage.result(root / "whole"))


def fail_and_compare(children, stage: Stage, root, draw, points: int) -> None:
    whole = children.run(stage.job(root / "whole"))
    expected = stage.result(root / "whole")
    count = min(points, whole.calls)
    places = [1 + (whole.calls - 1) * number // max(1, count - 1) for number in range(count)]
    failed = 0
    for at in places:
        place, error = root / str(at), draw.choice(list(ERRORS))
        action = draw.choice(["fail once", "fail on"])
        job = children.run(stage.job(place), at, action, error=error)
        where = f"call {at} of {whole.calls}, {action}, {ERRORS[error]}: {job.codes}\n{job.output[-2000:]}"
        stage.assert_sound(place)
        assert job.codes[0] in (0, 2), where
        if not re.search(r"out/\w+\.(jsonl|html):", job.output):  # of these rank 0 alone knows
            assert len(set(job.codes)) == 1, where
        if job.codes[0] == 2:
            failed += 1
            [sentence] = re.findall("error: .*", job.output)
            assert str(place) in sentence, where
            assert "Traceback" not in job.output or stage.world_size > 1, where
        again = children.run(stage.job(place))
        assert not any(again.codes), again.output
        assert_same(stage.result(place), expected, where)
    print(f"{stage.name}: {len(places)} of {whole.calls} calls failed, {failed} ended the run")
    assert 2 * failed >= len(places)
