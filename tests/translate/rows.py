r"""100 chat rows and 100 preference rows, each with what an engine must make of it that changes every letter.

The texts are written with what must stay between ⟦ and ⟧.  `rows()` gives (row, expected): in `expected` each
letter outside of these brackets is a "ж", everything else as in `row`.
"""

import re

BLOCKS = [
    # code in fences
    "Here is a function that adds two numbers:\n\n⟦```python\ndef add(a: int, b: int) -> int:\n"
    "    return a + b  # the sum\n```⟧\n\nCall it with two integers.",
    "Install the package first:\n⟦```bash\npip install requests\nexport TOKEN=abc\n```⟧\n"
    "Then restart the shell.",
    "⟦~~~\nplain text in tildes\n```\nstill inside\n~~~⟧\nThat was a block in tildes.",
    "1. Open the file.\n2. Paste this:\n   ⟦```json\n   {\"name\": \"Ada\", \"tags\": [\"x\", \"y\"]}\n"
    "   ```⟧\n3. Save it.",
    "> The manual says:\n⟦> ```sql\n> SELECT name FROM users;\n> ```⟧\n> Nothing else is needed.",
    "A longer fence may hold a shorter one:\n⟦````markdown\n```js\nlet x = 1;\n```\n````⟧\n"
    "The outer one counts.",
    "Sure, try this: ⟦```python\nprint('hello world')\n```⟧\nIt prints a greeting.",
    "- ⟦```\nfence behind a bullet\n```⟧\n- a second bullet",
    "The tag has a language with a plus:\n⟦```c++\nstd::cout << \"hi\" << std::endl;\n```⟧\nDone.",
    "Text before.\n⟦```\n\n\nblank lines inside\n\n```⟧\n\n\nText after three breaks.",
    # inline code
    "Run ⟦`ls -l`⟧ in the folder, then ⟦`cd ..`⟧ to go back.",
    "Double ticks hold a single one: ⟦``a ` b``⟧ is one span.",
    "⟦`main()`⟧ returns an integer, while ⟦`print()`⟧ returns nothing.",
    "A lone ` tick is text, and so is this one: it's fine",
    "Use ⟦```npm start```⟧ on one line as well.",
    "The flags ⟦`-v` `-q`⟧ exclude each other.",
    # code without a fence
    "The loop looks like this:\n\n⟦    for i in range(10):\n        print(i)\n        total += i\n⟧\n"
    "It runs ten times.",
    "In the shell:\n\n⟦\t$ make all\n\t$ ./run --fast\n⟧\nBoth are quick.",
    "A quoted letter:\n\n    Dear friend of the house\n    we write to you in peace\n\n"
    "That was prose, though indented.",
    "- An item with code of its own:\n\n⟦        result = call(1)\n        return result⟧\n\n"
    "  and a second paragraph of it\n- next item",
    "A letter, indented:\n\n    for many years we lived in peace\n    if you come home, call me\n"
    "    let me tell you more;\n    from time to time I return\n",
    "Java, indented:\n\n⟦    public static void main(String[] args) {\n        int x = 1;\n    }⟧\n\n"
    "That is all.",
    "SQL, indented:\n\n⟦    SELECT name FROM users\n    WHERE age > 3\n    ORDER BY name⟧\n\nThat is all.",
    "⟦    import os\n    return x⟧\n\nThe code came first.",
    # addresses
    "Read ⟦https://example.org/a/b?c=d&e=f#top⟧ before you start.",
    "See (⟦https://en.wikipedia.org/wiki/Mercury_(planet)⟧) for the planet.",
    "Is it at ⟦http://localhost:8080/api/v1/items⟧? Or at ⟦www.example.com/shop⟧!",
    "Write to ⟦jane.doe+news@mail.example.co.uk⟧, or to ⟦bob@example.com⟧.",
    "The project lives at ⟦github.com/user/repo⟧ and its docs at ⟦docs.example.io⟧.",
    "A [link to the guide]⟦(https://example.com/guide \"The Guide\")⟧ helps, and so does "
    "[this]⟦(../other/page.md#part)⟧.",
    "![a photo of a cat]⟦(images/cat.png)⟧ shows the cat.",
    "As [the first study]⟦[study1]⟧ says, sleep helps.\n\n⟦[study1]: https://example.org/study⟧",
    "Visit <⟦https://example.com/auto⟧> or ask ⟦@jane_doe⟧ for help.",
    "Sleep matters⟦[^1]⟧ for all of us.",
    "请访问⟦https://example.com/zh⟧。谢谢，再见。",
    # LaTeX
    "The area is ⟦$A = \\pi r^2$⟧ for a circle of radius ⟦$r$⟧.",
    "In display form:\n\n⟦$$\n\\int_0^1 x^2 \\, dx = \\frac{1}{3}\n$$⟧\n\nas we wanted to show.",
    "Inline ⟦\\(a^2 + b^2 = c^2\\)⟧ and display ⟦\\[ E = mc^2 \\]⟧ forms both work.",
    "Look at the system:\n⟦\\begin{align}\nx + y &= 2 \\\\\nx - y &= 0\n\\end{align}⟧\n"
    "Its solution is simple.",
    "We take the ⟦$n$⟧th root of ⟦$x_{i,j}$⟧ and multiply by ⟦\\alpha⟧.",
    "It costs $5 today and $10 tomorrow, so wait not.",
    "I have $20 and you have 30$.",
    "⟦\\[\n\\sum_{k=1}^{n} k = \\frac{n(n+1)}{2}\n\\]⟧\nThis is the sum of the first numbers.",
    # tables
    "| Name | Age | City |\n|:-----|----:|:----:|\n| Alice | 30 | Paris |\n| Bob | 25 | Rome |",
    "Fruit | Colour\n--- | ---\nApple | red\nBanana | yellow\n\nBoth are sweet.",
    "| Command | Meaning |\n|---|---|\n| ⟦`a|b`⟧ | one or the other |\n| ⟦`ls`⟧ | list |",
    "  | Step | Link |\n  |------|------|\n  | first | ⟦https://a.example/x⟧ |\n  | | empty cell |",
    "| | Monday | Tuesday |\n|---|:---:|---|\n| Morning | gym 🏋️ | rest |\n| Evening | cook \\| eat | read |",
    # lists, headings, quotes
    "# Title\n\n## Second level\n\nSome text.\n\n### Third: with a colon",
    "- one\n  - two\n    - three\n      * four\n- five",
    "1. first\n2. second\n   ⟦a⟧. third\n   ⟦b⟧. fourth\n10) tenth",
    "* [ ] open task\n* ⟦[x]⟧ closed task\n+ a plus",
    "⟦A⟧) Paris\n⟦B⟧) London\n⟦C⟧) Rome\n⟦D⟧) Madrid",
    "⟦i⟧. the first point\n⟦ii⟧. the second point\n⟦iii⟧. the third point",
    "(⟦a⟧) with brackets\n(⟦b⟧) and more\n(1) and a number",
    "> A quote\n> over two lines\n>> and nested\n\nThe end.",
    "• a round bullet\n◦ a hollow one\n– a dash\n— a long dash",
    "Title\n=====\n\nSubtitle\n--------\n\n***\n\nA rule stands above.",
    "**Bold heading**\n\n*Italic line*\n\n**Note:** only the start is bold, _this_ is not.",
    "1. **Wash** the rice.\n2. **Cook** it for 12 minutes.\n\n\n3. **Eat**.",
    # emoji
    "Well done! 🎉🎉",
    "✅ Finished the first part\n❌ Failed the second\n⚠️ Be careful",
    "I ❤️ pizza 🍕 and my family 👨‍👩‍👧‍👦 very much 👍🏽!",
    "Flags: 🇩🇪 Germany, 🇫🇷 France. Keys: 1️⃣ one, #️⃣ hash.",
    "😀",
    # blanks
    "Two blanks at the end  \nforce a break.   \n\n\n   Three blanks lead here.",
    "Name\tAge\tCity\nAlice\t30\tParis\n\tindented by a tab",
    "\n\n  \n\t\nText after blank lines\n \n\n",
    "Column one      column two   column three\nleft            right        middle",
    "A no-break space\u00a0here, a line separator\u2028there, a next line\u0085and a form feed\x0cat the end",
    "   \n\t\n",
    # right to left and other scripts
    "The word שלום means peace, and مرحبا means hello.",
    "שלום עולם. זה טקסט בעברית.\n\n- פריט ראשון\n- פריט שני",
    "\u200fمرحبا بالعالم!\u200f\n1. العنصر الأول ⟦`code`⟧\n2. العنصر الثاني ⟦https://example.com/ar⟧",
    "日本語のテキストです。二番目の文です。",
    "Mixed: Ωμέγα, Ёлка, naïve café, Straße, e\u0301t\u00e9.",
    # HTML
    "⟦<p>⟧This is a ⟦<b>⟧bold⟦</b>⟧ claim.⟦</p>⟧",
    "⟦<h1>⟧A heading⟦</h1>⟧\n⟦<br/>⟧\n⟦<img src=\"cat.png\" alt=\"a cat\">⟧\n⟦<li>⟧an item⟦</li>⟧",
    "⟦<pre>\nkeep   this\n  as it is\n</pre>⟧\nand translate this.",
    "Press ⟦<kbd>Ctrl</kbd>⟧ and ⟦<code>x = y</code>⟧ is set. ⟦<!-- a comment -->⟧ Fish ⟦&amp;⟧ chips "
    "⟦&#8364;⟧ 5.",
    "If a < b and c > d, then a is small.",
    "⟦<script>\nalert('hi');\n</script>⟧\n⟦<style>p { color: red; }</style>⟧\nNothing else runs.",
    # placeholders
    "Dear ⟦{name}⟧, your order ⟦{order_id}⟧ has ⟦%d⟧ items worth ⟦%.2f⟧ euros.",
    "Hello ⟦{{ user.name }}⟧, click ⟦${URL}⟧ or set ⟦$HOME⟧ and ⟦%PATH%⟧.",
    "⟦#PRS_ORG#⟧ will call ⟦%(who)s⟧ about ⟦%1$s⟧ at 100% sure odds.",
    "The template has ⟦{0}⟧ and ⟦{}⟧ and ⟦{% if x %}⟧ in it.",
    "A smile ⟦:smile:⟧ and a token ⟦<|im_end|>⟧ in the text; at 10:30:00 we meet.",
    "A line break is ⟦\\n⟧ and a tab ⟦\\t⟧ in C. My folder is C:⟦\\Users\\jane⟧ here.",
    # JSON
    "⟦{\"a\": 1, \"b\": [true, null, \"text\"]}⟧",
    "⟦[true, false, null]⟧",
    "The reply was ⟦{\"error\": \"not found\", \"details\": {\"id\": 7, \"why\": {\"x\": [1]}}}⟧ again.",
    "It returns:\n⟦{\n  \"status\": \"ok\",\n  \"items\": [\n    {\"id\": 1}\n  ]\n}⟧\nand closes.",
    "Choose from ⟦[\"red\", \"green\", \"blue\"]⟧ or (nothing) or [your own colour].",
    "In Python it prints ⟦{'name': 'Ada', 'age': 36}⟧ in one line.",
    # marks of our own
    "A text with ⟦[[1]]⟧ and ⟦[[2]]⟧ and ⟦`code`⟧ and ⟦[[1]]⟧ again.",
    "Brackets [[ ]], [[x]], [1], [[ 1 ]] are text.",
    # plain prose, long and short
    "Yes.",
    "What is the capital of France?",
    "The quick brown fox jumps over the lazy dog. " * 40 + "It never ends.",
    "Dr. Smith met Mrs. Jones at 5 p.m. on Jan. 3, e.g. for tea. " * 15 + "⟦`end`⟧ is the last word.",
    "An extremely long word: " + "a" * 700 + " and one more: " + "b" * 30,
    "\"Quoted,\" she said. 'Really?' he asked. “Yes!” — and left…",
    "Numbers: 1,234.56 and 3/4 and 50% and 2024-01-31 and +49 30 1234567.",
    "Ratio 3:1; version 2.0.1, chapter 1.2 begins.\n1.2.3 is no list.",
    "Poem:\nRoses are red,\nviolets are blue,\n\nsugar is sweet.",
    "CONSTANT text, snake case and CamelCase words stay words.",
]  # fmt: skip
SYSTEMS = ["You are a helpful assistant.", "Answer briefly. Use ⟦`code`⟧ where it helps.", "Be kind 🙂"]
KEPT = re.compile(r"⟦([^⟧]*)⟧")


