"""Configs: values of the annotated type or one sentence that names place, value and what to write."""

import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix import config as config_module
from phoenix.config import help_text, load_config, option, save_config
from phoenix.files import UserError


@dataclass(frozen=True)
class Settings:
    """Settings of nothing."""

    store: Path = option("where the rows are")
    learning_rate: float = option("peak rate", default=2e-5)
    max_steps: int | None = option("end after so many steps", default=7)
    compile: bool = option("compile the blocks", default=False)
    optim: str = option("optimizer", default="adamw", choices=("adamw", "rmsprop"))
    note: str | None = option("free text", default="x")
    report_to: tuple[str, ...] = option("trackers", default=(), choices=("wandb", "tensorboard"))
    betas: tuple[float, float] = option("of the optimizer", default=(0.9, 0.999))


def load(*arguments: str) -> Settings:
    return load_config(Settings, ["store=rows", *arguments])


def from_file(tmp_path, text: str) -> Settings:
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    return load_config(Settings, [str(tmp_path / "c.toml")])


def test_the_command_line_beats_the_file_beats_the_default(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('store = "a"\nlearning_rate = 0.1\nmax_steps = 3\n')
    config = load_config(Settings, [str(file), "max_steps=4", "max_steps=5"])
    assert (config.store, config.learning_rate, config.max_steps, config.optim) == (
        Path("a"),
        0.1,
        5,
        "adamw",
    )
    assert load_config(Settings, ["max_steps=4"], default_file=file).learning_rate == 0.1


@pytest.mark.parametrize(
    "argument, value",
    [
        ("learning_rate=1e-5", 1e-5),
        ('learning_rate="1e-5"', 1e-5),
        ("learning_rate=1", 1.0),
        ("max_steps=none", None),
        ("max_steps=0", 0),
        ("compile=true", True),
        ("note=true", "true"),
        ("note=1e-5", "1e-5"),
        ("note=a = b", "a = b"),
        ("note=none", None),
        ("store=2024-01-01", Path("2024-01-01")),
        ("store=none", Path("none")),
        ('report_to=["wandb"]', ("wandb",)),
        ("report_to=wandb", ("wandb",)),
        ('report_to="wandb"', ("wandb",)),
        ("report_to=[]", ()),
        ("betas=[0.5, 1]", (0.5, 1.0)),
    ],
)
def test_values_become_the_annotated_type(argument, value):
    found = getattr(load(argument), argument.split("=")[0])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("lerning_rate=1", r"'lerning_rate=1': unknown field 'lerning_rate'; did you mean 'learning_rate'\?"),
        ("lr=1", r"unknown field 'lr'; did you mean 'learning_rate'\?"),
        ("zzzzzz=1", r"unknown field 'zzzzzz'; --help lists the fields"),
        ("learning_rate=fast", r"learning_rate is 'fast'; expected float"),
        ("learning_rate=true", r"learning_rate is True; expected float"),
        ("learning_rate=nan", r"learning_rate is nan; expected float"),
        ('learning_rate="nan"', r"learning_rate is 'nan'; expected float"),
        ("learning_rate=1" + "0" * 400, r"expected float"),
        ("max_steps=" + "9" * 5000, r"expected int or none"),
        ("max_steps=1.0", r"max_steps is 1.0; expected int or none"),
        ("max_steps=true", r"max_steps is True; expected int or none"),
        ("max_steps=", r"max_steps is ''; expected int or none"),
        ("compile=yes", r"compile is 'yes'; expected bool"),
        ("compile=1", r"compile is 1; expected bool"),
        ("optim=rmsprob", r"optim is 'rmsprob'; expected one of adamw, rmsprop; did you mean 'rmsprop'\?"),
        ("optim=none", r"optim is 'none'; expected one of"),
        ('report_to=["wandb", "tensorbord"]', r"report_to is 'tensorbord'; .* did you mean 'tensorboard'\?"),
        ("report_to=wandbb", r"report_to is 'wandbb'; expected one of .* did you mean 'wandb'\?"),
        ("report_to=[wandb]", r"report_to is '\[wandb\]'; expected list of str"),
        ("report_to=none", r"report_to is 'none'; expected list of str"),
        ("report_to=", r"report_to is ''; expected list of str"),
        ("report_to=1", r"report_to is 1; expected list of str"),
        ("betas=0.9", r"betas is 0.9; expected list of 2 float"),
        ("report_to=[1]", r"expected list of str"),
        ("use_peft=true", r"unknown field 'use_peft'; it is not here: all weights are trained"),
        ("max_length=9", r"unknown field 'max_length'; it is a field of recipes/prepare.py"),
        ("max_seq_length=9", r"unknown field 'max_seq_length'; max_length is a field of recipes/prepare.py"),
        ("betas=[0.9]", r"betas is \[0.9\]; expected list of 2 float"),
        ("betas=[0.9, nan]", r"expected list of 2 float"),
        ("--compile", r"unknown flag '--compile'"),
        ("--learning_rate=3", r"unknown flag '--learning_rate=3'; fields are set as key=value"),
    ],
)
def test_errors_on_the_command_line(argument, message):
    with pytest.raises(UserError, match=message) as error:
        load(argument)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ('store = "a"\n\n  lerning_rate = 1\n', r"line 3: unknown field 'lerning_rate'; did you mean"),
        ('store = "a"\n[training]\nx = 1\n', r"line 2: unknown field 'training'"),
        ('store = "a"\ntraining.x = 1\n', r"line 2: unknown field 'training'"),
        ('store = "a"\n"max_steps" = "many"\n', r"line 2: max_steps is 'many'; expected int or none"),
        ('store = ""\n', r"line 1: store is ''; expected path"),
        ("learning_rate = 0.1\n", r"c.toml: 'store' is not set; write store="),
        ("store = \n", r"c.toml: not valid TOML"),
        ('store = "a"\nstore = "b"\n', r"c.toml: not valid TOML"),
        ("max_steps = " + "9" * 5000, r"c.toml: not valid TOML"),
        ("note = " + "[" * 5000, r"c.toml: not valid TOML"),
    ],
)
def test_errors_in_a_file_name_the_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        from_file(tmp_path, text)


