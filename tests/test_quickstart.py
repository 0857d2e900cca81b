"""The embedded models and tasks: the tiny one on every run, the real one where its packages are installed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mcit_lightning import quickstart, smoke
from mcit_lightning.quickstart import packages
from mcit_lightning.quickstart.cache import MANIFEST, build_once

SMOKE_TASKS = ("colours", "shapes", "counts")


def digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def rows(root: Path, task: str, split: str) -> list[dict[str, Any]]:
    return json.loads((root / task / f"{split}.json").read_text(encoding="utf-8"))


def check_tasks(root: Path, tasks: tuple[str, ...]) -> None:
    """Formats, balance, and that no test picture is a training picture."""
    summary = json.loads((root / "tasks.json").read_text(encoding="utf-8"))
    assert tuple(summary) == tasks
    for task in tasks:
        pictures: dict[str, set[bytes]] = {}
        for split in ("train", "val", "test"):
            content = rows(root, task, split)
            assert len(content) == summary[task]["samples"][split]
            pictures[split] = {(root / row["image"]).read_bytes() for row in content}
        for row in rows(root, task, "train") + rows(root, task, "val"):
            human, gpt = row["conversations"]
            assert (human["from"], gpt["from"]) == ("human", "gpt")
            assert human["value"].startswith("<image>\n") and human["value"].count("<image>") == 1
            assert gpt["value"] in summary[task]["labels"]
        answers = [row["answer"] for row in rows(root, task, "test")]
        assert all("<image>" not in row["text"] for row in rows(root, task, "test"))
        assert summary[task]["chance"] == pytest.approx(max(map(answers.count, answers)) / len(answers))
        assert not pictures["test"] & (pictures["train"] | pictures["val"])


def ask(folder: Path, question: str, picture: Path | None = None, tokens: int = 12) -> str:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    content: list[dict[str, str]] = [{"type": "image"}] if picture else []
    content.append({"type": "text", "text": question})
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [Image.open(picture)] if picture else None
    batch = processor(images=images, text=[prompt], return_tensors="pt")
    output = model.generate(**batch, do_sample=False, max_new_tokens=tokens)
    return processor.tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smoke")
    smoke.prepare(root)
    return root


def test_smoke_tasks_are_well_formed(tiny: Path) -> None:
    check_tasks(tiny, SMOKE_TASKS)


def test_smoke_model_has_one_token_per_image_feature(tiny: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny / "model")
    model = AutoModelForImageTextToText.from_pretrained(tiny / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    picture = Image.open(tiny / rows(tiny, "shapes", "train")[0]["image"])
    batch = processor(images=[picture], text=["<image>\nWhich?"], return_tensors="pt")
    num_tokens = (batch["input_ids"] == model.config.image_token_id).sum().item()
    features = model.get_image_features(batch["pixel_values"]).pooler_output[0]
    assert num_tokens == len(features) == 9
    assert torch.isfinite(model(**batch).logits).all()


def test_smoke_chat_template_ends_with_the_answer_turn(tiny: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny / "model")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.eos_token == "<|im_end|>" != processor.tokenizer.pad_token


def test_smoke_model_generates(tiny: Path) -> None:
    row = rows(tiny, "counts", "test")[0]
    assert isinstance(ask(tiny / "model", row["text"], tiny / row["image"], tokens=3), str)


def test_smoke_files_are_deterministic(tiny: Path, tmp_path: Path) -> None:
    smoke.prepare(tmp_path)
    assert digests(tmp_path) == digests(tiny)


@pytest.mark.parametrize("damage", ["change", "delete", "manifest"])
def test_damaged_files_are_written_anew(tiny: Path, tmp_path: Path, damage: str) -> None:
    smoke.prepare(tmp_path)
    victim = tmp_path / "shapes" / "images" / "train_00003.png"
    if damage == "change":
        victim.write_bytes(b"not a picture")
    elif damage == "delete":
        victim.unlink()
    else:
        (tmp_path / MANIFEST).write_text("{", encoding="utf-8")
    smoke.prepare(tmp_path)
    assert digests(tmp_path) == digests(tiny)


def test_another_option_rebuilds_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    smoke.prepare(tmp_path, seed=0)
    before = digests(tmp_path)
    smoke.prepare(tmp_path, seed=1)
    after = digests(tmp_path)
    assert before["notes.txt"] == after["notes.txt"]
    assert before["shapes/images/train_00000.png"] != after["shapes/images/train_00000.png"]


def test_a_ready_folder_is_not_touched(tmp_path: Path) -> None:
    built = [build_once(tmp_path, {"a": 1}, lambda folder: (folder / "x").mkdir()) for _ in range(2)]
    assert built == [True, False]


def test_a_failed_build_leaves_nothing_that_passes_for_complete(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("...", encoding="utf-8")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        build_once(tmp_path, {}, fail)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_two_processes_at_once_leave_one_complete_folder(tiny: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=smoke.prepare, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert digests(tmp_path) == digests(tiny)


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "PACKAGES", {"no-such-package": "no_such_module", "torch": "torch"})
    with pytest.raises(ModuleNotFoundError, match=r"no-such-package\. Run: pip install"):
        quickstart.prepare(tmp_path)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        packages.installed_versions()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("quickstart")
    quickstart.prepare(root, train=40, val=20, test=40)
    return root


@pytest.mark.slow
def test_quickstart_tasks_are_well_formed(real: Path) -> None:
    check_tasks(real, quickstart.TASKS)


@pytest.mark.slow
def test_quickstart_language_model_is_the_pretrained_one(real: Path) -> None:
    assert "Paris" in ask(real / "model", "What is the capital of France?")


@pytest.mark.slow
def test_quickstart_has_one_token_per_image_feature_and_loads_as_float32(real: Path) -> None:
    processor = AutoProcessor.from_pretrained(real / "model")
    model = AutoModelForImageTextToText.from_pretrained(real / "model")
    assert model.dtype == torch.float32
    picture = Image.open(real / rows(real, "flags", "test")[0]["image"])
    batch = processor(images=[picture], text=["<image>\nWhich?"], return_tensors="pt")
    num_tokens = (batch["input_ids"] == model.config.image_token_id).sum().item()
    assert num_tokens == len(model.get_image_features(batch["pixel_values"]).pooler_output[0])


@pytest.mark.slow
def test_quickstart_features_tell_the_pictures_apart(real: Path) -> None:
    """Nearest class mean in the tower's features: far above the chance of one in eight if the weights are right."""
    processor = AutoProcessor.from_pretrained(real / "model")
    model = AutoModelForImageTextToText.from_pretrained(real / "model")

    def features(split: str) -> torch.Tensor:
        pictures = [Image.open(real / row["image"]) for row in rows(real, "charts", split)]
        pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:].mean(1)
        return torch.nn.functional.normalize(hidden, dim=-1)

    train, test = features("train"), features("test")
    labels = [row["conversations"][1]["value"] for row in rows(real, "charts", "train")]
    names = sorted(set(labels))
    means = torch.stack([train[[label == name for label in labels]].mean(0) for name in names])
    guesses = [names[index] for index in (test @ means.T).argmax(1).tolist()]
    answers = [row["answer"] for row in rows(real, "charts", "test")]
    assert sum(guess == answer for guess, answer in zip(guesses, answers, strict=True)) / len(answers) > 0.5


@pytest.mark.slow
def test_quickstart_captions_for_alignment_show_nothing_tested() -> None:
    from mcit_lightning.quickstart.captions import QUESTIONS, captions
    from mcit_lightning.quickstart.emoji import FLAGS, emoji_by_kind

    texts = {caption.text.lower() for caption in captions(seed=0, icons_per_font=50, shapes=5)}
    assert len(texts) > 500
    assert not {f"the flag of {country.lower()}" for country in FLAGS} & texts
    tested = {emoji.name for splits in emoji_by_kind(seed=0).values() for emoji in splits["test"]}
    long_names = {name.replace("_", " ") for name in tested if "_" in name}  # short ones may be an icon's name too
    assert len(long_names) > 20
    assert not long_names & texts
    assert not any("one word" in question for question in QUESTIONS)
