"""Fields of rows: every known schema gives its texts and nothing else, also back; tasks that must not go."""

import copy
import json

import pytest
import rows

from phoenix.translate.fields import get, text_fields, untranslatable, with_texts

TURN = {"role": "user", "content": "T"}
SHAREGPT = [{"from": "human", "value": "T"}, {"from": "gpt", "value": "T"}]
RATED = {"model": "gpt-4", "principle": "x", "custom_system_prompt": "T", "response": "T", "critique": "x",
         "annotations": {"honesty": {"Rating": "5", "Rationale": "x"}}, "overall_score": 9.0}  # fmt: skip
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "x", "arguments": "x"}}]}
LEAF = {"message_id": "x", "text": "T", "role": "assistant", "lang": "x", "replies": []}
# "T" is a text, "x" is not
SCHEMAS = {
    "ultrachat": {"prompt": "T", "prompt_id": "x", "messages": [TURN, {"content": "T", "role": "assistant"}]},
    "ultrafeedback": {"source": "x", "instruction": "T", "models": ["x"], "correct_answers": ["x"],
                      "completions": [RATED, RATED]},
    "h4": {"prompt": "T", "prompt_id": "x", "chosen": [TURN], "rejected": [TURN, TURN], "messages": [TURN],
           "score_chosen": 1.0},
    "argilla": {"source": "x", "instruction": "T", "chosen_response": "T", "rejected_response": "T",
                "chosen_avg_rating": 5.0, "chosen_model": "x"},
    "argilla cleaned": {"source": "x", "prompt": "T", "chosen": [TURN], "chosen-rating": 5,
                        "chosen-model": "x", "rejected": [TURN], "rejected-model": "x"},
    "platypus": {"input": "T", "output": "T", "instruction": "T", "data_source": "x"},
    "schnabeltier": {"instruction_de": "T", "output_de": "T"},
    "schnabeltier with originals": {"instruction": "T", "output": "T", "instruction_de": "x",
                                    "output_de": "x"},
    "dolly": {"instruction": "T", "context": "T", "response": "T", "category": "x"},
    "dolly de": {"instruction_de": "T", "context_de": "T", "response_de": "T", "category": "x"},
    "sharegpt": {"id": "x", "conversations": SHAREGPT},
    "sharegpt with tools": {"system": "T", "conversations": [
        *SHAREGPT, {"from": "function_call", "value": "x"}, {"from": "observation", "value": "x"}]},
    "oasst de": {"conversation": [{"role": "prompter", "text": "T"}, {"role": "assistant", "text": "T"}]},
    "openai": {"messages": [{"role": "system", "content": "T"}, TURN, CALL, {"role": "tool", "content": "x"}],
               "tools": [{"function": {"description": "x"}}]},
    "openai parts": {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "T"}, {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "tool_result", "content": "x"}]}]},
    "trl explicit": {"prompt": [TURN], "chosen": [TURN], "rejected": [TURN]},
    "trl strings": {"prompt": "T", "chosen": "T", "rejected": "T"},
    "hh": {"chosen": "T", "rejected": "T"},
    "kto": {"prompt": [TURN], "completion": [TURN], "label": True},
    "prompt and completion": {"prompt": "T", "completion": "T"},
    "poem": {"prompt": "T", "poem": "T"},
    "song": {"prompt": "T", "song": "T", "analysis_prompt": "T", "analysis": "T"},
    "oasst1": {"message_id": "x", "parent_id": None, "user_id": "x", "text": "T", "role": "prompter",
               "lang": "x", "emojis": {"name": ["x"], "count": [1]},
               "labels": {"name": ["x"], "value": [0.5]}},
    "oasst1 tree": {"message_tree_id": "x", "tree_state": "x", "prompt": {
        "message_id": "x", "text": "T", "role": "prompter", "replies": [{**LEAF, "replies": [LEAF]}, LEAF]}},
    "text": {"text": "T", "license": "x", "source": "x"},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_texts_of_every_schema_are_found_and_replaced(name):
    row = SCHEMAS[name]
    before = copy.deepcopy(row)
    paths = text_fields(row)
    assert [get(row, path) for path in paths] == ["T"] * json.dumps(row).count('"T"')
    assert len(set(paths)) == len(paths)
    new = with_texts(row, {path: f"{i}" for i, path in enumerate(paths)})
    assert row == before
    assert [get(new, path) for path in paths] == [f"{i}" for i in range(len(paths))]
    assert json.dumps(with_texts(new, dict.fromkeys(paths, "T"))) == json.dumps(row)  # order of keys too


def test_paths_stand_in_the_order_of_the_row():
    assert text_fields(SCHEMAS["ultrachat"]) == [
        ("prompt",), ("messages", 0, "content"), ("messages", 1, "content"),
    ]  # fmt: skip
    assert text_fields(SCHEMAS["openai parts"]) == [("messages", 0, "content", 0, "text")]
    assert text_fields(SCHEMAS["oasst1 tree"]) == [
        ("prompt", "text"), ("prompt", "replies", 0, "text"), ("prompt", "replies", 0, "replies", 0, "text"),
        ("prompt", "replies", 1, "text"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"b": "text", "a": 1},
        {"prompt": None, "messages": []},
        {"messages": "", "text": 3} | {"messages": [CALL]},
        {"messages": [["nested"], "bare", 7, None]},
        {"completions": {"response": 4}},
    ],
)
def test_a_row_without_text_is_refused_with_what_it_has(row):
    with pytest.raises(ValueError, match="^no text field; found (none|" + ", ".join(sorted(row)) + ")$"):
        text_fields(row)


