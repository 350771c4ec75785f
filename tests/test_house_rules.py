"""The shape of the code base: who imports whom, how large things may grow, and that imports do no work."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "phoenix").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
FILES = [*PACKAGE, *RECIPES]

# From top to bottom; siblings do not import each other.
LEVELS = [
    {"recipes"},
    {"eval", "playground", "translate", "train"},
    {"generation", "data"},
    {"chat", "tokenizer", "model"},
    {"kernels", "losses"},
]
FOR_ALL = {"config", "files", "remote", "report"}
# These import packages of an extra at the top, and are themselves imported on use.
ON_USE = ("phoenix.kernels.triton", "phoenix.eval.harness", "phoenix.playground.server")
OPTIONAL = """transformers gguf py3langid pyarrow tensorboard wandb datasets datasketch vllm flash_attn peft
    lm_eval huggingface_hub openai matplotlib mistral_common""".split()


# Signatures of the public contract that have more than 8 parameters.
WIDE = {("phoenix/losses.py", "dpo_loss"), ("phoenix/generation.py", "generate")}


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    """phoenix/model/gguf.py -> model, phoenix/chat.py -> chat, recipes/sft.py -> recipes."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "phoenix" else "recipes"


def imports(tree: ast.AST) -> set[str]:
    """Dotted names imported anywhere, in functions too, but not under `if TYPE_CHECKING`."""
    found, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    return found


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that are neither blank nor comment nor docstring."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*skipped, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node, clean=False) is not None:
                lines -= set(range(first.lineno, first.end_lineno + 1))
    return lines


def functions(tree: ast.AST) -> list[tuple[str, ast.FunctionDef, ast.AST | None]]:
    """Every function with its qualified name and the class that it stands in."""
    found, nodes = [], [(tree, "", None)]
    while nodes:
        parent, prefix, owner = nodes.pop()
        for node in ast.iter_child_nodes(parent):
            name = f"{prefix}{getattr(node, 'name', '')}"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((name, node, owner))
                nodes.append((node, f"{name}.", None))
            elif isinstance(node, ast.ClassDef):
                nodes.append((node, f"{name}.", node))
            else:
                nodes.append((node, prefix, owner))
    return found


def test_code_lines_are_counted_as_said():
    source = (
        '"""Doc\n\nstring."""\n\n# comment\nx = """a\nb"""  # two lines\n'  # 1 to 7
        '\n\ndef f():\n    "doc"\n    return (\n        1\n    )\n'  # 8 to 14
    )
    assert code_lines(source) == {6, 7, 10, 12, 13, 14}


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_run_one_way(path):
    here, names = room(path), imports(ast.parse(path.read_text()))
    if path == ROOT / "phoenix" / "__init__.py":
        assert not any(name.startswith("phoenix.") for name in names)
        return
    level = {name: number for number, rooms in enumerate(LEVELS) for name in rooms}
    assert here in level or here in FOR_ALL, f"{here} is a room that LEVELS does not know"
    for name in names:
        if name.startswith("recipes"):
            assert here == "recipes", f"imports {name}"
        there = name.split(".")[1] if name.startswith("phoenix.") else "__init__"
        if there.startswith("__"):  # the lazy package itself: import phoenix, phoenix.__version__
            continue
        if here == "losses":
            raise AssertionError(f"losses imports torch alone, not {name}")
        if here == "kernels" and there == "files":
            assert name in ("phoenix.files.UserError", "phoenix.files.require")
        elif there != here and there not in FOR_ALL:
            assert here in level and level[here] < level[there], f"{here} imports {name}"
        if here in FOR_ALL:
            assert there in FOR_ALL, f"{here} imports {name}"


def test_losses_import_torch_alone():
    path = ROOT / "phoenix" / "losses.py"
    if path.exists():
        tops = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
        assert tops - set(sys.stdlib_module_names) == {"torch"}


def test_translate_needs_no_torch():
    for path in [*(ROOT / "phoenix" / "translate").glob("*.py"), ROOT / "phoenix" / "data" / "language.py"]:
        assert "torch" not in {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}, label(
            path
        )


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_module_does_work_at_import(path):
    """At the top stand definitions, constants and imports; a bare call only registers an operator."""
    for node in ast.parse(path.read_text()).body:
        where = f"line {node.lineno}: {ast.unparse(node)[:60]}"
        if isinstance(node, ast.If):
            test = ast.unparse(node.test)
            assert test.endswith("TYPE_CHECKING") or test == "__name__ == '__main__'", where
        elif isinstance(node, ast.Expr):
            registers = isinstance(node.value, ast.Call) and "register" in ast.unparse(node.value.func)
            assert registers or isinstance(node.value, ast.Constant), where
        else:
            allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
            assert isinstance(node, (*allowed, ast.AsyncFunctionDef)), where
            if isinstance(node, ast.Assign | ast.AnnAssign):
                text = ast.unparse(node)
                assert not any(word in text for word in ("environ", "is_available", "device_count")), where


FRESH = """
import os, pkgutil, importlib, sys, threading
environment = dict(os.environ)
import phoenix
assert "torch" not in sys.modules and "numpy" not in sys.modules, "import phoenix loads torch or numpy"
modules = [m.name for m in pkgutil.walk_packages(phoenix.__path__, "phoenix.")]
modules = [name for name in modules if not name.startswith(ON_USE)]
for name in modules:
    if name.startswith("phoenix.translate") or name == "phoenix.data.language":
        importlib.import_module(name)
assert "torch" not in sys.modules, "phoenix.translate or phoenix.data.language loads torch"
import torch
before = set(sys.modules)
if "phoenix.losses" in modules:
    import phoenix.losses
    new = {name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names}
    assert all(name.split(".")[0] in ("phoenix", "torch") for name in new), new
for name in modules:
    importlib.import_module(name)
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & set(OPTIONAL), loaded & set(OPTIONAL)
assert not torch.cuda.is_initialized() and threading.active_count() == 1
assert dict(os.environ) == environment, "an import sets an environment variable"
assert all(getattr(phoenix, name) for name in phoenix.__all__)
"""


def test_a_fresh_process_loads_what_it_needs():
    script = f"ON_USE, OPTIONAL = {ON_USE!r}, {OPTIONAL!r}\n{FRESH}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_budget_of_the_package_and_of_the_recipes():
    size = {path: len(code_lines(path.read_text())) for path in FILES}
    assert sum(size[path] for path in PACKAGE) <= 8300
    assert sum(size[path] for path in RECIPES) <= 1600


@pytest.mark.parametrize("path", FILES, ids=label)
def test_budget_of_a_file(path):
    source = path.read_text()
    lines, tree = code_lines(source), ast.parse(source)
    assert len(lines) < 400
    if path in RECIPES:
        assert len(lines) <= 250
    for name, node, owner in functions(tree):
        size = len([line for line in lines if node.lineno <= line <= node.end_lineno])
        is_main = path in RECIPES and name == "main"
        if room(path) != "kernels":
            assert size <= (120 if is_main else 60), f"{name} has {size} lines"
        arguments = node.args
        number = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) - (owner is not None)
        decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
        inside = "custom_op" in decorators or "register" in decorators or "triton.jit" in decorators
        in_function = owner is not None and any("Function" in ast.unparse(base) for base in owner.bases)
        if not inside and not in_function and (label(path), name) not in WIDE:
            assert number <= 8, f"{name} has {number} parameters"
