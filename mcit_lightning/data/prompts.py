"""From a conversation to text: one template for training and evaluation."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from mcit_lightning.config import PromptConfig
from mcit_lightning.data.records import Turns

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_PROBE = "PROBEDANSWER"


@dataclass(frozen=True)
class Piece:
    """What the user's side writes, up to and including the words that open the answer, and the answer to it.

    Args:
        prompt: in the first piece it holds one image token of the processor per image.
        answer: None where the model is to answer.
    """

    prompt: str
    answer: str | None


class PromptTemplate(ABC):
    """Splits a conversation into pieces that are tokenized one by one.

    Args:
        processor: the backbone's processor.
    """

    lead: str = ""
    """White space between a prompt and its answer."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.image_token: str = processor.image_token
        self.end: str = processor.tokenizer.eos_token
        """The token that ends an answer."""

    def pieces(self, turns: Turns, num_images: int) -> list[Piece]:
        """The conversation in pieces; the last has no answer if `turns` ends with the user. Answers are stripped."""
        users = [text for role, text in turns if role == "user"]
        answers: list[str | None] = [text.strip() for role, text in turns if role == "assistant"]
        assert len(users) - len(answers) in (0, 1)
        return self._pieces(users, [*answers, None], num_images)

    @abstractmethod
    def _pieces(self, users: list[str], answers: list[str | None], num_images: int) -> list[Piece]: ...


class PlainTemplate(PromptTemplate):
    """Images, question, new line, answer."""

    def _pieces(self, users: list[str], answers: list[str | None], num_images: int) -> list[Piece]:
        images = f"{self.image_token}\n" * num_images
        prompts = [f"{text}\n" for text in users]
        prompts[0] = images + prompts[0]
        return [Piece(prompt, answer) for prompt, answer in zip(prompts, answers, strict=False)]


class VicunaTemplate(PromptTemplate):
    """Vicuna v1 as LLaVA-1.5 uses it; `</s>` is the tokenizer's end-of-sequence token."""

    lead = " "

    def _pieces(self, users: list[str], answers: list[str | None], num_images: int) -> list[Piece]:
        images = f"{self.image_token}\n" * num_images
        prompts = [f"USER: {text} ASSISTANT:" for text in users]
        prompts[0] = f"{VICUNA_SYSTEM} USER: {images}{users[0]} ASSISTANT:"
        return [Piece(prompt, answer) for prompt, answer in zip(prompts, answers, strict=False)]


class ChatTemplate(PromptTemplate):
    """The processor's own chat template.

    How it opens an answer, and which special token it writes after one, is found by rendering a short conversation
    once. Some templates (LLaVA-OneVision's) put other white space before an answer that was given than before one that is
    asked for; the latter counts, since that is what the model sees in evaluation.

    Raises:
        ValueError: the processor has no chat template, or one in which an answer does not follow its generation prompt.
    """

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                "prompt.template is 'chat', but the backbone's processor has no chat template. "
                "Set prompt.template to vicuna or plain."
            )
        prompt = self._render(["?"], [], 0)
        whole = self._render(["?"], [_PROBE], 0)
        opening, found, tail = whole.partition(_PROBE)
        self.lead = opening.removeprefix(prompt) if opening.startswith(prompt) else ""
        if not found or opening.split() != prompt.split():
            raise ValueError(
                "prompt.template is 'chat', but the processor's chat template does not write an answer right after its "
                f"generation prompt (prompt {prompt!r}, with an answer {whole!r}). Set prompt.template to vicuna or plain."
            )
        special = {str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
        ends = [token for token in special if tail.lstrip().startswith(token)]
        self._closing = ""
        if ends:
            self.end = max(ends, key=len)
            self._closing = tail[: tail.index(self.end)] + self.end

    def _pieces(self, users: list[str], answers: list[str | None], num_images: int) -> list[Piece]:
        pieces: list[Piece] = []
        before = ""
        for number in range(1, len(users) + 1):
            history = [answer for answer in answers[: number - 1] if answer is not None]
            rendered = self._render(users[:number], history, num_images)
            added = _after(before, rendered)
            if added is None:
                raise ValueError(
                    "The processor's chat template rewrites earlier turns of a conversation, so several turns cannot be "
                    f"learnt from one text (expected {before!r} at the start of {rendered!r}). Set prompt.template to "
                    "vicuna or plain, or give one question per row."
                )
            answer = answers[number - 1]
            pieces.append(Piece(added, answer))
            before = rendered + self.lead + (answer or "") + self._closing
        return pieces

    def _render(self, users: list[str], answers: list[str], num_images: int) -> str:
        messages: list[dict[str, Any]] = []
        for number, text in enumerate(users):
            images = [{"type": "image"}] * (num_images if number == 0 else 0)
            messages.append({"role": "user", "content": [*images, {"type": "text", "text": text}]})
            if number < len(answers):
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[number]}]})
        asks = len(answers) < len(users)
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)


def _after(start: str, text: str) -> str | None:
    """What follows `start` in `text`, white space inside `start` left out of account; None if `text` begins otherwise."""
    if text.startswith(start):
        return text[len(start) :]
    position = 0
    for character in "".join(start.split()):
        while text[position : position + 1].isspace():
            position += 1
        if text[position : position + 1] != character:
            return None
        position += 1
    return text[position:]


def build_template(config: PromptConfig, processor: Any) -> PromptTemplate:
    """The template that `prompt.template` names."""
    templates: dict[str, type[PromptTemplate]] = {
        "chat": ChatTemplate,
        "vicuna": VicunaTemplate,
        "plain": PlainTemplate,
    }
    return templates[config.template](processor)
