"""Phoenix: take an open Mistral-type model to a new language.

The public names are resolved on first use, so that `import phoenix.losses` loads torch alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phoenix.generation import generate
    from phoenix.model.layout import AttentionLayout, PackedBatch
    from phoenix.model.mistral import Mistral, MistralConfig
    from phoenix.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["AttentionLayout", "Mistral", "MistralConfig", "PackedBatch", "Tokenizer", "generate"]

_HOMES = {
    "AttentionLayout": "phoenix.model.layout",
    "Mistral": "phoenix.model.mistral",
    "MistralConfig": "phoenix.model.mistral",
    "PackedBatch": "phoenix.model.layout",
    "Tokenizer": "phoenix.tokenizer",
    "generate": "phoenix.generation",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'phoenix' has no attribute {name!r}")
