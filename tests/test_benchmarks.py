"""The benchmark presets: published order, settings and files, other spellings of names, and composition with any backbone."""

import importlib.util
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

from mcit_lightning.aliases import find_task
from mcit_lightning.config import ExperimentConfig, TaskConfig
from mcit_lightning.data.collate import EvalCollator
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.evaluation.metrics import task_metric
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.stages import sequential_stages

BASE = experiments_dir() / "_base"
COIN = ["scienceqa", "textvqa", "imagenet", "gqa", "vizwiz", "grounding", "vqav2", "ocrvqa"]
UCIT = ["imagenet_r", "arxivqa", "vizwiz_caption", "iconqa", "clevr", "flickr30k"]
ORDERS = {
    "coin": COIN,
    "coin_diverse": COIN,
    "coin_10type": COIN,
    "coin_asd": COIN,
    "ucit": UCIT,
    "ucit_mcitlib": UCIT,
    "mllm_cl_domain": ["rs", "med", "ad", "sci", "fin"],
    "mllm_cl_ability": ["ocr", "math", "vp", "app"],
    "dmole9": ["vizwiz_caption", "skvg", "textcaps", "iconqa", "ocrvqa", "flickr30k", "vizwiz", "kvqa", "pmcvqa"],
    "trigap": ["pmcvqa", "docvqa", "chartqa", "iconqa", "infographicvqa", "arxivqa", "roadside", "chemvqa", "floodnetvqa",
               "clevr"],
}  # fmt: skip
"""The published order of each benchmark."""
BACKBONES = sorted(
    path.stem
    for path in BASE.glob("*.yaml")
    if re.search(r"^backbone:\n  id:", path.read_text(), re.M) and path.stem not in ("smoke", "quickstart")
)
STRATEGIES = {
    "sequential": "{name: sequential, rank: 8, targets: {vision: [attention], language: [attention]}}",
    "joint": "{name: joint, rank: 8}",
    "moelora": "{name: moelora, rank: 8, experts: 4}",
    "branchlora": "{name: branchlora, rank: 8, experts: 4, top_k: 2}",
    "dmole": "{name: dmole, rank: 8, targets: {vision: [attention], language: [attention]}}",
}
CAPTIONS = ("cider", "caption_mean")


def compose(
    folder: Path, *bases: str, strategy: str = "sequential", overrides: tuple[str, ...] = ()
) -> ExperimentConfig:
    files = [*bases, *([strategy] if (BASE / f"{strategy}.yaml").exists() else [])]
    path = folder / "experiment.yaml"
    names = ", ".join(str(BASE / f"{name}.yaml") for name in files)
    path.write_text(f"base: [{names}]\nname: x\nstrategy: {STRATEGIES[strategy]}\n")
    return load_config(path, overrides)


# Composition


def test_every_benchmark_is_tested() -> None:
    assert {path.stem for path in BASE.glob("*.yaml") if "\norder:" in path.read_text()} - {"quickstart", "smoke"} <= {
        *ORDERS
    }
    assert len(BACKBONES) >= 13


@pytest.mark.parametrize("name", ORDERS)
def test_tasks_come_in_the_published_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCIT_DATA", "/data")
    config = compose(tmp_path, "internvl3_2b", name)
    assert config.order == ORDERS[name] and set(config.tasks) == set(config.order)
    root = {"coin_diverse": "coin", "coin_10type": "coin", "ucit_mcitlib": "ucit"}.get(name, name)
    assert config.data.root == f"/data/{re.sub('_(domain|ability)$', '', root)}"
    assert config.data.annotations == {
        "coin": "Instructions_Original",
        "coin_diverse": "Instructions_Diverse",
        "coin_10type": "Instructions_10Type",
    }.get(name, config.data.annotations)
    assert config.callbacks and config.trainer["precision"] == "auto"


