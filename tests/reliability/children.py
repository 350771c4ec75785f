"""Children that can be killed or hindered at their n-th write, sync or rename, and what they did until then.

children = Children(folder)
job = Job(root=folder / "run", recipe="sft", arguments=[...])
children.run(job)                                    # to the end; job.calls: how many calls there were
children.run(job, at=17, action="kill halfway")      # job.codes == [-9], job.events ends with the kill
"""

import contextlib
import dataclasses
import os
import signal
import struct
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "recipes"
PATIENCE = 300  # seconds after which a child that does not end is taken for hung
ACTIONS = ("nothing", "kill before", "kill halfway", "kill after", "fail once", "fail on", "terminate on")
KILLS = ACTIONS[1:4]
KINDS = {"write": 1, "fsync": 2, "rename": 4}


@dataclasses.dataclass
class Event:
    """A line of the journal: what was called on which path, with the bytes if they were asked for."""

    kind: str
    pid: int
    path: str
    other: str
    inode: int
    offset: int
    data: bytes


@dataclasses.dataclass
class Job:
    """A recipe and its arguments; what it writes below `root` counts.  world_size: ranks of gloo."""

    root: Path
    recipe: str
    arguments: list[str]
    world_size: int = 1
    torchrun: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    codes: list[int] = dataclasses.field(default_factory=list)
    calls: int = 0
    seconds: float = 0.0
    events: list[Event] = dataclasses.field(default_factory=list)
    output: str = ""

    @property
    def killed(self) -> bool:
        return any(event.kind == "killed" for event in self.events)

    @property
    def inside_a_save(self) -> bool:
        """The last event fell while the temporary folder of a store, checkpoint or model was there."""
        open_ones = set()
        for event in self.events:
            if event.kind == "mkdir" and is_temporary(event.path):
                open_ones.add(event.path)
            elif event.kind in ("rename", "exchange", "unlink"):
                open_ones.discard(event.path)
        return bool(open_ones)


