r"""A text -> parts: what stays byte for byte, and pieces of prose for an engine; and back.

1. `_protected` finds what must not be translated: code, LaTeX, addresses, HTML, JSON, placeholders, emoji.
2. What of it lies in one line is masked: "Run `ls -l` now" becomes "Run [[1]] now".  What spans lines is cut
   out.  A "[[1]]" that stood in the text is masked as well, so each mark of a masked text is ours.
3. The rest is cut at "\n" only, then at table cells, tabs and other control characters.  Indentation,
   bullets, numbers, blanks, emoji and tags at the edges stay outside of the piece; so does all that has no
   letter.  A line above `max_chars` is cut at sentence ends.

No regular expression here takes more than linear time on any text: quantifiers are possessive, and a span
that is not closed ends where the next one opens.
"""

import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["MARK", "Piece", "join", "mark", "smaller", "split"]

MARK = re.compile(r"\[\[([0-9]{1,9})\]\]")


@dataclass(frozen=True)
class Piece:
    """A run of text that goes to the engine.

    source: holds a letter, no control character (so no line break), no half of a surrogate pair, and mark(i)
    in the place of each protected span; spans: what mark 1, 2, ... stand for, in the order of the source.
    in_json: how the piece is written in the JSON string that it stands in, if it does; the spans then have
    that string's escapes too.
    """

    source: str
    spans: tuple[str, ...] = ()
    in_json: str = ""


def mark(number: int) -> str:
    """What stands for protected span `number`, from 1: "[[1]]"."""
    return f"[[{number}]]"


def split(text: str, *, max_chars: int = 600, json_strings: bool = False) -> list[str | Piece]:
    """Cut a text into parts that stay as they are (str) and pieces for the engine.

    max_chars: of a piece's source; a longer line is cut at sentence ends, else at clauses, else between
    words; a single longer word stays whole.  JSON, the whole text or in it, is kept; with json_strings the
    values in it that are strings of several words are cut as texts of their own.
    join(split(text), {each source: itself}) is `text`, for every str.  Raises ValueError for max_chars < 1.
    """
    if max_chars < 1:
        raise ValueError(f"max_chars is {max_chars}; expected 1 or more")
    if json_strings:
        parts, begin = [], 0
        for start, end in [(0, len(text))] if _is_json(text) else _protected(text):
            if '"' in text[start:end] and _is_json(text[start:end]):
                parts += split(text[begin:start], max_chars=max_chars) + _values(text[start:end], max_chars)
                begin = end
        return _compact(parts + split(text[begin:], max_chars=max_chars))
    if _is_json(text):
        return [text]
    spans, masked = [], []  # masked: text with marks, block, text with marks, block, ..., text with marks
    begin = 0
    line = []
    for start, end in _merged(_protected(text), text):
        line.append(text[begin:start])
        if "\n" in text[start:end]:
            masked += "".join(line), text[start:end]
            line = []
        else:
            spans.append(text[start:end])
            line.append(mark(len(spans)))
        begin = end
    masked.append("".join([*line, text[begin:]]))
    parts: list[str | Piece] = []
    for number, block in enumerate(masked):
        parts += _lines(block, spans, max_chars) if number % 2 == 0 else [block]
    return _compact(parts)


def join(parts: Sequence[str | Piece], translations: Mapping[str, str]) -> str:
    """Put a text together from its parts; translations: piece's source -> translation, still with marks.

    A mark that the piece has no span for stays as it is.  Raises KeyError for a source without translation.
    """
    return "".join(p if isinstance(p, str) else _filled(p, translations[p.source]) for p in parts)


