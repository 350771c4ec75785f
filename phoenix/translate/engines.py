"""What answers pieces of text with their translations: a model in this process, a server, a file, or nothing.

Pieces are single lines.  What an engine cannot be asked (too long, a character that the vocabulary lacks, the
name of a control token where a server would parse it) comes back as an empty `Reply` that says why, so that
one piece never takes the others of its call with it.  Text never becomes a control token: prompts go to the
model as ids, which `phoenix.tokenizer` and `phoenix.chat` make; a server whose tokenizer is not at hand gets
text, but no piece that holds such a name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from phoenix import chat
from phoenix.config import option
from phoenix.data.reading import read_rows
from phoenix.files import UserError, require, sha256
from phoenix.remote import Refusal, Server
from phoenix.tokenizer import Tokenizer
from phoenix.translate.checks import CONTROL

if TYPE_CHECKING:
    from phoenix.translate.language import Language

# vLLM's repetition detection, in tokens: a run of one token ends after 16, so that 1,000,000 is none.
LOOP = {"max_pattern_size": 32, "min_pattern_size": 2, "min_count": 8}
TORCHRUN = re.compile(r"(LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC_)\w+$|RANK$|WORLD_SIZE$")


@dataclass(frozen=True)
class Reply:
    """The translation of one piece, without a line break, and how it ended.

    finish_reason: "stop", or why it is no whole translation: "length", "repetition", "abort" of the engine;
    "missing", "too_long", "unencodable", "control_token", "refused", "failed" without having been generated.
    """

    text: str
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Engine(Protocol):
    """settings: JSON that decides the replies, a part of the run's identity; translate: one Reply a source,
    in their order, with other sampling where attempt > 0."""

    name: str

    def settings(self) -> dict[str, Any]: ...
    def translate(self, sources: Sequence[str], *, attempt: int = 0) -> list[Reply]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class EngineConfig:
    """Which engine translates, and what it needs to know; a recipe's config has fields of these names."""

    engine: str = option("what translates", "vllm", choices=("vllm", "openai", "table", "identity"))
    model: str | None = option("vllm: its folder; openai: its name there; none: the one that it has", None)
    table: Path | None = option("table: file of rows with source and translation", None)
    server: tuple[str, ...] = option("openai: address, or several alike", ("http://localhost:8000",))
    key_variable: str | None = option("openai: environment variable with the key; none: no key is sent", None)
    tokenizer: Path | None = option("openai: folder of the model's tokenizer; none: prompts go as text", None)
    concurrency: int = option("openai: requests at a time", 64, bounds="above 0")
    timeout: float = option("openai: seconds without a byte until it is asked again", 300.0, bounds="above 0")
    patience: float = option("openai: seconds without any answer that end the run", 1800.0, bounds="above 0")
    prompt_format: str = option("ALMA's prompt as it is, or as a message", "alma", choices=("alma", "chat"))
    chat_template: str | None = option("for chat; none: the one that the tokenizer's folder states", None)
    dtype: str = option("vllm: of the weights", "bfloat16", choices=("bfloat16", "float16", "float32"))
    max_model_len: int | None = option("vllm: tokens of prompt and reply", None, bounds="above 0")
    max_num_seqs: int | None = option("vllm: pieces at a time; none: vLLM's default", None, bounds="above 0")
    gpu_memory_utilization: float = option("vllm: share of a GPU", 0.9, bounds="above 0, at most 1")
    tensor_parallel_size: int = option("vllm: GPUs of a rank", 1, bounds="above 0")
    enforce_eager: bool = option("vllm: no compiled graphs; starts faster, runs slower", False)


