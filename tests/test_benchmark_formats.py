"""Files of `fixtures/benchmarks`, in the forms in which the benchmarks publish theirs, as samples."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mcit_lightning.config import DataConfig, TaskConfig
from mcit_lightning.data.records import CAPTION_PROMPT
from mcit_lightning.data.splits import TaskSplit, open_split
from mcit_lightning.evaluation.metrics import task_metric

FIXTURES = Path(__file__).parent / "fixtures" / "benchmarks"
COIN, UCIT, DMOLE = "coin/Instructions_Original", "ucit/instructions", "dmole/data"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the fixtures with the pictures that their rows name."""
    root = tmp_path_factory.mktemp("formats") / "benchmarks"
    shutil.copytree(FIXTURES, root)
    picture = root / "picture.png"
    Image.new("RGB", (4, 4), (250, 0, 0)).save(picture)
    for name in (
        *("ScienceQA/images/train/1/image.png", "ScienceQA/images/test/4/image.png", "TextVQA/train_images/003a.jpg"),
        *("ImageNet/val/1.JPEG", "GQA/images/n1.jpg", "OCR-VQA/images/1.jpg"),
        "COCO2014/train2014/COCO_train2014_000000000009.jpg",
    ):
        put(picture, root / "coin/cl_dataset" / name)
    for name in ("ImageNet-R/train/n01443537/art_11.jpg", "ImageNet-R/test/n01443537/art_0.jpg"):
        put(picture, root / "ucit/datasets" / name)
    for name in ("10", "11"):
        put(picture, root / f"ucit/datasets/Flickr30k/val/{name}.jpg")
    for task, names in {
        "RS": ("0.png", "1.png"),
        "Med": ("1.jpg",),
        "Sci": ("AI2D_1.png", "mapqa_2.png"),
        "Fin": ("1.png",),
        "OCR_test": ("1.jpg", "2.jpg"),
        "VP_test": ("1.png",),
    }.items():
        for name in names:
            put(picture, root / "mllm_cl" / task / "images" / name)
    for name in (
        *("vizwiz/train/0.jpg", "vizwiz/train/1.jpg", "vizwiz/val/0.jpg", "iconqa/test/1/image.png"),
        *("iconqa/test/2/image.png", "sk-vg/images/1.jpg", "ocrvqa/images/1.jpg", "textcaps/images/a1.jpg"),
        *("vizwiz-caption/images/val/VizWiz_val_0.jpg", "vizwiz-caption/images/val/VizWiz_val_1.jpg"),
    ):
        put(picture, root / DMOLE / name)
    put(picture, root / "trigap/datasets/DocVQA/1.png")
    for name in ("a.png", "b.png"):
        put(picture, root / "several" / name)
    return root


