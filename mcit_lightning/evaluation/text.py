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