def test_a_blank_text_and_an_odd_role_count():
    turns = [{"role": ["odd"], "content": " "}, {"role": {"a": 1}, "content": ""}, {"content": "T"}]
    row = {"messages": turns}
    assert len(text_fields(row)) == 3
    assert untranslatable(row) is None


def test_a_thread_may_be_deep():
    thread = {"text": "T", "role": "prompter", "replies": []}
    for _ in range(500):
        thread = {"text": "T", "role": "assistant", "replies": [thread]}
    paths = text_fields({"prompt": thread})
    assert len(paths) == 501
    new = with_texts({"prompt": thread}, {paths[-1]: "new", paths[0]: "top"})
    assert (get(new, paths[-1]), get(new, paths[0])) == ("new", "top")
    assert get({"prompt": thread}, paths[-1]) == "T"


DESTROYED = {
    "translation": [
        "Translate the following sentence into Spanish: I like tea.",
        "Translate to French: cat",
        "Translate to French: enter the code.",
        "Given the text below, please translate it from English to German.\n\nThe cat sat.",
        "What is the Italian word for bread?",
        "How do you say good morning in Japanese?",
        "Write a letter to my landlord in Spanish.",
        "Generate a translation of this text in Hindi.",
        "Which language is this sentence written in?",
    ],
    "grammar": [
        "Correct the grammar: he go to school yesterday.",
        "Fix any spelling or punctuation errors in the text below.",
        "Please proofread my essay.",
        "Identify the verb in the following sentence: Dogs bark.",
        "Rewrite the sentence in the passive voice.",
        "Change this sentence to past tense.",
        "What part of speech is the word 'quickly'? Name all parts of speech.",
        "Is this sentence grammatically correct?",
    ],
    "rhyme": [
        "Write a limerick about a cat.",
        "Compose a poem that rhymes about spring.",
        "Create a haiku on autumn.",
        "What words rhyme with orange?",
    ],
    "letter_count": [
        "How many letters are in the word strawberry?",
        "Count the number of vowels in the following sentence: I am here.",
        "Give me five animals that start with the letter B.",
        "Write a sentence in which all words start with 's'.",
        "Write a story without using the letter e.",
        "Sort these words in alphabetical order: pear, apple.",
        "Spell the word banana backwards.",
        "Describe the sea in exactly ten words.",
    ],
    "wordplay": [
        "Tell me a pun about bread.",
        "Make an anagram of listen.",
        "Is racecar a palindrome?",
        "Tell me a knock-knock joke.",
        "Unscramble these: tac, god.",
    ],
    "vocabulary": [
        "Give me three synonyms for happy.",
        "What is the etymology of algebra?",
        "Use the word serendipity correctly in a sentence.",
    ],
}
FINE = [
    "What is the capital of France?",
    "Explain how tides work to a child.",
    "Write a poem about rain.",
    "Translate this Python code to Java.",
    "How does RNA translation work in a cell?",
    "Write a function that counts the number of vowels in a string.",
    "Write a Python program that checks whether a string is a palindrome.",
    "How do I reimburse my employees?",
    "What was the French Revolution?",
    "Name some Spanish dishes that I can cook.",
    "How many people live in Berlin?",
    "Start with a short introduction and end with a summary.",
    "Write a letter to my landlord about the heating.",
    "Describe a character who changes.",
    "Summarise the article in three sentences.",
    "Which tense situation did the hero face?",
    "Correct me if I am wrong, but is the Earth round?",
    "What is the plural marriage debate about?",
    "Reverse engineer this device.",
    "Give me a recipe for pumpkin soup.",
]


@pytest.mark.parametrize(("task", "question"), [(task, q) for task in DESTROYED for q in DESTROYED[task]])
def test_tasks_that_translation_destroys_are_known(task, question):
    answer = {"role": "assistant", "content": "Here."}
    asked = {"role": "user", "content": question}
    for row in (
        {"prompt": question, "completion": "Here."},
        {"instruction": question, "input": "", "output": "Here."},
        {"messages": [{"role": "user", "content": "Hi!"}, answer, asked, answer]},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "Here."}]},
        {"prompt": [asked], "chosen": [answer], "rejected": [answer]},
        {"chosen": f"\n\nHuman: {question}\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"},
        {"prompt": {"role": "prompter", "text": question, "replies": [LEAF]}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": question}]}, answer]},
        {"instruction": f"{question}\n\n" + "Material. " * 9999, "completions": [RATED]},
        {"instruction": "Material. " * 9999 + f"\n\n{question}", "completions": [RATED]},
    ):
        assert untranslatable(row) == task


@pytest.mark.parametrize("question", FINE)
def test_other_tasks_pass(question):
    assert untranslatable({"prompt": question, "completion": "Translate to French: cat"}) is None
    said = {"role": "assistant", "content": "Fix the grammar of this sentence: I is."}
    assert untranslatable({"messages": [{"role": "user", "content": question}, said]}) is None


def test_few_of_the_200_rows_are_taken_for_such_tasks():
    assert [untranslatable(row) for row, _ in rows.rows()].count(None) >= 190