def smaller(piece: Piece) -> list[str | Piece]:
    """A piece cut around its protected spans and at sentence ends: parts whose pieces hold no mark.

    For a second try of a piece that came back damaged; [piece] itself where there is nothing to cut.
    """
    parts: list[str | Piece] = []
    for number, text in enumerate(MARK.split(piece.source)):
        if number % 2:
            parts.append(_restore(mark(int(text)), piece.spans))
            continue
        begin = 0
        for start, end, rank in [*_boundaries(text), (len(text), len(text), SENTENCE)]:
            if rank == SENTENCE:
                parts += [*_segment(text[begin:start], (), len(text) + 1), text[start:end]]
                begin = end
    return _compact(parts)


def _filled(piece: Piece, translation: str) -> str:
    """What stands in the text in place of a piece; in JSON with the escapes that it needs there."""
    if piece.in_json and translation == piece.source:
        return piece.in_json
    text = json.dumps(translation, ensure_ascii=False)[1:-1] if piece.in_json else translation
    return _restore(text, piece.spans)


def _restore(text: str, spans: Sequence[str]) -> str:
    def span(match: re.Match) -> str:
        number = int(match[1])
        return spans[number - 1] if 0 < number <= len(spans) else match[0]

    return MARK.sub(span, text) if spans else text


def _compact(parts: list[str | Piece]) -> list[str | Piece]:
    """Neighbours that are kept become one part, empty ones go."""
    result: list[str | Piece] = []
    kept: list[str] = []
    for part in [*parts, None]:
        if isinstance(part, str):
            kept.append(part)
            continue
        if whole := "".join(kept):
            result.append(whole)
        kept = []
        if part is not None:
            result.append(part)
    return result


LEAD = r"[ \t>]*+(?:(?:[-*+]|\d{1,9}[.)])[ \t]++)?+"
STOP = r"\s<>\"`|"  # ends an address
ADDRESS = rf"""(?:[^{STOP}()\[\]{{}}\\。，、；：！？（）「」]
    | \([^{STOP}()]*+\) | \[[^{STOP}\[\]]*+\] | \{{[^{STOP}{{}}]*+\}})"""
EMOJI_BASE = "[\U0001f000-\U0001faff\u2600-\u27bf\u231a\u231b\u23e9-\u23fa\u2b1b\u2b1c\u2b50\u2b55]"
EMOJI_TAIL = "[\u200d\ufe0f\u20e3\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]"
EMOJI = rf"(?:{EMOJI_BASE}|[#*0-9]\ufe0f?\u20e3|[^\w\s]\ufe0f)"
DOMAINS = "com|org|net|edu|gov|info|io|ai|dev|app|eu|uk|de|at|ch|fr|es|it|nl|cz"
FORMAT = r"(?:\d{1,2}\$)?[-+\#0]{0,3}\d{0,3}(?:\.\d{1,3})?l?[sdifgxeuc]\b"  # of printf, after its %
CODE_TAGS = "pre|code|script|style|math|svg|kbd"