def check_engine(config: EngineConfig) -> None:
    """UserError for what is wrong with the config alone, before anything is read or loaded."""
    if config.engine not in ENGINES:
        raise UserError(f"there is no engine {config.engine!r}; expected one of {', '.join(ENGINES)}")
    needed = {"vllm": "model=FOLDER", "table": "table=FILE"}.get(config.engine)
    if needed and getattr(config, needed.partition("=")[0]) is None:
        raise UserError(f"the engine {config.engine!r} needs one; name it: {needed}")
    paths = [config.table, config.tokenizer, config.model if config.engine == "vllm" else None]
    if missing := [str(path) for path in paths if path and not Path(path).exists()]:
        raise UserError(f"{missing[0]}: there is no such file or folder; get it first, or correct the path")
    if config.engine == "identity" and (config.model or config.table or config.tokenizer):
        raise UserError("the engine 'identity' copies, and takes no model; set engine=vllm, openai or table")
    if config.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        _import_vllm()  # says what to do
    if config.engine != "identity":
        require("py3langid", "translate")


def open_engine(config: Any, language: Language) -> Engine:
    """The engine that the config names; config: an EngineConfig, or what has some of its fields."""
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    config = EngineConfig(**{name: getattr(config, name) for name in names if hasattr(config, name)})
    check_engine(config)
    return ENGINES[config.engine](config, language)


def prompt(source: str, language: Language) -> str:
    """The prompt of ALMA's code, no space at its end (get_prompt in utils/utils.py of fe1ixxu/ALMA)."""
    origin, target = language.source, language.name
    return f"Translate this from {origin} to {target}:\n{origin}: {source}\n{target}:"


def sampling(attempt: int, language: Language) -> dict[str, Any]:
    """Explicit, because servers and vLLM take what is left out from the model: greedy to the end of the line;
    then X-ALMA's own sampling, and no stop at a line break, since a reply may begin with one."""
    if attempt == 0:
        return {"temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": ["\n"]}
    return {"temperature": 0.6, "top_p": 0.9, "seed": attempt, "stop": [f"\n{language.source}:"]}


class IdentityEngine:
    """Gives back what it gets."""

    name = "identity"

    def settings(self) -> dict[str, Any]:
        return {"engine": self.name}

    def translate(self, sources: Sequence[str], *, attempt: int = 0) -> list[Reply]:
        return [Reply(source) for source in sources]

    def close(self) -> None:
        pass


class TableEngine:
    """Answers from a file of {"source", "translation"}; of two rows with one source the last counts."""

    name = "table"

    def __init__(self, path: Path | None) -> None:
        self.answers: dict[str, str] = {}
        for line, row in read_rows(path):
            source, translation = row.get("source"), row.get("translation")
            if not isinstance(source, str) or not isinstance(translation, str):
                found = f"found {', '.join(map(repr, row)) or 'no field'}"
                expected = "expected the texts 'source' and 'translation'"
                raise UserError(f"{path}, line {line}: {found}; {expected}")
            self.answers[source] = translation
        self.digest = sha256(path)

    def settings(self) -> dict[str, Any]:
        return {"engine": self.name, "sha256": self.digest}

    def translate(self, sources: Sequence[str], *, attempt: int = 0) -> list[Reply]:
        found = [self.answers.get(source) for source in sources]
        return [Reply("", "missing") if text is None else Reply(text) for text in found]

    def close(self) -> None:
        pass


