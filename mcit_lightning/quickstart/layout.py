"""The files of a task: LLaVA-style rows for training, question rows for testing, pictures as PNG."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

SPLITS = ("train", "val", "test")

# ChatML as SmolLM2 writes it, without its default system prompt: that costs 20 tokens a sample and a task never
# differs by it. The generation block lets `return_assistant_tokens_mask` find the answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llava_processor(images: Any, tokenizer: PreTrainedTokenizerFast, patch_size: int) -> LlavaProcessor:
    """The processor of a LLaVA whose tower puts a class token before its patches, with this module's chat template.

    Args:
        images: the image processor.
        tokenizer: knows the `<image>` token.
        patch_size: of the tower, in pixels.
    """
    from transformers import LlavaProcessor

    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" then drops
        chat_template=CHAT_TEMPLATE,
    )


@dataclass(frozen=True)
class Sample:
    """One picture with its question and answer."""

    picture: Image.Image
    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """The samples of a task by split, and where its pictures come from."""

    name: str
    splits: Mapping[str, Sequence[Sample]]
    source: str
    """Package and version the pictures are made from."""
    licence: str
    unseen: str
    """How test pictures differ from training pictures."""
    labels: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        answers = {sample.answer for split in self.splits.values() for sample in split}
        object.__setattr__(self, "labels", tuple(sorted(answers)))

    def describe(self) -> dict[str, Any]:
        """What `tasks.json` records, with the accuracy of always giving the most frequent test answer."""
        answers = [sample.answer for sample in self.splits["test"]]
        return {
            "labels": list(self.labels),
            "questions": sorted({sample.question for split in self.splits.values() for sample in split}),
            "samples": {split: len(samples) for split, samples in self.splits.items()},
            "chance": max(answers.count(label) for label in self.labels) / len(answers),
            "source": self.source,
            "licence": self.licence,
            "unseen": self.unseen,
        }


def write_tasks(root: Path, tasks: Iterable[Task]) -> None:
    """Write every task below `root` and the summary of all to `root/tasks.json`."""
    summary = {}
    for task in tasks:
        for split in SPLITS:
            _write_split(root, task, split)
        summary[task.name] = task.describe()
    _write_json(root / "tasks.json", summary)


def _write_split(root: Path, task: Task, split: str) -> None:
    (root / task.name / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index, sample in enumerate(task.splits[split]):
        key = f"{split}_{index:05d}"
        image = f"{task.name}/images/{key}.png"
        sample.picture.convert("RGB").save(root / image)
        if split == "test":
            rows.append({"question_id": key, "image": image, "text": sample.question, "answer": sample.answer})
        else:
            turns = [
                {"from": "human", "value": f"<image>\n{sample.question}"},
                {"from": "gpt", "value": sample.answer},
            ]
            rows.append({"id": key, "image": image, "conversations": turns})
    _write_json(root / task.name / f"{split}.json", rows)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
