"""Talk to a model in the terminal.

    python recipes/chat.py model_name_or_path=runs/quickstart/sft/model temperature=0.7

An empty line or Ctrl-D ends it; `/neu` (or `/new`) starts a new conversation.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from phoenix import chat
from phoenix.config import check_bounds, option, run_recipe
from phoenix.files import UserError
from phoenix.generation import generate
from phoenix.model.mistral import Mistral
from phoenix.tokenizer import Tokenizer
from phoenix.train.distributed import resolve_dtype


@dataclass(frozen=True)
class ChatConfig:
    """A conversation with a model folder, in the terminal."""

    model_name_or_path: Path = option("folder of the model", default=Path("runs/quickstart/sft/model"))
    chat_template: str | None = option("its name; none: the one that the model's folder states", default=None)
    system: str | None = option("a system message before the conversation", default=None)
    max_new_tokens: int = option("tokens of a reply at most", 384, bounds="above 0")
    temperature: float = option("0 is greedy", 0.7, bounds="of at least 0")
    top_p: float = option(
        "sample from the most probable tokens that sum to this", 0.9, bounds="above 0, at most 1"
    )
    top_k: int = option("sample from so many tokens at most, 0 for all", 0, bounds="of at least 0")
    seed: int = option("of the sampling", default=0)
    dtype: str = option("of weights and computation", "auto", ("auto", "bfloat16", "float32"))


def main(config: ChatConfig) -> None:
    """Read lines from stdin, print replies to stdout.  Raises UserError."""
    check_bounds(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_pretrained(config.model_name_or_path)
    if config.chat_template or tokenizer.chat_template is None:
        if config.chat_template is None:
            names = ", ".join(chat.TEMPLATES)
            raise UserError(
                f"{config.model_name_or_path} states no template; set chat_template to one of {names}"
            )
        chat.apply_template(tokenizer, config.chat_template)
    dtype = resolve_dtype(config.dtype, device)
    model = Mistral.from_pretrained(config.model_name_or_path, dtype=dtype, device=device)
    opening = [{"role": "system", "content": config.system}] if config.system else []
    messages, turn = list(opening), 0
    print(
        f"{config.model_name_or_path}, {dtype} on {device}; /neu starts again, an empty line ends",
        file=sys.stderr,
    )
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while text := input("> " if sys.stdin.isatty() else "").strip():
            if text in ("/neu", "/new"):
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": text})
            try:
                [reply] = generate(
                    model, tokenizer, [messages], max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
                    seed=config.seed + turn,
                )  # fmt: skip
            except ValueError as error:
                raise UserError(f"no reply to this: {error}; start again, or lower max_new_tokens") from None
            print(printable(reply), flush=True)
            messages.append({"role": "assistant", "content": reply or " "})
            turn += 1


def printable(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


if __name__ == "__main__":
    run_recipe(main, ChatConfig)