class VLLMEngine:
    """vLLM in this process: one engine a rank of torchrun, on `tensor_parallel_size` GPUs of its own."""

    name = "vllm"

    def __init__(self, config: EngineConfig, language: Language) -> None:
        self.config, self.language, folder = config, language, Path(config.model)
        self.prompts = Prompts(folder, language, config.prompt_format, config.chat_template)
        _claim_devices(config.tensor_parallel_size)
        before = multiprocessing.active_children()
        with _apart():
            self._vllm = _import_vllm()
            self._llm = _start_vllm(self._vllm, folder, config)
            self._processes = [child for child in multiprocessing.active_children() if child not in before]
            self._guard = _guard([child.pid for child in self._processes])
        self.max_model_len = self._llm.llm_engine.model_config.max_model_len
        self._digest = model_digest(folder)

    def settings(self) -> dict[str, Any]:
        return {
            "engine": self.name, "vllm": self._vllm.__version__, "model": self._digest,
            "dtype": self.config.dtype, "max_model_len": self.max_model_len,
            **self.prompts.settings(), "sampling": sampling(0, self.language),
        }  # fmt: skip

    def translate(self, sources: Sequence[str], *, attempt: int = 0) -> list[Reply]:
        """vLLM raises, and answers nothing, if one prompt of a call is empty or as long as the context: such
        pieces are sorted out before."""
        replies = [self.prompts.fit(source, self.max_model_len) for source in sources]
        asked = [number for number, fitted in enumerate(replies) if not isinstance(fitted, Reply)]
        asked.sort(key=lambda number: -len(replies[number][0]))  # a long one at the end would run alone
        for number, reply in zip(asked, self._generate([replies[number] for number in asked], attempt)):
            replies[number] = reply
        return replies

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        self._guard.communicate(b"\n")

    def sampling_params(self, budgets: Sequence[int], attempt: int) -> list[Any]:
        """vLLM's SamplingParams for replies of so many tokens at most."""
        fixed = sampling(attempt, self.language) | {"stop_token_ids": self.prompts.stop_ids}
        loops = getattr(self._vllm.sampling_params, "RepetitionDetectionParams", None)  # not in old ones
        fixed |= {"repetition_detection": loops(**LOOP)} if loops else {}
        return [self._vllm.SamplingParams(max_tokens=budget, **fixed) for budget in budgets]

    def _generate(self, asked: list[tuple[list[int], int]], attempt: int) -> list[Reply]:
        """Replies to (ids of the prompt, tokens that the reply may have)."""
        if not asked:
            return []
        params = self.sampling_params([budget for _, budget in asked], attempt)
        prompts = [{"prompt_token_ids": ids} for ids, _ in asked]
        outputs = self._call(prompts, params)
        assert [output.prompt_token_ids for output in outputs] == [ids for ids, _ in asked]
        ends = [(output.outputs[0], len(output.prompt_token_ids)) for output in outputs]
        return [_reply(end.text, end.finish_reason, size, len(end.token_ids)) for end, size in ends]

    def _call(self, prompts: list[dict[str, Any]], params: list[Any]) -> list[Any]:
        """LLM.generate, in a thread, since it waits forever where the engine's process was killed."""
        ends: list[Any] = []

        def work() -> None:
            try:
                ends.append(self._llm.generate(prompts, params, use_tqdm=False))
            except BaseException as error:
                ends.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while not ends and all(process.is_alive() for process in self._processes):
            thread.join(0.5)
        if ends and isinstance(ends[0], list):
            return ends[0]
        if ends and "EngineDead" not in type(ends[0]).__name__:
            raise ends[0]
        raise UserError(
            "vLLM's engine has died, see its last lines above; if memory ran out, set max_num_seqs or "
            "gpu_memory_utilization lower, then start again: what is finished is kept"
        )


