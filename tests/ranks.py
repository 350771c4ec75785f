"""Two or four processes of one gloo group, started once a session where asked for, to which tests send
functions.

    losses = two_ranks(train, folder, 20)      # [train(world, folder, 20) of rank 0, of rank 1]

Such a function stands at the top level of its test file; what it returns travels by pickle.
"""

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

PATIENCE = 300  # seconds after which a rank that does not answer is taken for hung


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory) -> Iterator[Callable]:
    """function, *args -> the results of both ranks; AssertionError with the traceback of one that failed."""
    yield from _ranks(2, tmp_path_factory.mktemp("ranks") / "store")


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory) -> Iterator[Callable]:
    """As `two_ranks`."""
    yield from _ranks(4, tmp_path_factory.mktemp("ranks") / "store")


def _ranks(world_size: int, store: Path) -> Iterator[Callable]:
    context, ranks = multiprocessing.get_context("spawn"), []

    def stop() -> None:
        while ranks:
            process, _ = ranks.pop()
            process.kill()  # leaving the group in good order takes seconds, and nothing is left to save
            process.join()

    def answer(rank: int) -> object:
        _, pipe = ranks[rank]
        if pipe.poll(PATIENCE):
            with contextlib.suppress(EOFError):
                return pipe.recv()
        stop()  # the next test starts new ones
        raise AssertionError(f"rank {rank} is dead or hangs")

    def start() -> None:
        store.unlink(missing_ok=True)
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, store, there), daemon=True)
            process.start()
            there.close()  # so that a rank's death ends the wait for it
            ranks.append((process, here))
        for rank in range(world_size):
            answer(rank)

    def run(function: Callable, *args) -> list:
        if not ranks:
            start()
        for _, pipe in ranks:
            pipe.send((function, args))
        answers = [answer(rank) for rank in range(world_size)]
        for error, _ in answers:
            assert not error, error
        return [result for _, result in answers]

    start()
    yield run
    stop()


def _serve(rank: int, world_size: int, store: Path, pipe) -> None:
    import torch  # here, since tests without torch load this file too
    import torch.distributed as dist

    from phoenix.train.distributed import World

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    options = {"init_method": f"file://{store}", "timeout": timedelta(seconds=PATIENCE)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size, **options)
    pipe.send("ready")
    while True:
        function, args = pipe.recv()
        try:
            answer = "", function(World(rank, world_size), *args)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send(answer)
