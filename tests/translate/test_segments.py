"""Texts in parts: what must stay stays byte for byte, the rest comes back whole, in linear time."""

import json
import re
import time

import pytest
import rows
from hypothesis import example, given
from hypothesis import strategies as st

from phoenix.translate.fields import get, text_fields, with_texts
from phoenix.translate.segments import MARK, Piece, join, mark, smaller, split

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # halves of surrogate pairs too
SNIPPETS = """` `` ``` ~~~ $ $$ \\( \\) \\[ \\] \\begin{a} \\end{a} \\frac{1} < > <b> </b> <pre> </pre>
    <!-- --> [ ] ( ) { } {x} {"a":1} [[ ]] [[1]] [[2]] %s & &amp; @ a@b.de http://x.y www. a.com | |-|-| -
    * ** 1. a) # > 😀 ❤️ 7️⃣ . ! ? e.g. Dr. word Word שלום 。 _ " ' : , Human: \\n [^1] ](x) A B""".split()
BLANKS = [" ", "  ", "   ", "    ", "\n", "\n\n", "\r\n", "\r", "\t"]
ODD = ["\x85", "\u2028", "\u200f", "\0", "\ud800"]
TEXT_WITH_STRUCTURE = st.lists(st.sampled_from(SNIPPETS + BLANKS + ODD), max_size=40).map("".join)


def pieces(parts: list) -> list[Piece]:
    return [part for part in parts if isinstance(part, Piece)]


def round_trip(text: str, engine=lambda source: source, **options) -> str:
    parts = split(text, **options)
    return join(parts, {piece.source: engine(piece.source) for piece in pieces(parts)})


def change_letters(source: str) -> str:
    """An engine that changes each letter that it may: all outside of marks."""
    parts = re.split(r"(\[\[[0-9]+\]\])", source)
    return "".join(part if i % 2 else rows.letters_changed(part) for i, part in enumerate(parts))


@given(ANY_TEXT | TEXT_WITH_STRUCTURE, st.sampled_from([1, 2, 7, 30, 600]))
@example("[[1]] `a` [[[1]]] [[2`b`]] [[`c`]] [[0]] [[99999999999]] [[01]]", 600)
@example("** a **\n\n__ b c__", 600)
@example("a\r\n\n  b\x85c\u2028d\ud800\udc00e \n", 600)
def test_any_text_comes_back_and_pieces_are_what_they_promise(text, max_chars):
    parts = split(text, max_chars=max_chars)
    assert join(parts, {piece.source: piece.source for piece in pieces(parts)}) == text
    assert not any(isinstance(a, str) and isinstance(b, str) for a, b in zip(parts, parts[1:]))
    for piece in pieces(parts):
        assert re.search(r"[^\W\d_]", MARK.sub("", piece.source))
        assert piece.source == piece.source.strip()
        assert not re.search("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", piece.source)
        assert len(piece.source) <= max_chars or " " not in piece.source
        numbers = [int(number) for number in MARK.findall(piece.source)]
        assert numbers == [*range(1, len(piece.spans) + 1)]
        assert "\n" not in "".join(piece.spans)


@given(ANY_TEXT | TEXT_WITH_STRUCTURE)
def test_only_letters_of_pieces_change(text):
    changed = round_trip(text, change_letters)
    assert len(changed) == len(text)
    assert all(a == b or (a.isalpha() and b == "ж") for a, b in zip(text, changed))


ONE_WORD = st.text(st.sampled_from('aBé"\\/😀`_1.:{}[]\ud800'), max_size=9)
IDENTIFIERS = st.sampled_from(["a_b, c_d", "12 345", "https://a.b/c x_y", "2024-01-01 10:00", " word\n"])
WORDS = st.builds('{}\n "plain" `c` https://a.b/c {}word.'.format, ONE_WORD, st.sampled_from("aé\u2028/"))
LEAF = st.none() | st.integers() | ONE_WORD | IDENTIFIERS | WORDS
JSON = st.recursive(LEAF, lambda inner: st.lists(inner) | st.dictionaries(ONE_WORD | WORDS, inner))