class OpenAIEngine:
    """Any OpenAI-compatible server.  With the tokenizer's folder at hand it gets ids for /completions, which
    vLLM, llama.cpp and TGI take; without it text, or a message for /chat/completions."""

    name = "openai"

    def __init__(self, config: EngineConfig, language: Language) -> None:
        self.config, self.language, self.prompts = config, language, None
        if config.tokenizer is not None:
            self.prompts = Prompts(config.tokenizer, language, config.prompt_format, config.chat_template)
        self._server = Server(
            config.server, key_variable=config.key_variable, concurrency=config.concurrency,
            timeout=config.timeout, patience=config.patience,
        )  # fmt: skip
        models = self._server.models()
        model = config.model or (next(iter(models)) if len(models) == 1 else None)
        if model is None or (models and model not in models):
            asked = f"has no model {model!r}" if model else "was not told which model to take"
            has = ", ".join(models) or "(it gives no list)"
            raise UserError(f"{self._server.urls[0]} {asked}; it has: {has}; name one: model=NAME")
        self.model, entry = model, models.get(model, {})
        self._is_vllm, self._room = entry.get("owned_by") == "vllm", entry.get("max_model_len")
        self._probe()

    def settings(self) -> dict[str, Any]:
        prompts = self.prompts.settings() if self.prompts else {
            "prompt": prompt("{}", self.language), "prompt_format": self.config.prompt_format,
        }  # fmt: skip
        return {"engine": self.name, "model": self.model, **prompts, "sampling": sampling(0, self.language)}

    def translate(self, sources: Sequence[str], *, attempt: int = 0) -> list[Reply]:
        bodies = [self._body(source, attempt) for source in sources]
        asked = [body for body in bodies if not isinstance(body, Reply)]
        answers = iter(self._server.ask_all(self._path, asked, _read_choice))
        return [body if isinstance(body, Reply) else _accept(next(answers)) for body in bodies]

    def close(self) -> None:
        self._server.close()

    @property
    def _path(self) -> str:
        return "/completions" if self.prompts or self.config.prompt_format == "alma" else "/chat/completions"

    def _body(self, source: str, attempt: int) -> dict[str, Any] | Reply:
        """The request of a piece, or why it is not made."""
        body = {"model": self.model, **sampling(attempt, self.language)}
        if self._is_vllm:  # which fills what is left out from the model's generation_config
            body |= {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "repetition_detection": LOOP}
        if self.prompts is None:
            if CONTROL.search(source):
                return Reply("", "control_token")
            if re.search("[\ud800-\udfff]", source):
                return Reply("", "unencodable")
            body["max_tokens"] = len(source.encode()) + 32  # three tokens for three bytes
            text = prompt(source, self.language)
            chats = self.config.prompt_format == "chat"
            return body | ({"messages": [{"role": "user", "content": text}]} if chats else {"prompt": text})
        fitted = self.prompts.fit(source, self._room or 2**20)
        if isinstance(fitted, Reply):
            return fitted
        stop = {"stop_token_ids": self.prompts.stop_ids} if self._is_vllm else {}
        return body | {"prompt": fitted[0], "max_tokens": fitted[1]} | stop

    def _probe(self) -> None:
        """One request before all others: a server that refuses this one would refuse each."""
        answer = self._body("Good morning.", 0)
        if not isinstance(answer, Reply):
            answer = self._server.ask("POST", self._path, answer | {"max_tokens": 1}, _read_choice)
        if isinstance(answer, Refusal) or answer.finish_reason == "too_long":
            why = answer.message if isinstance(answer, Refusal) else f"it takes {self._room} tokens at most"
            what = f"{self._server.urls[0]}{self._path} refuses a request: {why}"
            raise UserError(f"{what}; start the server or set model and prompt_format otherwise")


class Prompts:
    """Pieces -> ids of their prompts, for the tokenizer in a model's folder."""

    def __init__(self, folder: Path, language: Language, form: str, chat_template: str | None) -> None:
        self.tokenizer, self.language, self.form = Tokenizer.from_pretrained(folder), language, form
        self.template = chat_template or self.tokenizer.chat_template
        if form == "chat" and self.template is None:
            names = ", ".join(chat.TEMPLATES)
            raise UserError(f"{folder} states no chat template; set chat_template to one of {names}")
        ends = chat.stop_ids(self.tokenizer, self.template) if form == "chat" else [self.tokenizer.eos_id]
        self.stop_ids = [i for i in ends if i is not None]
        self._empty = len(self.ids(""))

    def fit(self, source: str, context: int) -> tuple[list[int], int] | Reply:
        """The ids of the prompt, and how many tokens the reply may have in a context of so many.

        German takes up to 1.8 times the characters (99.9 % of lines), and more tokens: three for one, and 32.
        An empty reply if the vocabulary cannot express the piece, or if there is no room for as many again.
        """
        try:
            ids = self.ids(source)
        except (ValueError, UserError):  # UserError: a mark of the chat template that cannot be kept apart
            return Reply("", "unencodable")
        size, room = max(len(ids) - self._empty, 1), context - len(ids)
        return Reply("", "too_long", len(ids)) if room < size else (ids, min(3 * size + 32, room))

    def ids(self, source: str) -> list[int]:
        text = prompt(source, self.language)
        if self.form == "chat":
            messages = [{"role": "user", "content": text}]
            return chat.render(messages, self.tokenizer, self.template, add_generation_prompt=True).tokens
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return begin + self.tokenizer.encode(text)

    def settings(self) -> dict[str, Any]:
        """What decides the ids."""
        template = {"chat_template": chat.template_digest(self.template)} if self.form == "chat" else {}
        text = prompt("{}", self.language)
        return {"tokenizer": self.tokenizer.digest, "prompt": text, "prompt_format": self.form, **template}


