"""The question “which expert?”, which a language model answers with a letter. See `strategies.mrlora`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mcit_lightning.data.encode import Encoder
from mcit_lightning.data.records import LETTERS, Sample, Turns

TEMPLATE = """Several expert models are at hand. Choose the one that is best equipped to answer the question below about the \
picture. Compare what each of them is good at, and do not answer the question yourself.

Experts:
{experts}

The question: {question}

Name the expert by its letter alone ({letters}), and do not answer the question."""
"""In our words, with the parts of the released prompt in its order."""

PLACEHOLDERS = ("{experts}", "{question}", "{letters}")


@dataclass(frozen=True)
class ExpertQuestion:
    """Asks which of the learnt tasks' experts is to answer a sample.

    Args:
        experts: tasks in the order in which they were learnt, and what their experts are good at; the first one is A.
        template: text with `{experts}` and `{question}`, and `{letters}` where they are to be listed.
    """

    experts: tuple[tuple[str, str], ...]
    template: str = TEMPLATE

    @property
    def letters(self) -> str:
        """One for each expert."""
        return LETTERS[: len(self.experts)]

    def letter(self, task: str) -> str:
        """The right answer for a sample of a task."""
        return self.letters[[name for name, _ in self.experts].index(task)]

    def about(self, sample: Sample) -> Turns:
        """What the model is asked about a sample: which expert is for its last question, without anything said before."""
        question = next(text for role, text in reversed(sample.turns) if role == "user")
        lines = [f"{letter}: {text}" for letter, (_, text) in zip(self.letters, self.experts, strict=True)]
        text = self.template.replace("{experts}", "\n".join(lines)).replace("{letters}", ", ".join(self.letters))
        return (("user", text.replace("{question}", question.strip())),)

    def solved(self, sample: Sample) -> Sample:
        """The sample as one to learn the answer from."""
        return replace(sample, turns=(*self.about(sample), ("assistant", self.letter(sample.task))))

    def chosen(self, answer: str) -> int | None:
        """Number of the expert that an answer names, None if it names none.

        As in the released code: at most one character may be something else than a letter of an expert, and of several letters
        the first one of the alphabet counts.
        """
        answer = answer.strip()
        if sum(character not in self.letters for character in answer) > 1:
            return None
        return next((number for number, letter in enumerate(self.letters) if letter in answer), None)


class ExpertQuestionReader:
    """Adds the question to evaluation batches, for `EvalCollator.reader`; training batches get nothing.

    Args:
        encoder: makes tokens of it, as of any other prompt.
        question: what is asked.
    """

    def __init__(self, encoder: Encoder, question: ExpertQuestion) -> None:
        self.encoder = encoder
        self.question = question

    def __call__(self, samples: Sequence[Sample], turns: Sequence[Turns]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and the processor's other token-wise keys, [B, L], left-padded.

        The pictures are those of the batch's own `inputs`; the processor sees them again to make room for them in the text.
        """
        if any(spoken[-1][0] == "assistant" for spoken in turns):
            return {}
        rows, _ = self.encoder.encode(samples, [self.question.about(sample) for sample in samples])
        return self.encoder.pad(rows, "left")