def put(picture: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(picture, path)


def open_task(root: Path, benchmark: str, split: Any = "test", **task: Any) -> TaskSplit:
    return open_split(DataConfig(root=str(root / benchmark)), "task", TaskConfig(**task), split, 0)


WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("benchmark", "task", "turns", "images"),
    [
        (
            "coin",
            {"train": "Instructions_Original/ScienceQA/train.json", "images": "cl_dataset"},
            [f"Which animal?\nA. cat\nB. dog\n{LETTER}", "B"],
            ["coin/cl_dataset/ScienceQA/images/train/1/image.png"],
        ),
        (
            "ucit",
            {"train": "instructions/ImageNet-R/train.json", "images": "datasets"},
            [f"Question: What is the object in the image?\n{WORD}", "Goldfish"],
            ["ucit/datasets/ImageNet-R/train/n01443537/art_11.jpg"],
        ),
        (
            "mllm_cl",  # relative to the task's folder
            {"train": "RS/train.json", "images": "RS"},
            [f"Is there a road?\n{WORD}", "yes"],
            ["mllm_cl/RS/images/0.png"],
        ),
        (
            "dmole",  # InternVL: no <image> in the text
            {"train": "data/vizwiz/train.jsonl"},
            [f"What is this? {WORD}", "soda"],
            ["dmole/data/vizwiz/train/0.jpg"],
        ),
        ("several", {"train": "train.json"}, ["Same?", "no", "Why?", "colour"], ["several/a.png", "several/b.png"]),
        (
            "dmole",  # COCO captions to train on: one row per caption
            {"train": "data/vizwiz-caption/val.json", "images": "data/vizwiz-caption/images/val"},
            [CAPTION_PROMPT, "A computer screen shows a repair prompt."],
            ["dmole/data/vizwiz-caption/images/val/VizWiz_val_0.jpg"],
        ),
    ],
)
def test_training_rows(root: Path, benchmark: str, task: dict[str, Any], turns: list[str], images: list[str]) -> None:
    sample = open_task(root, benchmark, "train", **task)[0]
    assert [text for _, text in sample.turns] == turns
    assert [role for role, _ in sample.turns] == ["user", "assistant"] * (len(turns) // 2)
    assert list(sample.images) == [str(root / name) for name in images]
    assert sample.reference is None


def test_text_only_rows(root: Path) -> None:
    split = open_task(root, "coin", "train", train="Instructions_Original/ScienceQA/train.json", images="cl_dataset")
    assert (split[1].images, split.text_only) == ((), True)
    test = open_task(root, "coin", test="Instructions_Original/ScienceQA/test.json", images="cl_dataset")
    assert [len(sample.images) for sample in test] == [1, 0]
    assert "<image>" not in test[0].turns[0][1]


# benchmark, task, id, question, reference, further keys, an answer that is right in both modes
TESTS: list[tuple[str, dict[str, Any], str, str, Any, dict[str, Any], str]] = [
    (
        "coin",
        {
            "test": "Instructions_Original/ScienceQA/test.json",
            "images": "cl_dataset",
            "references": "cl_dataset/ScienceQA/problems.json",
            "metric": "scienceqa",
        },
        "4",
        f"What is north?\nA. up\nB. down\n{LETTER}",
        0,
        {"choices": ["up", "down"]},
        "A",
    ),
    (
        "coin",
        {
            "test": "Instructions_Original/TextVQA/val.json",
            "images": "cl_dataset",
            "references": "cl_dataset/TextVQA/TextVQA_0.5.1_val.json",
            "metric": "vqa_soft",
        },
        "34602",
        f"What brand is this?\n{WORD}",
        ["nous les gosses", *["dakota"] * 5, *["dakota digital"] * 2, "clos culombu", "dakota"],
        {},
        "Dakota",
    ),
    (
        "coin",
        {"test": "Instructions_Original/ImageNet/test.json", "images": "cl_dataset", "metric": "class_name"},
        "0",
        "What is in the image?",
        "tench, Tinca tinca",
        {},
        "tench, Tinca tinca",
    ),
    (
        "coin",
        {
            "test": "Instructions_Original/GQA/test.json",
            "images": "cl_dataset",
            "references": "cl_dataset/GQA/testdev_balanced_questions.json",
            "metric": "gqa",
        },
        "201307251",
        f"Is it overcast?\n{WORD}",
        "no",
        {"isBalanced": True},
        "No.",
    ),
    (
        "coin",
        {"test": "Instructions_Original/Grounding/test.json", "images": "cl_dataset", "metric": "coin_grounding"},
        "2",
        "Please provide the bounding box coordinate of the region this sentence describes: a bowl.",
        "[0.1,0.2,0.5,0.95]",
        {"size": [640, 480]},
        "[0.1,0.2,0.5,0.95]",
    ),
    (
        "coin",
        {"test": "Instructions_Original/OCRVQA/test.json", "images": "cl_dataset", "metric": "ocrvqa"},
        "0_1",
        f"Who wrote this book?\n{WORD}",
        "Jane Doe",
        {},
        "jane doe",
    ),
    (
        "ucit",
        {"test": "instructions/ImageNet-R/test_3000.json", "images": "datasets"},
        "0",
        f"Question: What is the object in the image?\n{WORD}",
        "Goldfish",
        {},
        "goldfish",
    ),
    (
        "mllm_cl",
        {"test": "RS/test.json", "images": "RS", "metric": "contains_loosely"},
        "rs_1",
        f"Is there a road?\n{WORD}",
        "yes",
        {},
        "Yes, there is",
    ),
    (
        "mllm_cl",
        {"test": "Sci/test.json", "images": "Sci", "metric": "science"},
        "s1",
        "What is A?",
        "leaf",
        {"image": "images/AI2D_1.png"},
        "Leaf",
    ),
    (
        "mllm_cl",
        {"test": "Med/test.json", "images": "Med", "metric": "contains"},
        "0",
        "Is it benign?",
        "no",
        {},
        "No",
    ),
    (
        "mllm_cl",
        {"test": "Fin/test.json", "images": "Fin", "metric": "finvis"},
        "f1",
        "Does it rise?",
        "Yes",
        {},
        "yes",
    ),
    (
        "mllm_cl",  # images of the test rows lie elsewhere
        {"test": "OCR_test/test.json", "images": "OCR", "test_images": "OCR_test", "metric": "ocrbench"},
        "o1",
        "what is written in the image?",
        ["CENTRE"],
        {"answer_type": "Regular Text Recognition"},
        "it says centre",
    ),
    (
        "mllm_cl",
        {"test": "VP_test/test.json", "images": "VP_test", "metric": "cv_bench"},
        "v1",
        "How many dogs are there?\n(A) 1 (B) 2",
        "(B)",
        {"type": "2D", "task": "Count"},
        "(B) 2",
    ),
    (
        "dmole",
        {
            "test": "data/vizwiz/vizwiz_val.jsonl",
            "references": "data/vizwiz/vizwiz_val_annotations.json",
            "metric": "vqa_soft",
        },
        "3",
        "Can you tell me what this is?",
        [*["pepper"] * 3, *["black pepper"] * 6, "unanswerable"],
        {},
        "black pepper",
    ),
    (
        "dmole",
        {"test": "data/iconqa/multi_text_choice_test.jsonl", "metric": "option_letter"},
        "8",
        "How many are there?\nA. 3\nB. 9\nC. 5",
        1,
        {"choices": ["3", "9", "5"]},
        "B",
    ),
    (
        "dmole",
        {"test": "data/sk-vg/test.jsonl", "metric": "iou"},
        "0",
        "Based on the knowledge Tom lost to Ann.\nPlease provide the bounding box coordinate of the region this sentence "
        "describes: <ref>the man who lost</ref>",
        [64, 96, 320, 432],
        {"width": 640, "height": 480, "knowledge": "Tom lost to Ann"},
        "<box>[[100, 200, 500, 900]]</box>",
    ),
    (
        "dmole",
        {"test": "data/ocrvqa/ocrvqa_val.jsonl", "metric": "exact_any"},
        "12",
        "What is the title?",
        ["Dune", "dune"],
        {},
        " dune",
    ),
    (
        "trigap",
        {"test": "instructions/DocVQA/val_converted.json", "images": "datasets", "metric": "anls"},
        "d1",
        f"What is the date?\n{WORD}",
        ["January 5", "Jan 5"],
        {},
        "jan 5",
    ),
]


@pytest.mark.parametrize(
    ("benchmark", "task", "identity", "question", "reference", "extra", "right"),
    TESTS,
    ids=lambda value: str(value)[:24],
)
def test_test_rows(
    root: Path,
    benchmark: str,
    task: dict[str, Any],
    identity: str,
    question: str,
    reference: Any,
    extra: Any,
    right: str,
) -> None:
    for mode in ("fixed", "published"):
        sample = open_task(root, benchmark, **task, metric_mode=mode)[0]
        assert (sample.id, sample.turns, sample.reference) == (identity, (("user", question),), reference)
        assert extra.items() <= sample.extra.items()
        assert len(sample.images) == 1 and Path(str(sample.images[0])).is_file()
        score = task_metric(TaskConfig(**task, metric_mode=mode)).score(right, sample.reference, sample.extra)
        assert score == 1.0 or (task["metric"] == "vqa_soft" and score > 0.9)
    assert {"text"} <= sample.extra.keys()


def test_grounding_without_knowledge_and_choice_without_id(root: Path) -> None:
    skvg = open_task(root, "dmole", test="data/sk-vg/test.jsonl", metric="iou")
    assert skvg[1].turns[0][1].startswith("Please provide the bounding box")
    iconqa = open_task(root, "dmole", test="data/iconqa/multi_text_choice_test.jsonl", metric="option_letter")
    assert (iconqa[1].id, iconqa[1].turns[0][1]) == ("1", "What shape?\nA. circle\nB. square")


def test_coco_captions_have_a_row_per_image(root: Path) -> None:
    split = open_task(root, "dmole", test="data/vizwiz-caption/val.json", images="data/vizwiz-caption/images/val")
    assert [sample.id for sample in split] == ["23431", "23432"]
    assert split[0].reference == ["A computer screen shows a repair prompt.", "Screen with an error message."]
    assert split[0].turns == (("user", CAPTION_PROMPT),)
    textcaps = open_task(root, "dmole", test="data/textcaps/val.json", images="data/textcaps/images")
    assert (textcaps[0].id, textcaps[0].reference) == ("a1", ["A sign says stop."])


def test_ucit_captions_take_their_references_by_row(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = {
        "test": "instructions/Flickr30k/test_3000.json",
        "images": "datasets",
        "references": "instructions/Flickr30k/val_coco_type_3000.json",
    }
    with caplog.at_level(logging.WARNING):
        split = open_task(root, "ucit", **task)
    assert [sample.id for sample in split] == ["q10", "q11"]
    assert split[1].reference == ["Two dogs play in the snow.", "Dogs run through snow."]
    assert "test_3000.json: the name says 3000 rows, the file has 2" in caplog.text
    rows = json.loads((root / "ucit" / task["test"]).read_text())
    (root / "ucit/instructions/Flickr30k/short.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(ValueError, match=r"tasks\.task\.references: .* has 2 images, but .*short\.json has 1 rows"):
        open_task(root, "ucit", **{**task, "test": "instructions/Flickr30k/short.json"})