def model_digest(folder: Path) -> str:
    """Hex sha256 over config.json and, of each file of weights, name, size, first and last MiB: all of 26 GB
    would take minutes."""
    digest, mib = hashlib.sha256(), 2**20
    for path in sorted(Path(folder).iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin", ".gguf"):
            size = path.stat().st_size
            digest.update(json.dumps([path.name, size]).encode())
            with open(path, "rb") as file:
                digest.update(file.read(mib))
                file.seek(max(size - mib, 0))
                digest.update(file.read(mib))
    return digest.hexdigest()


def _reply(text: str, finish_reason: str | None, prompt_tokens: int, completion_tokens: int) -> Reply:
    """The first line that is not empty, as ALMA's code takes it; what follows a line does not matter."""
    lines = text.strip().split("\n")
    if len(lines) > 1 and finish_reason in ("length", "repetition"):
        finish_reason = "stop"
    return Reply(lines[0].strip(), finish_reason or "stop", prompt_tokens, completion_tokens)


def _read_choice(answer: dict[str, Any]) -> Reply:
    """The reply in an answer of /completions or /chat/completions."""
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    text = choice["message"]["content"] or "" if "message" in choice else choice["text"]
    counts = (int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion"))
    if not isinstance(text, str):
        raise TypeError("the reply is no text")
    return _reply(text, choice.get("finish_reason"), *counts)


def _accept(answer: Reply | Refusal) -> Reply:
    if isinstance(answer, Reply):
        return answer
    if answer.status == 0:
        return Reply("", "failed")
    too_long = re.search(r"context|too (long|large)|max_(model_len|tokens)", answer.message)
    return Reply("", "too_long" if too_long else "refused")


def _claim_devices(number: int) -> None:
    """Leave this rank's GPUs alone visible; before vLLM is imported, as torch reads this once."""
    if "LOCAL_RANK" not in os.environ:
        return
    ranks, rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ["LOCAL_RANK"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(ranks * number))))
    devices = [device.strip() for device in visible.split(",") if device.strip()]
    if devices and len(devices) < ranks * number:
        raise UserError(
            f"{ranks} ranks with tensor_parallel_size={number} need {ranks * number} GPUs, but "
            f"CUDA_VISIBLE_DEVICES lists {len(devices)}; start fewer ranks"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[rank * number : (rank + 1) * number])


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """vLLM would take torchrun's variables for those of its own workers.  And its processes, which inherit
    what is blocked, must not end at a Ctrl-C or SIGTERM that reaches all: the batch in flight is to end."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if TORCHRUN.match(name)}
    resource_tracker.ensure_running()  # it unblocks them when the first process starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.environ.update(kept)


def _import_vllm() -> Any:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork would copy locks of other threads
    try:
        return require("vllm", "vllm")
    except UserError as error:
        raise UserError(f"{error}, in an environment of its own (on a CPU: make .venv-vllm)") from None


def _start_vllm(vllm: Any, folder: Path, config: EngineConfig) -> Any:
    names = ("dtype", "max_model_len", "gpu_memory_utilization", "tensor_parallel_size", "enforce_eager")
    options = {name: getattr(config, name) for name in names}
    options |= {"max_num_seqs": config.max_num_seqs} if config.max_num_seqs else {}
    try:
        return vllm.LLM(str(folder), seed=0, disable_log_stats=True, **options)
    except (ValueError, RuntimeError, OSError) as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(f"vLLM cannot start with {folder}: {words}; its lines above say more") from error


def _guard(numbers: list[int]) -> subprocess.Popen:
    """A shell that kills these processes when ours ends without a word: they would hold the GPU for ever."""
    script = f"read -r word || kill -9 {' '.join(map(str, numbers))}"
    return subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)


ENGINES = {
    "vllm": VLLMEngine,
    "openai": OpenAIEngine,
    "table": lambda config, language: TableEngine(config.table),
    "identity": lambda config, language: IdentityEngine(),
}
