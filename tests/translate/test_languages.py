"""Files of languages: each loads and is sound; what is wrong in one is said in one sentence."""

import pytest

from phoenix.data.language import words
from phoenix.files import UserError
from phoenix.translate.language import FOLDER, load_language

NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
SOUND = 'code = "nl"\nname = "Dutch"\nlength_ratio = [0.5, 2]\nlong_length_ratio = [0.6, 1.8]\n'


def test_the_languages_of_the_paper_and_of_its_next_step_are_there():
    assert {"de", "fr", "es", "cs"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_language_is_sound(name):
    language = load_language(name)
    assert language.code == name and (language.source, language.source_code) == ("English", "en")
    for low, high in (language.length_ratio, language.long_length_ratio):
        assert 0 < low < 1 < high
    assert language.long_length_ratio[0] >= language.length_ratio[0]
    assert language.long_length_ratio[1] <= language.length_ratio[1]
    assert language.formal and language.informal and not set(language.formal) & set(language.informal)
    assert language.answers and language.leaks
    assert set("123456789") | {"10", "11", "12"} <= set(language.number_words)
    assert all(words(word) == [word] for word in language.number_words.values()), (
        "compared with lower-cased words"
    )


def test_a_path_is_a_language_too(tmp_path):
    path = tmp_path / "nl.toml"
    path.write_text(SOUND)
    language = load_language(path)
    assert (language.code, language.name, language.length_ratio) == ("nl", "Dutch", (0.5, 2))
    assert language == load_language(str(path))


def test_an_unknown_language_lists_those_there_are():
    with pytest.raises(UserError, match=r"unknown language 'xx'; .*recipes/languages has cs, de, es, fr"):
        load_language("xx")


@pytest.mark.parametrize("name", ["", "../de", "de/", "de\n"])
def test_a_name_is_no_way_out_of_the_folder(name):
    with pytest.raises(UserError, match="unknown language"):
        load_language(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SOUND.replace('name = "Dutch"\n', ""), "the field 'name' is missing"),
        (SOUND + "speed = 3\n", "the field 'speed' is unknown; fields are code, name"),
        (SOUND.replace('"nl"', "31"), "code is 31; expected a text"),
        (SOUND.replace('"nl"', '" "'), "code is ' '; expected a text"),
        (SOUND.replace("0.5, 2", "2, 0.5"), "length_ratio is .*; expected two numbers, the lower one first"),
        (SOUND.replace("0.5, 2", "true, 2"), "length_ratio is .*; expected two numbers"),
        (SOUND + 'formal = "u"\n', "formal is 'u'; expected a list of texts"),
        (SOUND + '[number_words]\ntwelve = "twaalf"\n', "number_words is .*; expected a table of texts"),
        (SOUND + "[number_words", "is not TOML in UTF-8"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / "nl.toml").write_text(text)
    with pytest.raises(UserError, match=rf"nl\.toml.* {message}|nl\.toml: {message}"):
        load_language(tmp_path / "nl.toml")


def test_a_file_that_is_no_text_or_not_there(tmp_path):
    (tmp_path / "nl.toml").write_bytes(b'code = "\xff"')
    with pytest.raises(UserError, match="is not TOML in UTF-8"):
        load_language(tmp_path / "nl.toml")
    with pytest.raises(UserError, match="cannot be read"):
        load_language(tmp_path / "de.toml")
