"""Bringing answers to a comparable form."""

import re

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = {"a", "an", "the"}


def clean(text: str) -> str:
    """Lower case without outer blanks and a trailing full stop."""
    return text.strip().casefold().removesuffix(".").rstrip()


def vqa_clean(text: str) -> str:
    """The form in which the VQA evaluation compares answers.

    Lower case; no articles; digits for number words up to ten; no punctuation except a point or comma between digits,
    which is part of a number. Apostrophes are dropped, so that "don't" and "dont" are the same word.
    """
    text = text.casefold().replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s.]|_", " ", text)
    words = (_NUMBER_WORDS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def edit_distance(one: str, two: str) -> int:
    """Levenshtein distance: the fewest characters to insert, delete or replace to turn one text into the other."""
    row = list(range(len(two) + 1))
    for i, char in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(two, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (char != other))
    return row[-1]


def contains_words(text: str, part: str) -> bool:
    """Whether a text has another one in it as whole words; an empty one is in none."""
    return bool(part) and re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


_CONTRACTED = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't shan't "
    "shouldn't wasn't weren't won't wouldn't he'd how'd it'd somebody'd someone'd something'd there'd they'd where'd who'd you'd "
    "could've might've must've not've should've they've we've what've where've who've would've you've how'll it'll "
    "somebody'll someone'll something'll they'll what'll who'll why'll you'll there're they're what're why're you're "
    "ma'am o'clock 'twas y'all"
)
_CONTRACTED_TWICE = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've "
    "there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"
)
_WHOLE = {word.replace("'", ""): word for word in _CONTRACTED.split()} | {
    "'".join([*parts[:cut], parts[cut] + parts[cut + 1], *parts[cut + 2 :]]): "'".join(parts)
    for parts in (word.split("'") for word in _CONTRACTED_TWICE.split())
    for cut in range(len(parts) - 1)
}
"""What misses one apostrophe, with it."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOPS = 32
"""The published code hands `re.sub` a flag in the place of the number of replacements; this is the flag's value."""


def m4c_clean(text: str) -> str:
    """The form in which the evaluator of M4C, and with it CoIN's and InternVL's scripts, compares answers.

    It is meant to be the VQA evaluation's (`vqa_clean`). Where it differs: a possessive "'s" becomes a word, so "dog's" and
    "dogs" differ; a mark is dropped where the text has it next to a blank anywhere, and becomes a blank otherwise, so
    "half-full" is two words but "half-full - or" is "halffull or"; a full stop before a digit stays, so ".5" does; only the
    first 32 full stops are dropped; apostrophes stay, and only the contractions of a list are the same without one.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = given = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in given or f" {mark}" in given else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=_FULL_STOPS)
    words = (_NUMBER_WORDS.get(word, word) for word in text.split())
    return " ".join(_WHOLE.get(word, word) for word in words if word not in _ARTICLES)
