"""recipes/translate.py with an engine that is slow, deterministic and logs each segment and attempt.

It translates the sentences of `pair`; of every seventh the first reply is empty, of every 31st each one.
Where there is a file "hang" beside the log, the first engine that comes removes it, and hangs.
"""

import contextlib
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
import translate  # noqa: E402

from phoenix.config import run_recipe  # noqa: E402
from phoenix.translate.engines import Reply  # noqa: E402


def pair(number: int) -> tuple[str, str]:
    return (
        f"The train with the number {number} leaves the old station at noon and comes back late.",
        f"Der Zug mit der Nummer {number} verlässt mittags den alten Bahnhof und kommt spät zurück.",
    )


class LoggedEngine:
    name = "table"

    def __init__(self, log: str, seconds: float) -> None:
        self.log, self.seconds = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), seconds
        self.hang = Path(log).with_name("hang")

    def settings(self):
        return {"engine": self.name}

    def translate(self, sources, *, attempt=0):
        os.write(self.log, "".join(f"{attempt} {source}\n" for source in sources).encode())
        with contextlib.suppress(FileNotFoundError):
            self.hang.unlink()
            time.sleep(1000)
        time.sleep(self.seconds)
        return [self.reply(source, attempt) for source in sources]

    def reply(self, source, attempt):
        number = int(re.search(r"\d+", source)[0])
        fails = number % 31 == 0 or (number % 7 == 0 and attempt == 0)
        return Reply("" if fails else pair(number)[1], "stop", len(source), 10)

    def close(self):
        os.close(self.log)


def run(log: str, seconds: float, arguments: list[str], output: str) -> None:
    """What a process does; seconds: that a batch takes; output: file of what it says."""
    sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115
    sys.argv = ["translate.py", *arguments]
    translate.open_engine = lambda config, language: LoggedEngine(log, seconds)
    run_recipe(translate.main, translate.TranslateConfig, translate.QUICKSTART)