def is_temporary(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return name.startswith(".") and name.endswith(".tmp")


class Control:
    """The page that a test shares with its children."""

    def __init__(self, folder: Path, root: Path, at: int, action: str, *, error: int, kinds, with_data: bool):
        self.path, self.journal = folder / "control", folder / "journal"
        mask = sum(KINDS[kind] for kind in kinds)
        self.journal.unlink(missing_ok=True)
        head = 0, at, 0, ACTIONS.index(action), error, mask, with_data, 0
        words = struct.pack("8q256i1024s1024s", *head, *[0] * 256, bytes(root), bytes(self.journal))
        self.path.write_bytes(words)

    def read(self) -> tuple[int, list[int]]:
        """Calls so far, and the processes that joined."""
        values = struct.unpack_from("8q256i", self.path.read_bytes())
        return values[0], [pid for pid in values[8:] if pid]

    def kill(self) -> None:
        for pid in self.read()[1]:
            with contextlib.suppress(OSError):
                if str(self.path) in Path(f"/proc/{pid}/maps").read_text():
                    os.kill(pid, signal.SIGKILL)

    def events(self) -> list[Event]:
        content, events, place = self.journal.read_bytes() if self.journal.exists() else b"", [], 0
        while (end := content.find(b"\n", place)) >= 0:
            kind, pid, path, other, inode, offset, size = content[place:end].decode().split("\t")
            place = end + 1 + int(size)
            data = content[end + 1 : place]
            events.append(Event(kind, int(pid), path, other, int(inode), int(offset), data))
        return events


class Children:
    """The server of children, its shim, and a folder for their pages and output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shim = folder / "shim.so"
        build = ["cc", "-O1", "-shared", "-fPIC", "-o", self.shim, HERE / "shim.c", "-ldl", "-lpthread"]
        subprocess.run(build, check=True)
        path = os.pathsep.join(map(str, (HERE, HERE.parent, RECIPES, HERE.parents[1])))
        self.environment = {
            **os.environ, "LD_PRELOAD": str(self.shim), "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
            "PHOENIX_FAULTS": "",
        }  # fmt: skip
        self.runs, self.server, self.socket = 0, None, None

    def close(self) -> None:
        if self.server:
            self.socket.close()
            self.server.kill()
            self.server.wait()
            self.server = None

    def ask(self, request: object) -> int:
        if not self.server:
            self.socket, there = Pipe()
            command = [sys.executable, HERE / "server.py", str(there.fileno())]
            self.server = subprocess.Popen(command, env=self.environment, pass_fds=[there.fileno()])
            there.close()
        self.socket.send(request)
        return self.socket.recv()

    def start(
        self, job: Job, at: int = 0, action: str = "nothing", *, error: int = 0, kinds=tuple(KINDS),
        with_data: bool = False,
    ) -> "Running":  # fmt: skip
        """Start a job; at the `at`-th call of these kinds the action happens."""
        self.runs += 1
        folder = self.folder / f"run_{self.runs}"
        folder.mkdir()
        control = Control(folder, job.root, at, action, error=error, kinds=kinds, with_data=with_data)
        environment = {**job.environment, "PHOENIX_FAULTS": str(control.path)}
        output = str(folder / "output")
        if job.torchrun:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={job.world_size}", str(RECIPES / f"{job.recipe}.py")]
            with open(output, "w") as file:
                options = {"env": {**self.environment, **environment}, "stdout": file, "stderr": file}
                agent = subprocess.Popen([*command, *job.arguments], start_new_session=True, **options)
            return Running(self, job, control, output, [], agent)
        pids = []
        for rank in range(job.world_size):
            if job.world_size > 1:
                names = {"RANK": rank, "WORLD_SIZE": job.world_size, "LOCAL_RANK": rank}
                environment |= {name: str(value) for name, value in names.items()}
                environment["PHOENIX_GROUP"] = str(folder / "group")
            pids.append(self.ask((job.recipe, job.arguments, environment, output)))
        return Running(self, job, control, output, pids, None)

    def run(self, job: Job, at: int = 0, action: str = "nothing", **options) -> Job:
        return self.start(job, at, action, **options).wait()


@dataclasses.dataclass
class Running:
    children: Children
    job: Job
    control: Control
    output: str
    pids: list[int]
    agent: subprocess.Popen | None
    began: float = dataclasses.field(default_factory=time.monotonic)
    hung: bool = False

    def alive(self) -> bool:
        if self.agent:
            return self.agent.poll() is None
        return any(_state(pid) not in ("Z", "") for pid in self.pids)

    def signal(self, number: int) -> None:
        for pid in self.pids or [self.agent.pid]:
            os.kill(pid, number)

    def calls(self) -> int:
        return self.control.read()[0]

    def kill_after(self, seconds: float) -> bool:
        """Kill all processes at that time; False if they had ended before."""
        while (left := self.began + seconds - time.monotonic()) > 0 and self.alive():
            time.sleep(min(left, 0.002))
        killed = self.alive()
        self.control.kill()
        return killed

    def wait(self) -> Job:
        """Until all have ended; a child that hangs is killed, and the test fails."""
        while self.alive():
            if time.monotonic() - self.began > PATIENCE:
                self.control.kill()
                self.hung = True
            time.sleep(0.002)
        job = self.job
        job.codes = [self.agent.wait()] if self.agent else [self.children.ask(pid) for pid in self.pids]
        if self.agent:  # the workers of a killed agent lie in no list of ours
            self.control.kill()
        job.calls, job.events = self.control.read()[0], self.control.events()
        job.seconds = time.monotonic() - self.began
        job.output = Path(self.output).read_text(errors="replace")
        assert not self.hung, f"a child of {job.recipe} hung:\n{job.output[-3000:]}"
        return job


def _state(pid: int) -> str:
    """The letter of /proc/PID/stat, "" if there is no such process."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return ""
