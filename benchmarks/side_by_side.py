"""What the comparisons with peers share: sides in processes of their own that work in turns, their figures.

A side is a function that trains and calls `Pacer.wait` before a step and `Pacer.done` after it; the figures
are those of whole steps.  It is forked after all imports, so its memory counts from there.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phoenix.model.mistral import Mistral, MistralConfig

PEER_MODEL = MistralConfig(
    hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    intermediate_size=1408, vocab_size=32000, sliding_window=None,
)  # fmt: skip
TINY_MODEL = MistralConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=128, vocab_size=256, sliding_window=None, initializer_range=0.1,
)  # fmt: skip
MAX_SPREAD = 0.15
PR_SET_PDEATHSIG = 1  # of Linux: the signal when the parent ends, however it ends
FORK = multiprocessing.get_context("fork")


def spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Of paired values: each repeat's own ratio, and of these the median."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def memory(name: str) -> int:
    """KiB of this process in /proc (ru_maxrss would count the parent's peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}")


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Date, processor, and the versions of Python and of packages."""
    info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    flags = set(info.get("flags", "").split())
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": info.get("model name", platform.machine()), "threads": torch.get_num_threads(),
        **{flag: flag in flags for flag in ("amx_bf16", "avx512_bf16", "avx512f")},
        "load_before": os.getloadavg()[0], "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }  # fmt: skip


def make_model(folder: str, config: MistralConfig) -> None:
    """Random weights, written by a process of its own: a thread pool of this one would not survive forks."""
    maker = FORK.Process(target=_make_model, args=(folder, config))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise RuntimeError("the model could not be written")


def _make_model(folder: str, config: MistralConfig) -> None:
    Mistral(config).init_weights(torch.Generator().manual_seed(0)).save_pretrained(folder)


@dataclass
class Pacer:
    """A side's end of the line."""

    pipe: Any
    start: int  # KiB resident at the fork
    begun: float = 0.0

    def wait(self) -> None:
        """Until the other end asks for a step."""
        self.pipe.recv()
        self.begun = time.perf_counter()

    def done(self, **values: Any) -> None:
        seconds = time.perf_counter() - self.begun
        peak = (memory("VmHWM") - self.start) / 2**20
        self.pipe.send({"seconds": seconds, "peak_memory_gib": peak, **values})


class Side:
    """This process' end: start work(pacer, *arguments) in a fork, and ask it for steps."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_run, args=(work, theirs, arguments))
        self.process.start()
        theirs.close()  # so that a side that dies ends `recv` with EOFError

    def step(self, timeout: float | None = None) -> dict[str, Any]:
        """One step.  Raises RuntimeError in a word or two if the side failed, died or took too long."""
        try:
            self.pipe.send(True)
            if not self.pipe.poll(timeout):
                raise RuntimeError(f"no step within {timeout:.0f} s")
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError("the process ended") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _run(work: Callable[..., None], pipe: Any, arguments: tuple) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # or it would wait for ever
    try:
        work(Pacer(pipe, memory("VmRSS")), *arguments)
    except Exception as error:
        lines, at = str(error).strip().splitlines() or [""], traceback.extract_tb(error.__traceback__)[-1]
        pipe.send(f"{type(error).__name__}: {lines[0][:200]} ({Path(at.filename).name}, line {at.lineno})")
    os._exit(0)


def main(doc: str, output: Path, minutes: float, peers: Callable[[], Any], run: Callable[..., int]) -> int:
    """The command line of a comparison with TRL; returns the exit code.

    peers: loads what a side needs of trl, before the forks, so that its memory counts for none.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--output", type=Path, default=output, help="where the JSON goes")
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="after that much it leaves out what is left"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--quick", action="store_true", help="tiny, one repeat")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    try:
        import datasets
        import transformers

        _ = peers(), transformers.MistralForCausalLM  # their modules load on use
    except ImportError as error:
        print(f"error: {error}; make .venv-peers, then run this with its python", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    return run(options)