SPAN = re.compile(
    rf"""
    (?P<fence> ^{LEAD}(?P<ticks>`{{3,}}+(?=[^`\n]*$)|~{{3,}}+) [^\n]*+
        (?:\n(?![^`~\n]*+(?P=ticks)[`~]*+[ \t\r]*+$)[^\n]*+)*+ (?:\n[^\n]*+)?+ )
  | (?P<indented> (?:\A|(?<=\n\n)|(?<=\n\r\n)) (?:[ ]{{4}}|\t)[^\n]++ (?:\n(?:[ ]{{4}}|\t)[^\n]*+)*+ )
  | (?=[^\w\s.,;!?'"-]) (?:
        (?P<run> `++ )
      | (?P<latex> \\begin\{{[A-Za-z]{{1,40}}\*?\}} )
      | (?P<math> \$\$(?:[^$\\\n]++|\\[^\n]?+|\n(?![ \t\r]*+\n))*+\$\$
          | (?<![\\$\w])\$(?![\s$])(?:[^$\\\n]++|\\[^\n])*+(?<!\s)\$(?![\dA-Z_$]) )
      | \\\[(?:[^\\\n]++|\\(?![\[\]])|\n(?![ \t\r]*+\n))*+\\\]
      | \\\((?:[^\\\n]++|\\(?![()]))*+\\\)
      | \\(?:[ntr](?![a-z])|x[0-9a-f]{{2}}|u[0-9a-f]{{4}})                     # a line break spelt out
      | \\[A-Za-z]++\*?(?:\{{[^{{}}\n]*+\}}|\[[^\[\]\n]*+\])*+                 # \frac{{1}}{{2}}
      | <!--(?:[^<-]++|-(?!->)|<(?!!--))*+-->
      | (?i:<(?P<tag>{CODE_TAGS})\b[^<>]*+>(?:[^<]++|<(?!/?(?P=tag)\b))*+</(?P=tag)\s*+>)
      | </?[A-Za-z][\w:.-]*+(?:\s[^<>\n]*+)?+/?>
      | <\|[^|<>\n]{{1,64}}\|>                                                 # a control token
      | &(?:\#\d{{1,7}}|\#[xX][0-9a-fA-F]{{1,6}}|[A-Za-z][A-Za-z0-9]{{1,30}});
      | (?<![\w.@/])@\w{{2,50}}+                                               # a user's name
      | {MARK.pattern}
      | \{{\{{[^{{}}\n]*+\}}\}} | \{{%[^%{{}}\n]*+%\}} | \$?\{{\w[\w.:!,\[\]-]{{0,60}}+\}} | \{{\}}
      | \{{'[^{{}}\n]*+\}} | \$[A-Z_]{{2,40}}+ | %\(\w{{1,60}}+\)[a-z] | %{FORMAT} | %[A-Z_]{{2,40}}+%
      | \#[A-Z][A-Z0-9_]{{0,60}}+\# | (?<![\w:]):[a-z0-9_+-]{{2,40}}+:(?![\w:])
      | (?<=\])\((?:[^()\s]++|\([^()\s]*+\))*+(?:[ ]"[^"\n]*+")?+\)              # a link's target
      | (?<=\])\[[^\[\]\n]{{1,80}}+\] | \[\^[^\[\]\s]{{1,50}}+\]
      | (?P<json> [\[{{]\s*+["\[{{] )
      | (?:{EMOJI}{EMOJI_TAIL}*+)++ )
  | (?P<url> (?<![A-Za-z0-9])(?:(?:https?|ftps?|file|wss?|git|ssh)://|www\.){ADDRESS}++ )
  | (?<![\w.+@/-]) (?:
        (?:mailto:)?[\w.+-]++@[\w-]++(?:\.[\w-]++)++
      | (?P<domain> (?:[A-Za-z0-9-]++\.)+(?:{DOMAINS})\b(?![\w@-]|\.\w)(?:/{ADDRESS}*+)?+ )
      | [0-9]\ufe0f?\u20e3 )
    """,
    re.VERBOSE | re.MULTILINE,
)
CLOSERS = re.compile(r"`+|\\end\{[A-Za-z]{1,40}\*?\}")
INFO_STRING = re.compile(r"[\w+#.-]{0,40}[ \t\r]*\n")
PROSE = re.compile(r"[^\W\d_]{2,}[,;]? +[^\W\d_]{2,}")
CODE = re.compile(
    r"\s*(?:def|class|from|return|for|while|if|else|elif|try|except|var|let|const|function|public|private"
    r"|static|void|int|package|using)\b(?:.*(?:[(){}\[\];=<>]| [-+*/%] |\bimport\b)|.*:\s*\Z)"
    r"|\s*import [\w.]+(?: as \w+)?;?\s*\Z|\s*return \w+\s*\Z|\s*\w{1,20};\s*\Z"
    r"|\s*(?:SELECT|INSERT INTO|UPDATE|DELETE FROM|CREATE TABLE|WHERE|ORDER BY|sudo|pip|npm|git) \S"
    r"|\s*(?:\$ |# |#!|#include|@\w|//|/\*|>>> )|.*(?:[{}]|\):|[)\]\"'];|\w\([^)]*\))\s*\Z|.*[^=<>!]=[^=]"
)
LOOSE = re.compile(rf"(?P<tag></?(?!(?:{CODE_TAGS})\b)[A-Za-z])|(?P<emoji>{EMOJI})")
JSON_TRIES = 20  # each may read to the end of the text before it fails