@given(st.lists(JSON) | st.dictionaries(ONE_WORD | WORDS, JSON), st.booleans(), st.sampled_from(["/", "\\/"]))
def test_of_json_the_values_that_have_words_change_if_asked_for(value, in_ascii, slash):
    def translated(value):
        if isinstance(value, str):
            return round_trip(value, engine) if value.endswith("word.") else value
        if isinstance(value, dict):
            return {key: translated(entry) for key, entry in value.items()}
        return [translated(entry) for entry in value] if isinstance(value, list) else value

    text = json.dumps(value, ensure_ascii=in_ascii, indent=1).replace("/", slash)
    assert not pieces(split(text)) and round_trip(text, json_strings=True) == text
    for engine in (str.swapcase, '"\\\n{}ä'.format):
        changed = round_trip(text, engine, json_strings=True)
        assert json.loads(changed) == translated(value)
        layout, before = (re.sub(r'"(?:[^"\\]|\\.)*"(:?)', r"\1", each) for each in (changed, text))
        assert layout == before and changed.count("https:" + 2 * slash) == text.count("https:" + 2 * slash)


@given(
    ANY_TEXT | TEXT_WITH_STRUCTURE, st.integers(0, 40), st.sampled_from(['{"a":', '["', '"}', '{"b": "c d"}'])
)
def test_any_text_comes_back_with_the_strings_in_its_json(text, place, insert):
    text = text[:place] + insert + text[place:]
    assert round_trip(text, json_strings=True) == text
    changed = round_trip(text, change_letters, json_strings=True)
    assert len(changed) == len(text) or "\\" in text


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ('Is {"say it": "Say it."} `x`?', 'жж {"say it": "жжж жж."} `x`?'),
        (r'["Gr\u00fcn \/ \ud83d\ude00 blau", "to_do"]', r'["жжжж / \ud83d\ude00 жжжж", "to_do"]'),
        ('```json\n{"a": "Say it."}\n```', '```json\n{"a": "Say it."}\n```'),
        ('{"a": "{\\"b\\": \\"Say it.\\"}"}', '{"a": "{\\"b\\": \\"Say it.\\"}"}'),
        ('Say {"a": "b"} or [[1]] to "me"', 'жжж {"a": "b"} жж [[1]] жж "жж"'),
    ],
)
def test_strings_in_json_are_texts_and_all_else_stays(text, changed):
    assert round_trip(text, change_letters, json_strings=True) == changed


@given(ANY_TEXT | TEXT_WITH_STRUCTURE)
def test_smaller_parts_hold_no_mark_and_come_back(text):
    for piece in pieces(split(text)):
        parts = smaller(piece)
        whole = join([piece], {piece.source: piece.source})
        assert join(parts, {part.source: part.source for part in pieces(parts)}) == whole
        assert not any(part.spans or MARK.search(part.source) for part in pieces(parts))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("block", rows.BLOCKS)
def test_each_block_keeps_what_it_must_and_gives_the_rest(block, newline):
    block = block.replace("\n", newline)
    assert round_trip(rows.source(block), change_letters) == rows.target(block)