def source(text: str) -> str:
    return text.replace("⟦", "").replace("⟧", "")


def target(text: str) -> str:
    """What must come back: each letter outside of the brackets is a ж."""
    parts = KEPT.split(text)
    return "".join(part if i % 2 else letters_changed(part) for i, part in enumerate(parts))


def letters_changed(text: str) -> str:
    return "".join("ж" if c.isalpha() else c for c in text)


def text_of(number: int, count: int) -> str:
    """`count` blocks from number on, apart by blank lines; every third text has CRLF throughout."""
    blocks = [BLOCKS[(number + 37 * i) % len(BLOCKS)] for i in range(count)]
    whole = [block for block in blocks if count == 1 or not block.startswith(("⟦{", "⟦[t"))]
    text = ("\n\n" if number % 2 else "\n\n\n").join(whole)
    return text.replace("\n", "\r\n") if number % 3 == 2 else text


def turn(role: str, text: str, names: tuple[str, str] = ("role", "content")) -> dict:
    return {names[0]: role, names[1]: text}


def chat(number: int, form) -> dict:
    question, answer = form(text_of(number, 1)), form(text_of(number + 1, 2 + number % 3))
    again, last = form(text_of(number + 7, 1)), form(text_of(number + 11, 4))
    turns = [turn("user", question), turn("assistant", answer), turn("user", again), turn("assistant", last)]
    kind = number % 10
    if kind == 0:
        return {"prompt": question, "prompt_id": "ab12", "messages": turns}
    if kind == 1:
        return {"messages": [turn("system", form(SYSTEMS[number % 3])), *turns], "source": "a name"}
    if kind == 2:
        names = ("from", "value")
        said = [turn(who, text, names) for who, text in (("human", question), ("gpt", answer))]
        call = turn("function_call", '{"name": "f"}', names), turn("observation", "a result", names)
        return {"id": f"en-{number}", "system": form(SYSTEMS[0]), "conversations": [*said, *call]}
    if kind == 3:
        parts = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": "x"}}]
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
        tool = {"role": "tool", "content": "a result"}
        return {"messages": [{"role": "user", "content": parts}, call, tool, turn("assistant", answer)]}
    if kind == 4:
        names = ("role", "text")
        return {"conversation": [turn("prompter", question, names), turn("assistant", answer, names)]}
    if kind == 5:
        return {"instruction": question, "input": form(text_of(number + 3, 1)), "output": answer, "n": 1}
    if kind == 6:
        return {"instruction": question, "context": "", "response": answer, "category": "closed_qa"}
    if kind == 7:
        leaf = {"message_id": "m2", "text": answer, "role": "assistant", "lang": "en", "replies": []}
        root = {"message_id": "m1", "text": question, "role": "prompter", "lang": "en", "replies": [leaf]}
        return {"message_tree_id": "t1", "tree_state": "ready_for_export", "prompt": root}
    return {"prompt": question, "completion": answer} if kind == 8 else {"text": last, "license": "mit"}


