"""Starts children within milliseconds: a process that has torch and the recipes loaded, and forks.

Run by children.py with the shim preloaded; the argument is the number of a socket.  It takes what a child
shall be and answers with its number, then takes that number and answers with its exit status.
"""

import ctypes
import os
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection

import datasketch  # noqa: F401 - half a second, in each child that prepares
import torch
import torch._dynamo  # seconds, on the first call of an operator of our own
import translate
from inputs import dpo, prepare, sft
from stages import SaveConfig, save

from phoenix.config import run_recipe
from phoenix.data import parts
from phoenix.train.metrics import measure_gemm


def prepare_in_parts(config: prepare.PrepareConfig) -> None:
    """Five of them for the forty rows of the tests' inputs."""
    parts.PART_ROWS = 8
    prepare.main(config)


RECIPES = {
    "prepare": (prepare.main, prepare.PrepareConfig),
    "prepare_in_parts": (prepare_in_parts, prepare.PrepareConfig),
    "sft": (sft.main, sft.SFTConfig),
    "dpo": (dpo.main, dpo.DPOConfig),
    "translate": (translate.main, translate.TranslateConfig),
    "save": (save, SaveConfig),
}


def child(recipe: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if "PHOENIX_NOBODY_READS" in environment:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    os.environ.update(environment)
    faults = environment["PHOENIX_FAULTS"]
    assert not faults or ctypes.CDLL(os.environ["LD_PRELOAD"]).phoenix_arm(faults.encode()) == 0
    if group := environment.get("PHOENIX_GROUP"):
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        options = {"init_method": f"file://{group}", "timeout": timedelta(seconds=60)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size, **options)
    sys.argv = [recipe, *arguments]
    run_recipe(*RECIPES[recipe])


def main() -> None:
    torch.set_num_threads(1)
    measure_gemm(torch.device("cpu"), torch.float32)  # seconds; children find the answer in its cache
    socket = Connection(int(sys.argv[1]))
    while True:
        try:
            request = socket.recv()
        except EOFError:
            return
        if isinstance(request, int):
            socket.send(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]))
            continue
        pid = os.fork()
        if pid:
            socket.send(pid)
            continue
        code = 1
        try:
            socket.close()
            os.setsid()
            child(*request)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