@pytest.mark.parametrize(
    ("backbone", "benchmark", "strategy"),
    [
        *((backbone, "coin", "sequential") for backbone in BACKBONES),
        *product(["vicuna7b", "qwen3_vl"], ["ucit", "dmole9"], STRATEGIES),
    ],
)
def test_any_backbone_benchmark_and_strategy(backbone: str, benchmark: str, strategy: str, tmp_path: Path) -> None:
    config = compose(tmp_path, backbone, benchmark, strategy=strategy)
    preset = OmegaConf.load(BASE / f"{backbone}.yaml")
    # a benchmark leaves to the backbone what is the backbone's
    assert (config.backbone.id, config.prompt.template) == (preset.backbone.id, preset.prompt.template)
    assert config.data.max_length == preset.data.max_length >= 2048
    assert config.prompt.pad_to_square is (benchmark != "dmole9")
    if "attention" in STRATEGIES[strategy]:
        assert config.strategy["targets"]["vision"] == config.backbone.targets["vision"]["attention"]


# Settings, as the repositories' scripts have them


def test_coins_recipe(tmp_path: Path) -> None:
    config = compose(tmp_path, "vicuna7b", "coin")
    assert [config.tasks[name].batch_size for name in COIN] == [14, 14, 16, 6, 14, 6, 8, 10]
    assert config.trainer["accumulate_grad_batches"] == 8
    assert {config.tasks[name].epochs for name in COIN} == {1}
    optim = config.optim
    assert (optim.lr, optim.projector_lr, optim.weight_decay, optim.warmup_ratio) == (2e-4, 2e-5, 0.0, 0.03)
    metrics = ["scienceqa", "vqa_soft", "class_name", "gqa", "exact_match", "coin_grounding", "exact_match", "ocrvqa"]
    assert [config.tasks[name].metric for name in COIN] == metrics


def test_recipes_of_mcitlib(tmp_path: Path) -> None:
    """Global batch 64 on 2 devices for UCIT; epochs and rates of MLLM-CL."""
    ucit = compose(tmp_path, "llava13b", "ucit")
    assert ucit.data.batch_size * ucit.trainer["accumulate_grad_batches"] * 2 == 64 and ucit.optim.lr == 2e-4
    domain = compose(tmp_path, "llava13b", "mllm_cl_domain")
    assert [domain.tasks[name].epochs for name in domain.order] == [1, 3, 1, 2, 1] and domain.optim.lr == 2e-5
    assert domain.data.batch_size * domain.trainer["accumulate_grad_batches"] * 8 == 64
    ability = compose(tmp_path, "llava13b", "mllm_cl_ability")
    assert [ability.tasks[name].epochs for name in ability.order] == [3, 1, 1, 3]
    assert [ability.tasks[name].lr or ability.optim.lr for name in ability.order] == [5e-5, 2e-4, 2e-4, 2e-4]


def test_dmoles_recipe(tmp_path: Path) -> None:
    config = compose(tmp_path, "internvl3_2b", "dmole9")
    tasks = [config.tasks[name] for name in config.order]
    assert [task.epochs for task in tasks] == [1, 5, 1, 5, 1, 1, 5, 1, 1]
    assert [task.batch_size or config.data.batch_size for task in tasks] == [10, 10, 10, 10, 8, 10, 10, 10, 10]
    lengths = [task.max_new_tokens or config.data.max_new_tokens for task in tasks]
    assert lengths == [30, 100, 30, 10, 100, 30, 10, 100, 10]
    assert [task.min_new_tokens for task in tasks] == [8, 0, 8, 0, 0, 8, 0, 0, 0]  # the captions
    asked = [task.prompt_suffix for task in tasks]
    word, letter = (
        " Answer the question using a single word or phrase.",
        "Answer with the option's letter from the given choices directly.",
    )
    insufficient = " When the provided information is insufficient, respond with 'Unanswerable'."
    assert asked == [None, None, None, letter, word, None, insufficient + word, word, letter]
    assert (config.optim.lr, config.optim.weight_decay, config.evaluate) == (1e-4, 0.01, "all")


# Names in other spellings