def _protected(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each span that must not be translated, in order."""
    closers: dict[str, list[int]] = {}
    for match in CLOSERS.finditer(text):
        closers.setdefault(match[0], []).append(match.start())
    tries, position = JSON_TRIES, 0
    while match := SPAN.search(text, position):
        kind, start, end = match.lastgroup, match.start(), match.end()
        position = start + 1
        if kind == "run":
            position, end = end, _code_end(text, match, closers)
        elif kind == "latex":
            closer = match[0].replace("begin", "end", 1)
            found = _after(closers.get(closer, []), end)
            end = found + len(closer) if found else end
        elif (kind == "math" and _is_prose(match[0])) or (kind == "indented" and not _is_code(match[0])):
            continue
        elif kind in ("url", "domain"):
            end = start + len(match[0].rstrip(".,;:!?'*_~"))
        elif kind == "json":
            end = _json_end(text, start) if tries else None
            tries -= bool(tries) and end is None
        if end:
            yield start, end
            position = end


def _after(positions: list[int], position: int) -> int | None:
    index = bisect_right(positions, position - 1)
    return positions[index] if index < len(positions) else None


def _code_end(text: str, run: re.Match, closers: dict[str, list[int]]) -> int | None:
    """Inline code ends with as many backticks as it begins with; three at the end of a line go on below."""
    closer = _after(closers[run[0]], run.end())
    if closer is None:
        return None
    goes_on = len(run[0]) >= 3 and INFO_STRING.match(text, run.end())
    return closer + len(run[0]) if goes_on or "\n" not in text[run.end() : closer] else None


def _json_end(text: str, start: int) -> int | None:
    try:
        return json.JSONDecoder().raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def _is_json(text: str) -> bool:
    stripped = text.strip()
    return stripped[:1] in ("{", "[") and _json_end(stripped, 0) == len(stripped)


VALUE = re.compile(r'"((?:[^"\\]++|\\.)*+)"(\s*+:)?')  # group 2: it is a key
WORD = re.compile(r"\W*+[^\W\d_]++(?:['’-][^\W\d_]++)*+\W*+")
CHARACTER = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u....|\\?.")  # as a JSON string may write it


def _values(text: str, max_chars: int) -> list[str | Piece]:
    """JSON -> its parts: of each value that is a string of words, what `split` makes of it.

    One word alone is taken for an identifier, as are those with "_" or digits.
    """
    parts, begin = [], 0
    for string in VALUE.finditer(text):
        value = json.loads(f'"{string[1]}"')
        words = value.split()
        if string[2] or len(words) < 2 or not any(map(WORD.fullmatch, words)):
            continue
        parts.append(text[begin : string.start(1)])
        written = iter(CHARACTER.findall(string[1]))
        for part in split(value, max_chars=max_chars):
            texts = MARK.split(part.source) if isinstance(part, Piece) else [part]
            texts[1::2] = [part.spans[int(number) - 1] for number in texts[1::2]]
            texts = ["".join(itertools.islice(written, len(each))) for each in texts]
            whole = "".join(texts)
            parts.append(Piece(part.source, tuple(texts[1::2]), whole) if isinstance(part, Piece) else whole)
        begin = string.end(1)
    return [*parts, text[begin:]]


def _is_prose(math: str) -> bool:
    """Whether what two dollar signs enclose is a sentence about money."""
    return PROSE.search(math) is not None and not re.search(r"[\\^_={}]", math)


def _is_code(block: str) -> bool:
    """Whether indented lines are clearly code: at least half of them look like it."""
    lines = [line for line in block.split("\n") if line.strip()]
    return 2 * sum(CODE.match(line[:400]) is not None for line in lines) >= len(lines)


def _looseness(text: str, start: int = 0) -> str | None:
    """Which kind of span may stand outside of a piece: "tag", "emoji"; None for what the sentence needs."""
    match = LOOSE.match(text, start)
    return match and match.lastgroup


def _merged(found: Iterator[tuple[int, int]], text: str) -> Iterator[tuple[int, int]]:
    """Neighbours of one line with only blanks between them become one span: fewer marks for the engine."""
    last, last_kind = None, None
    for start, end in found:
        kind = "block" if "\n" in text[start:end] else _looseness(text, start)
        if last and kind == last_kind and not text[last[1] : start].strip(" "):
            last = (last[0], end)
            continue
        if last:
            yield last
        last, last_kind = (start, end), kind
    if last:
        yield last


INVISIBLE = "\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"
MARKER = r"(?:[-*+•‣◦▪·–—]|\#{1,6}|\[[ xX]\]|\(?(?:\d{1,9}|[A-Za-z]|[ivxIVX]{1,5})[.)])(?=\s)"
REFERENCE = rf"\[[^\[\]\n]{{1,80}}+\]:(?=\s+(?:{MARK.pattern}|[/#.]))"  # [id]: https://...
PREFIX = re.compile(rf"[\s{INVISIBLE}]*+(?:(?:>|{MARKER}|{REFERENCE})\s*+)*+")
SPEAKER = re.compile(r"(?:Human|Assistant):\s*")  # of HH-RLHF, after a blank line
CONTROL = "\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
GAP = re.compile(rf"([{CONTROL}]+| {{3,}})")
CELL = re.compile(rf"([{CONTROL}]+| {{3,}}|(?<!\\)\|)")
TABLE_RULE = re.compile(r"[ \t>]*+\|?[ \t]*+:?-++:?[ \t]*+(?:\|[ \t]*+:?-++:?[ \t]*+)*+\|?[ \t\r]*+")
LEFT_EDGE = re.compile(rf"[\s{INVISIBLE}]*+")
RIGHT_EDGE = re.compile(rf"{MARK.pattern}\Z")
EMPHASIS = re.compile(r"(\*{1,3}|_{1,3})(?!\s)[^*_]+(?<!\s)\1")
LETTER = re.compile(r"[^\W\d_]")


def _lines(text: str, spans: list[str], max_chars: int) -> Iterator[str | Piece]:
    """Parts of masked text: line by line, in tables cell by cell."""
    lines = text.split("\n")
    rules = [("|" in line and TABLE_RULE.fullmatch(line) is not None) for line in lines] + [False]
    in_table, after_blank = False, True
    for number, line in enumerate(lines):
        if number:
            yield "\n"
        begin = PREFIX.match(line).end() if LETTER.search(line) else len(line)
        if after_blank and (speaker := SPEAKER.match(line, begin)):
            begin = speaker.end()
        after_blank = not line.strip()
        bordered = "|" in line and line.lstrip(" \t>").startswith("|")
        in_table = "|" in line and (in_table or bordered or rules[number] or rules[number + 1])
        yield _restore(line[:begin], spans)
        if begin == len(line):
            continue
        for index, cell in enumerate((CELL if in_table else GAP).split(line[begin:])):
            if index % 2:
                yield cell
            else:
                yield from _segment(cell, spans, max_chars)


def _segment(source: str, spans: Sequence[str], max_chars: int) -> Iterator[str | Piece]:
    """A run of masked text without structure -> what stands at its edges, and its pieces."""
    if not LETTER.search(source):
        yield _restore(source, spans)
        return
    begin, end = _edges(source, spans)
    yield _restore(source[:begin], spans)
    for index, chunk in enumerate(_cut(source[begin:end], max_chars)):
        yield _restore(chunk, spans) if index % 2 else _piece(chunk, spans)
    yield _restore(source[end:], spans)


def _piece(chunk: str, spans: Sequence[str]) -> str | Piece:
    """Marks numbered from 1; a str if there is nothing to translate."""
    own: list[str] = []

    def renumber(match: re.Match) -> str:
        own.append(spans[int(match[1]) - 1])
        return mark(len(own))

    if not LETTER.search(chunk):  # a mark has none
        return _restore(chunk, spans)
    source = MARK.sub(renumber, chunk) if spans else chunk
    return Piece(source, tuple(own))


def _edges(source: str, spans: Sequence[str]) -> tuple[int, int]:
    """Where text with a letter begins and ends: not with blanks, emoji, or tags that leave no tag inside."""
    begin, end = LEFT_EDGE.match(source).end(), len(source.rstrip())
    first, last = MARK.match(source, begin), RIGHT_EDGE.search(source, max(begin, end - 13), end)
    kinds = [_looseness(spans[int(number) - 1]) for number in MARK.findall(source)] if spans else []
    edges = {match.span() for match in (first, last) if match}
    outside = {"emoji", "tag"} if kinds.count("tag") <= len(edges) else {"emoji"}
    if first and kinds[0] in outside:
        begin = LEFT_EDGE.match(source, first.end()).end()
    if last and kinds[-1] in outside:
        end = len(source[: last.start()].rstrip())
    if emphasis := EMPHASIS.fullmatch(source, begin, end):
        begin, end = begin + len(emphasis[1]), end - len(emphasis[1])
    return begin, end


SPACE, CLAUSE, SENTENCE = range(3)
BOUNDARY = re.compile(r"[ \u3000]+|(?<=[。！？])")
CLOSING = "\"'”’»)]*_"
OPENING = "\"'“‘„«([*_"
SHORT_FORM = re.compile(r"\w|\d{1,2}|(?:\w{1,3}\.)+\w{1,3}")  # J. Doe, 3. Mai, z.B.
ABBREVIATIONS = frozenset(
    """abb abs al approx apr art aug bd bspw bzw ca capt cf ch co col corp dec dept dr ed eds eq est etc
    evtl exkl feb fig figs fr ft geb gen gest ggf gov hon hr inc inkl jan jr jul jun kap lt ltd mar max min
    mio mr mrd mrs ms mt no nos nov nr nrs oct pp pres prof rep resp rev sec sen sep sept sgt sog sr st std
    str tel usw vgl vol vs zzgl""".split()
)


def _boundaries(text: str) -> Iterator[tuple[int, int, int]]:
    """(start, end, rank) of the blanks between words; rank: SENTENCE, CLAUSE or SPACE."""
    for match in BOUNDARY.finditer(text):
        start, end = match.span()
        word = text[max(0, start - 40) : start].rpartition(" ")[2].rstrip(CLOSING)
        if _ends_sentence(word, text[end : end + 1]):
            yield start, end, SENTENCE
        else:
            yield start, end, CLAUSE if word.endswith((",", ";", ":", "–", "—")) else SPACE


def _ends_sentence(word: str, following: str) -> bool:
    if not word.endswith((*".!?…؟。！？",)) or following.islower():
        return False
    stem = word[:-1].lstrip(OPENING)
    return not (word.endswith(".") and (stem.lower() in ABBREVIATIONS or SHORT_FORM.fullmatch(stem)))


def _cut(source: str, max_chars: int) -> list[str]:
    """[chunk, blanks, chunk, ..., chunk]: as long as fits, ended by the best boundary that there is."""
    if len(source) <= max_chars:
        return [source]
    boundaries, result, begin, index = list(_boundaries(source)), [], 0, 0
    while len(source) - begin > max_chars and index < len(boundaries):
        best = index
        for other in range(index, len(boundaries)):
            if boundaries[other][0] - begin > max_chars:
                break
            if boundaries[other][2] >= boundaries[best][2]:
                best = other
        start, end, _ = boundaries[best]
        result += source[begin:start], source[start:end]
        begin, index = end, best + 1
    return [*result, source[begin:]]