@pytest.mark.parametrize(
    "name", ["a\0b", "a\nb", "a\rb", "\x1b[2J", "a\x7f", "x" * 256, "ä" * 128, "y/" * 2048]
)
def test_a_path_that_no_disk_takes_or_no_line_holds_is_refused(tmp_path, name):
    for argument in (f"store={name}", f"store={json.dumps(name)}"):
        with pytest.raises(
            UserError, match=r"store is .*; expected path without control characters"
        ) as error:
            load_config(Settings, [argument])
        assert str(error.value).isprintable()
    with pytest.raises(UserError, match=r"c\.toml, line 1: store is "):
        from_file(tmp_path, f"store = {json.dumps(name)}\n".replace("\x7f", "\\u007f"))


@pytest.mark.parametrize(
    "name", ["x" * 255, "../a", "/a/../b", "CON", "mit Leerzeichen/größe", "a\u202fb", "~"]
)
def test_a_path_that_looks_odd_is_taken_as_it_stands(name):
    assert load_config(Settings, [f"store={name}"]).store == Path(name)


def test_an_argument_that_is_no_utf_8_is_refused():
    for argument in ("store=z\udcff", 'report_to=["\udcff"]', "note=\udcff", "\udcff.toml"):
        with pytest.raises(UserError, match=r"command line, .*udcff.*: is not UTF-8|no such config file"):
            load_config(Settings, [argument])


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin1.toml").write_bytes(b'note = "\xe4"')
    for path, message in (
        (tmp_path / "absent.toml", "no such config file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "latin1.toml" / "x", "cannot be read"),
        (tmp_path / "latin1.toml", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(Settings, [str(path)])
    with pytest.raises(UserError, match=r"'b' is not key=value, and 'a' is the config file already"):
        load_config(Settings, ["a", "b"])
    with pytest.raises(UserError, match="command line: 'store' is not set"):
        load_config(Settings, [])


@given(
    st.builds(
        Settings,
        store=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=60).map(
            Path
        ),
        learning_rate=st.floats(allow_nan=False),
        max_steps=st.none() | st.integers(-(2**63), 2**63 - 1),
        compile=st.booleans(),
        optim=st.sampled_from(["adamw", "rmsprop"]),
        note=st.none() | st.text(st.characters(codec="utf-8")).filter(lambda text: text != "none"),
        report_to=st.lists(st.sampled_from(["wandb", "tensorboard"])).map(tuple),
        betas=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    )
)
def test_a_saved_config_gives_itself_again(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "saved.toml"
    save_config(path, config)
    assert load_config(Settings, [str(path)]) == config


def test_help_prints_every_field(capsys):
    with pytest.raises(SystemExit) as exit:
        load_config(Settings, ["max_steps=3", "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and text.strip() == help_text(Settings).strip()
    for field in dataclasses.fields(Settings):
        assert f"  {field.name}: " in text and field.metadata["meaning"] in text
    for part in ("path (required)", "(default 2e-05)", "int or none (default 7)", "one of adamw, rmsprop"):
        assert part in text


RECIPE = """
import sys
from dataclasses import dataclass
from phoenix.config import option, run_recipe
from phoenix.files import Interrupted, UserError

@dataclass(frozen=True)
class Config:
    end: str = option("how to end", default="well")

def main(config):
    if config.end == "badly":
        raise UserError("no rows; give some")
    if config.end == "early":
        raise Interrupted("stopped at step 3")
    if config.end == "by hand":
        raise KeyboardInterrupt

run_recipe(main, Config)
"""


@pytest.mark.parametrize(
    "arguments, rank, code, message",
    [
        (["end=well"], "0", 0, ""),
        (["end=badly"], "0", 2, "error: no rows; give some\n"),
        (["end=badly"], "1", 2, ""),
        (
            ["ende=badly"],
            "0",
            2,
            "error: command line, 'ende=badly': unknown field 'ende'; did you mean 'end'?\n",
        ),
        (["end=early"], "0", 75, "stopped at step 3\n"),
        (["end=early"], "1", 75, ""),
        (["end=by hand"], "0", 75, "stopped; the same command goes on\n"),
    ],
)
def test_how_a_recipe_exits(monkeypatch, capsys, arguments, rank, code, message):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
    monkeypatch.setenv("RANK", rank)
    try:
        exec(RECIPE, {"__name__": "recipe"})
        found = 0
    except SystemExit as exit:
        found = exit.code
    assert (found, capsys.readouterr().err) == (code, message)


def test_other_names_point_nowhere_twice():
    others = config_module.OTHER_NAMES
    assert not set(others) & {*others.values(), *config_module.WITHOUT_FIELD}


@dataclass(frozen=True)
class Own:
    """Fields of the names that another recipe lacks."""

    max_length: int = option("tokens", default=7)
    reference_model: str = option("folder", default="x")
    loss_type: tuple[str, ...] = option("losses", default=("sigmoid",))


@pytest.mark.parametrize(
    "argument, message",
    [
        ("max_seq_length=9", "did you mean 'max_length'?"),
        ("ref_model_name_or_path=a", "did you mean 'reference_model'?"),
        ("max_prompt_length=9", "it is a field of recipes/prepare.py"),
        ("rpo_alpha=1", "it is the weight of sft: add it to loss_type"),
        ("sync_ref_model=true", "it is not here: the reference stays the same"),
    ],
)
def test_a_name_of_trl_gives_ours_or_a_sentence(argument, message):
    name = argument.split("=")[0]
    with pytest.raises(UserError) as error:
        load_config(Own, [argument])
    assert f"command line, {argument!r}: unknown field {name!r}; {message}" in str(error.value)
    assert load_config(Own, ["max_length=9", "loss_type=ipo"]) == Own(max_length=9, loss_type=("ipo",))


@dataclass(frozen=True)
class Part:
    path: str = option("where it lies")
    weight: float = option("its share", 1.0, bounds="of at least 0")
    form: str | None = option("its form", None, ("flat", "tree"))


@dataclass(frozen=True)
class Whole:
    name: str = option("what it is called", "x")
    parts: tuple[Part, ...] = option("what it is made of", ())


def test_a_list_of_tables_becomes_dataclasses_and_itself_again(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('name = "n"\n[[parts]]\npath = "a"\n[[parts]]\npath = "b"\nweight = 2\nform = "tree"\n')
    config = load_config(Whole, [str(path)])
    assert config == Whole("n", (Part("a"), Part("b", 2.0, "tree")))
    save_config(tmp_path / "b.toml", config)
    assert load_config(Whole, [str(tmp_path / "b.toml")]) == config
    assert load_config(Whole, ['parts=[{path = "a", weight = 0.5}]']).parts == (Part("a", 0.5),)
    assert "parts: list of tables" in help_text(Whole) and "its share" in help_text(Whole)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            '[{path = "a"}, {path = "b", wieght = 2}]',
            "parts 2: unknown field 'wieght'; did you mean 'weight'",
        ),
        ("[{weight = 2}]", "parts 1: 'path' is not set"),
        ('[{path = "a", weight = "much"}]', "parts 1: weight is 'much'; expected float"),
        (
            '[{path = "a", form = "tre"}]',
            "parts 1: form is 'tre'; expected one of flat, tree; did you mean 'tree'",
        ),
        ('["a"]', "parts is ['a']; expected list of tables"),
        ("3", "expected list of tables"),
    ],
)
def test_errors_in_a_list_of_tables_name_the_table(value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(Whole, [f"parts={value}"])