@pytest.mark.parametrize(
    ("benchmark", "order", "wanted"),
    [
        ("coin", "[VQAv2,SQA,TextVQA,OCR-VQA,VQA_v2]", "twice"),
        ("coin", "[VQA-v2,SQA,TextVQA,OCR-VQA,ImageNet,REC]", "vqav2 scienceqa textvqa ocrvqa imagenet grounding"),
        ("ucit", "[ImageNet-R,CLEVR-Math,VizWiz,Flickr30k-cap]", "imagenet_r clevr vizwiz_caption flickr30k"),
        ("dmole9", "[VizWiz-Caption,SK-VG,VizWiz,PMC-VQA]", "vizwiz_caption skvg vizwiz pmcvqa"),
        ("mllm_cl_ability", "[OCR,Math,VP,GUI]", "ocr math vp app"),
        ("trigap", "[PMC-VQA,InfoVQA,FloodNet]", "pmcvqa infographicvqa floodnetvqa"),
        ("coin", "[vqa3]", "no task 'vqa3'"),
    ],
)
def test_other_spellings_of_the_order(benchmark: str, order: str, wanted: str, tmp_path: Path) -> None:
    if wanted in ("twice", "no task 'vqa3'"):
        with pytest.raises(ValueError, match=wanted):
            compose(tmp_path, "vicuna7b", benchmark, overrides=(f"order={order}",))
        return
    config = compose(tmp_path, "vicuna7b", benchmark, overrides=(f"order={order}",))
    assert config.order == wanted.split()


def test_overrides_find_a_task_by_its_other_names(tmp_path: Path) -> None:
    config = compose(tmp_path, "vicuna7b", "ucit", overrides=("tasks.CLEVR-Math.epochs=3", "tasks.VizCap.lr=1e-5"))
    assert (config.tasks["clevr"].epochs, config.tasks["vizwiz_caption"].lr) == (3, 1e-5)
    assert set(config.tasks) == set(UCIT)


def test_a_spelling_of_two_tasks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tasks\.vqav2\.aliases: 'gqa' is also a spelling of task 'gqa'"):
        compose(tmp_path, "vicuna7b", "coin", overrides=("tasks.vqav2.aliases=[G-QA]",))


def test_the_tasks_own_name_comes_first() -> None:
    tasks = {"vizwiz_caption": TaskConfig(aliases=["vizwiz"]), "vizwiz": TaskConfig()}
    assert (find_task("vizwiz", tasks), find_task("VizWiz_Caption", tasks)) == ("vizwiz", "vizwiz_caption")
    assert find_task("viz", tasks) is None


# Files


def files_of(config: ExperimentConfig) -> set[str]:
    """Everything that the preset reads, relative to `data.root`; folders of images end with a slash."""
    found = set()
    for task in config.tasks.values():
        found |= {name for name in (task.train, task.test, task.references) if name}
        found |= {f"{name}/" for name in (task.images, task.test_images) if name}
    return found


@pytest.mark.parametrize("name", [name for name in ORDERS if name not in ("coin_diverse", "coin_10type")])
def test_the_document_lists_the_files_of_the_preset(name: str, tmp_path: Path) -> None:
    text = (experiments_dir().parent / "docs/benchmarks.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"```text {name}\n(.*?)```", text, re.S)
    listed = set()
    for line in block.split():
        start, brace, rest = line.partition("{")
        inside, _, end = rest.partition("}")
        listed |= {start + part + end for part in inside.split(",")} if brace else {line}
    assert listed == files_of(compose(tmp_path, "vicuna7b", name))


TEN = [{"answer": "red", "answer_confidence": "yes"}] * 10
CHOICES = {"answer": 1, "choices": ["cat", "dog"]}
REFERENCES: dict[str, Any] = {
    "problems.json": {"7": CHOICES, "8": CHOICES},
    "TextVQA_0.5.1_val.json": {"data": [{"question_id": n, "answers": ["red"] * 10} for n in (7, 8)]},
    "testdev_balanced_questions.json": {n: {"answer": "red", "isBalanced": True} for n in "78"},
    "vizwiz_val_annotations.json": {"annotations": [{"question_id": n, "answers": TEN} for n in (7, 8)]},
    "val_coco_type_3000.json": {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in (1, 2)],
        "annotations": [{"id": n, "image_id": n, "caption": "a red square"} for n in (1, 2)],
    },
}
TESTS: dict[str, Any] = {
    "skvg": {"sent": "the red one", "bbox": [2, 2, 20, 20], "width": 30, "height": 30, "knowledge": "It is red."},
    "iconqa": {"question": "Which?", **CHOICES},
    "pmcvqa": {"question": "Which?", **CHOICES},
    "ocrvqa": {"question_id": 7, "question": "Who?", "answer": "red"},
    "vizwiz": {"question_id": 7, "question": "Which colour?"},
    "kvqa": {"question_id": 7, "question": "Who?", "answer": "red"},
}
"""D-MoLE's test rows, in InternVL's forms."""