def test_200_rows_keep_structure_and_protected_spans():
    everything = rows.rows()
    assert len(everything) == 200
    for row, expected in everything:
        changed = {path: round_trip(get(row, path), change_letters) for path in text_fields(row)}
        assert with_texts(row, changed) == expected


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("# Head\n- [x] item\n  1. deep\n> said\n\n", ["Head", "item", "deep", "said"]),
        ("| A b | C |\n|---|:-:|\n| d \\| e | |\nf | g\n\nh | i", ["A b", "C", "d \\| e", "f", "g", "h | i"]),
        ("A | B\n- | -\nc | d", ["A", "B", "c", "d"]),
        ("a | b\nc | d", ["a | b", "c | d"]),
        ("| a | b |", ["a", "b"]),
        ("a\tb  c   d", ["a", "b  c", "d"]),
        ("<p>All of it</p>", ["All of it"]),
        ("<p>A <b>part</b></p>", ["[[1]]A [[2]]part[[3]]"]),
        ("<br>One tag", ["One tag"]),
        ("One <br> tag", ["One [[1]] tag"]),
        ("🎉 Ready 🎉 set 🎉", ["Ready [[1]] set"]),
        ("🎉 <b>Ready</b> 🎉", ["[[1]]Ready[[2]]"]),
        ("`x` is `y`", ["[[1]] is [[2]]"]),
        ("**Bold** and **more**", ["**Bold** and **more**"]),
        ("**Bold**\n_so_\n***both***\n* item *", ["Bold", "so", "both", "item *"]),
        ("\u200fWord\u200f", ["Word\u200f"]),
        ("12.5 %, 3 + 4 = 7!", []),
        ("See www.a.com, or b@c.de.", ["See [[1]], or [[2]]."]),
        ("It is `a` `b` c", ["It is [[1]] c"]),
    ],
)
def test_pieces_are_without_structure(text, sources):
    assert [piece.source for piece in pieces(split(text))] == sources


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("at https://a.b/c.d, then", "https://a.b/c.d"),
        ("at https://a.b/c_(d)? Yes", "https://a.b/c_(d)"),
        ("(at https://a.b/c)", "https://a.b/c"),
        ("at a.com/x. Then", "a.com/x"),
        ("by a.b+c@d-e.co.uk.", "a.b+c@d-e.co.uk"),
        ("with ``a ` b`` in", "``a ` b``"),
        ("so $a$, yes", "$a$"),
        ("a {name}, here", "{name}"),
        ("a %5.2f%% here", "%5.2f"),
        ("a 👨‍👩‍👧‍👦 family", "👨‍👩‍👧‍👦"),
        ("tag <a href='x'> here", "<a href='x'>"),
    ],
)
def test_a_span_ends_where_it_ends(text, span):
    assert [piece.spans for piece in pieces(split(text))] == [(span,)]


def test_one_source_is_one_translation_whatever_its_spans():
    first, second = split("Open `a` now."), split("- Open https://b.example now.")
    assert pieces(first)[0].source == pieces(second)[0].source == "Open [[1]] now."
    answer = {"Open [[1]] now.": "Jetzt [[1]] öffnen."}
    assert join(first, answer) == "Jetzt `a` öffnen."
    assert join(second, answer) == "- Jetzt https://b.example öffnen."


def test_a_translation_may_move_double_lose_and_invent_marks():
    parts = split("Put `a` into `b`.")
    answers = {"[[2]] [[1]]": "`b` `a`", "[[1]][[1]]": "`a``a`", "none": "none", "[[3]] [[0]]": "[[3]] [[0]]"}
    for answer, expected in answers.items():
        assert join(parts, {parts[0].source: answer}) == expected
    with pytest.raises(KeyError):
        join(parts, {})


def test_marks_have_no_letter():
    assert [mark(1), mark(12)] == ["[[1]]", "[[12]]"]
    assert MARK.fullmatch(mark(12))