def preference(number: int, form) -> dict:
    question, worse = form(text_of(number, 1)), form(text_of(number + 5, 1))
    better = form(text_of(number + 2, 1 + number % 4))
    asked = turn("user", question)
    pair = [asked, turn("assistant", better)], [asked, turn("assistant", worse)]
    kind = number % 8
    if kind == 0:
        scores = {"score_chosen": 9.0, "score_rejected": 4.0}
        return {"prompt": question, "chosen": pair[0], "rejected": pair[1], "messages": pair[0], **scores}
    if kind == 1:
        model = {"chosen_avg_rating": 5.0, "chosen_model": "gpt-4"}
        return {"source": "flan", "instruction": question, "chosen_response": better,
                "rejected_response": worse, **model}  # fmt: skip
    if kind == 2:
        return {"source": "x", "prompt": question, "chosen": pair[0], "chosen-rating": 5,
                "chosen-model": "gpt-4", "rejected": pair[1], "rejected-model": "bard"}  # fmt: skip
    if kind == 3:
        return {"prompt": [asked], "chosen": pair[0][1:], "rejected": pair[1][1:]}
    if kind == 4:
        return {"chosen": pair[0], "rejected": pair[1]}
    if kind == 5:
        return {"prompt": question, "chosen": f" {better}", "rejected": f" {worse}"}
    if kind == 6:
        # HH-RLHF: an answer's first word is on the line of its speaker
        lead = form("\n\n⟦Human⟧: What is this?\n\n⟦Assistant⟧: It is this.\n\n⟦Human⟧: And then?")
        return {name: lead + form("\n\n⟦Assistant⟧: So.\n\n") + text
                for name, text in (("chosen", better), ("rejected", worse))}  # fmt: skip
    notes = {"helpfulness": {"Rating": "5", "Rationale": "A note of a rater."}}
    answers = [
        {"model": model, "custom_system_prompt": form(SYSTEMS[number % 3]), "response": text,
         "annotations": notes, "critique": "Good.", "overall_score": 9.0}
        for model, text in (("gpt-4", better), ("bard", worse))
    ]  # fmt: skip
    return {"source": "evol", "instruction": question, "models": ["gpt-4", "bard"], "completions": answers}


def rows() -> list[tuple[dict, dict]]:
    kinds = [chat] * 100 + [preference] * 100
    return [(kind(i % 100, source), kind(i % 100, target)) for i, kind in enumerate(kinds)]