def write_benchmark(name: str, config: ExperimentConfig) -> None:
    """Two rows per file, in the published formats, and their pictures where the preset looks for them."""
    for task_name, task in config.tasks.items():
        root = Path(config.data.root)
        for folder in {task.images, task.images if task.test_images is None else task.test_images}:
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20), (200, 0, 0)).save(root / folder / "1.png")
            Image.new("RGB", (30, 20), (200, 0, 0)).save(root / folder / "2.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "red"}]
        save(root / str(task.train), [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in (1, 2)])
        if task.references:
            save(root / task.references, REFERENCES[Path(task.references).name])
        if name == "dmole9":
            rows: Any = [{"image": f"{n}.png", **TESTS[task_name]} for n in (1, 2)] if task_name in TESTS else None
            for number, row in enumerate(rows or []):
                row |= {"question_id": 7 + number}
            save(root / str(task.test), REFERENCES["val_coco_type_3000.json"] if rows is None else rows)
            continue
        answer = "B" if task.metric in ("scienceqa", "option_letter", "science") else "red"
        row = {"text": "Which colour?", "answer": answer}
        if task.metric == "coin_grounding":
            row = {"text": "Where?", "answer_bbox": "[0.1,0.2,0.5,0.6]", "size": [30, 20]}
        if task.metric == "ocrbench":
            row |= {"answer": ["red"], "answer_type": "Regular Text Recognition"}
        if task.metric == "cv_bench":
            row |= {"answer": "(A)", "type": "2D", "task": "Count"}
        save(root / str(task.test), [{"question_id": n, "image": f"{n - 6}.png", **row} for n in (7, 8)])


def save(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "coin_10type"])
def test_files_in_the_published_formats_are_read(name: str, smoke_processor: Any, tmp_path: Path) -> None:
    overrides = [f"data.root={tmp_path / 'data'}", "data.num_workers=0"]
    config = compose(tmp_path, "vicuna7b", name, overrides=tuple(overrides))
    if importlib.util.find_spec("pycocoevalcap") is None:
        for task in config.tasks.values():
            task.metric = "contains" if task.metric in CAPTIONS else task.metric
    write_benchmark(name, config)
    stream = ContinualDataModule(config, smoke_processor, sequential_stages(config.order))
    for number, task in enumerate(config.order):
        stream.stage = number
        assert stream.batch_size(stream.stage) == (config.tasks[task].batch_size or config.data.batch_size)
        assert len(stream.train_dataloader().dataset) == 2
        test = stream.split(task, "test")
        suffix = config.tasks[task].prompt_suffix or config.prompt.suffix
        batch = EvalCollator(smoke_processor, config.prompt, suffix=suffix)([test[0], test[1]])
        assert batch["inputs"]["pixel_values"].shape[0] == 2
        text = smoke_processor.tokenizer.decode(batch["inputs"]["input_ids"][0])
        assert text.endswith(f"{suffix} ASSISTANT:") or not suffix
        metric = task_metric(config.tasks[task])
        best = RIGHT.get(config.tasks[task].metric, "red")
        if test[0].reference == ["a red square"]:
            best = "a red square"
        assert metric.score(best, test[0].reference, test[0].extra) == 1.0, task
        assert metric.score("nothing of the kind", test[0].reference, test[0].extra) == 0.0, task


RIGHT = {
    "coin_grounding": "[0.1,0.2,0.5,0.6]",
    "iou": "[[67, 100, 667, 1000]]",
    "option_letter": "B",
    "scienceqa": "B",
    "science": "B",
    "cv_bench": "(A)",
}
"""By metric: an answer that is right for the rows of `write_benchmark`."""