@pytest.mark.parametrize(
    ("text", "max_chars", "expected"),
    [
        ("One is here. Two is there. Three.", 26, ["One is here. Two is there.", "Three."]),
        ("One is here. Two is there. Three.", 20, ["One is here.", "Two is there. Three."]),
        ("We met Dr. Who in Rome. He left.", 27, ["We met Dr. Who in Rome.", "He left."]),
        ("We met Dr. Who in Rome. He left.", 22, ["We met Dr. Who in", "Rome. He left."]),
        ("Obst, z. B. Äpfel, ist gut. Ja.", 29, ["Obst, z. B. Äpfel, ist gut.", "Ja."]),
        ("Fruit, e.g. Apples and U.S. Plums.", 24, ["Fruit,", "e.g. Apples and U.S.", "Plums."]),
        ('He said no! and left. "So." They ate.', 28, ['He said no! and left. "So."', "They ate."]),
        ("He said no! and left home", 15, ["He said no! and", "left home"]),
        ("He said no! And left home", 15, ["He said no!", "And left home"]),
        ("你好！你好？", 4, ["你好！", "你好？"]),
        ("first clause, second clause and more", 24, ["first clause,", "second clause and more"]),
        ("no boundary but blanks here", 12, ["no boundary", "but blanks", "here"]),
        ("a " + "b" * 20 + " c", 5, ["a", "b" * 20, "c"]),
        ("b" * 20, 5, ["b" * 20]),
        ("第一句。第二句。第三句。", 9, ["第一句。第二句。", "第三句。"]),
        ("Version 3. Mai 2020. The end is near.", 25, ["Version 3. Mai 2020.", "The end is near."]),
    ],
)  # fmt: skip
def test_long_lines_are_cut_at_sentence_ends(text, max_chars, expected):
    assert [piece.source for piece in pieces(split(text, max_chars=max_chars))] == expected
    assert round_trip(text, max_chars=max_chars) == text


def test_a_protected_span_is_never_cut_and_counts_as_its_mark():
    address = "https://example.com/" + "a" * 1000
    parts = split(f"Read {address} and then rest a while.", max_chars=20)
    assert [piece.source for piece in pieces(parts)] == ["Read [[1]] and then", "rest a while."]
    assert pieces(parts)[0].spans == (address,)


def test_smaller_cuts_at_spans_and_sentence_ends():
    (piece,) = split("Use `x` here. Dr. Who agrees! Then stop")
    assert [part if isinstance(part, str) else part.source for part in smaller(piece)] == [
        "Use", " `x` ", "here.", " ", "Dr. Who agrees!", " ", "Then stop",
    ]  # fmt: skip
    (whole,) = split("Nothing to cut here")
    assert smaller(whole) == [whole]


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="max_chars is 0; expected 1 or more"):
        split("a", max_chars=0)


# _ is a blank, ¶ a line feed, → a tab, ← a carriage return
SHORT_LOOPS = """` `_`` $a_ $ $$a_ \\( \\[ \\[¶ \\begin{a} \\begin{a}\\end{b} \\a{ \\a[ <a <pre>
    <pre><code> <!-- <| http:// http://a) ( [ [[ [[1 [[1]] [^a ]( ](a ]([[ { {{ {a {"a": {" {'a [1,¶
    %0 & @ a@ a@b. a@b.c@ a. a- .
    ... _ a __a : :a 😀 😀_`a`_ * **a - = > >_ 1._ # #A ¶ ¶¶ ¶¶____a ____a¶ ```¶ ~~~¶ ~~~¶```¶ |-|¶ |a |a¶
    a¶|-|¶ Human:_ A._a 你。 a→ → \u200f \ud800 ← \x00""".split()


@pytest.mark.parametrize("loop", SHORT_LOOPS)
def test_no_text_takes_more_than_linear_time(loop):
    """50,000 characters are read in about 0.1 s; what is quadratic takes a hundred times as long."""
    loop = loop.translate(str.maketrans("_¶→←", " \n\t\r"))
    text = loop * (50_000 // len(loop))
    start = time.process_time()
    parts = split(text)
    assert join(parts, {piece.source: piece.source for piece in pieces(parts)}) == text
    for piece in pieces(parts):
        smaller(piece)
    assert time.process_time() - start < 4


@pytest.mark.parametrize("unit", ["a", "Word and word. ", "` "])
def test_a_line_of_a_megabyte_is_fine(unit):
    text = unit * (1_000_000 // len(unit))
    assert round_trip(text) == text


def test_backticks_of_every_length_are_paired_in_linear_time():
    text = " ".join("`" * length for length in range(1, 1400))
    start = time.process_time()
    assert round_trip(text) == text
    assert time.process_time() - start < 4
