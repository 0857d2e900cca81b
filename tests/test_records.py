import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mcit_lightning.config import DataConfig, TaskConfig
from mcit_lightning.data.images import load_image
from mcit_lightning.data.records import Place, Sample, parse_row
from mcit_lightning.data.splits import TaskSplit, open_split

PLACE = Place("vqa.json", "tasks.vqa.train", 2)
ASK = {"from": "human", "value": "<image>\nWhat?"}
TELL = {"from": "gpt", "value": "A cat."}
GOOD = json.dumps({"conversations": [{"from": "human", "value": "?"}, TELL]})
TEST_ROW = {"question_id": "q1", "text": "What?", "answer": "cat"}


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "image": "1.png", "conversations": [ASK, TELL], **changes}


def write(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 10, 10)).save(path)
    return path


def open_one(root: Path, name: str, split: Any = "train", data: dict[str, Any] | None = None, **task: Any) -> TaskSplit:
    config = TaskConfig(**{split: name, **task})
    return open_split(DataConfig(root=str(root), **(data or {})), "vqa", config, split, seed=0)


# Rows


def test_training_row() -> None:
    sample = parse_row(row(source="web"), PLACE, task="vqa", split="train")
    assert sample == Sample(
        "a",
        "vqa",
        ("1.png",),
        (("user", "What?"), ("assistant", "A cat.")),
        extra={"source": "web"},
        source="vqa.json",
        row=2,
    )


def test_row_without_id_is_named_by_its_number() -> None:
    sample = parse_row({"conversations": [{"from": "user", "value": "Hi"}, TELL]}, PLACE, task="vqa", split="train")
    assert (sample.id, sample.images) == ("2", ())


@pytest.mark.parametrize("image", ["", None, []])
def test_no_image(image: Any) -> None:
    turns = [{"from": "human", "value": "Hi"}, TELL]
    assert parse_row(row(image=image, conversations=turns), PLACE, task="t", split="train").images == ()


def test_image_without_token_and_several_images() -> None:
    turns = [{"from": "human", "value": "Compare."}, TELL]
    assert parse_row(row(conversations=turns), PLACE, task="t", split="train").images == ("1.png",)
    turns = [{"from": "human", "value": "<image><image>\nCompare."}, TELL]
    sample = parse_row(row(image=["1.png", "2.png"], conversations=turns), PLACE, task="t", split="train")
    assert sample.images == ("1.png", "2.png")
    assert sample.turns[0] == ("user", "Compare.")


def test_test_rows() -> None:
    sample = parse_row({**TEST_ROW, "answer": ["cat", "a cat"], "size": [1, 2]}, PLACE, task="t", split="test")
    assert (sample.id, sample.turns, sample.reference) == ("q1", (("user", "What?"),), ["cat", "a cat"])
    assert sample.extra == {"size": [1, 2], "text": "What?", "question_id": "q1"}
    sample = parse_row({**TEST_ROW, "question_id": 7}, PLACE, task="t", split="test")
    assert (sample.id, sample.extra["question_id"]) == ("7", 7)
    sample = parse_row(row(), PLACE, task="t", split="test")
    assert (sample.turns, sample.reference) == ((("user", "What?"),), "A cat.")


@pytest.mark.parametrize(
    ("bad", "split", "said"),
    [
        ([1], "train", ["the row", "[1]"]),
        ({"id": "a", "conversation": []}, "train", ["`conversations`", "Did you mean 'conversation'?"]),
        (row(conversations=[]), "train", ["`conversations`", "[]"]),
        (row(conversations=["hi"]), "train", ["conversations[0]", "'hi'"]),
        (row(conversations=[{**ASK, "from": "humann"}, TELL]), "train", ["[0].from", "'humann'", "'human'", "gpt"]),
        (row(conversations=[ASK, {**TELL, "value": 3}]), "train", ["[1].value", "3"]),
        (row(conversations=[TELL, ASK]), "train", ["[0].from", "'gpt'", "user should speak"]),
        (row(conversations=[ASK, TELL, TELL]), "train", ["[2].from", "'gpt'", "alternate"]),
        (row(conversations=[ASK]), "train", ["[0].from", "no answer"]),
        (row(image=None), "train", ["`image`", "0 image(s)", "1 `<image>`"]),
        (row(image=["1.png", "2.png"]), "train", ["2 image(s)", "1 `<image>`"]),
        (row(conversations=[{**ASK, "value": "Hi"}, TELL, ASK, TELL]), "train", ["[2].value", "first user turn"]),
        (row(image=3), "train", ["`image`", "3"]),
        ({**TEST_ROW, "answer": None}, "test", ["`answer`", "null"]),
        ({"question_id": 1, "texts": "What?", "answer": "x"}, "test", ["`text`", "missing", "'texts'"]),
        ({"text": "What?", "answer": "x"}, "test", ["`question_id`", "missing"]),
        ({**TEST_ROW, "text": 5}, "test", ["`text`", "5"]),
    ],
)
def test_bad_rows_name_place_key_and_value(bad: Any, split: Any, said: list[str]) -> None:
    with pytest.raises(ValueError, match=r"vqa\.json, row 3 ") as error:
        parse_row(bad, PLACE, task="t", split=split)
    for part in ["tasks.vqa.train", *said]:
        assert part in str(error.value)


# Files


def test_json_and_jsonl_give_the_same_samples(tmp_path: Path) -> None:
    picture(tmp_path / "images/1.png")
    rows = [row(id=f"é{n}", conversations=[ASK, {**TELL, "value": f"Käse {n} 猫"}]) for n in range(5)]
    write(tmp_path / "a.json", rows)
    lines = [json.dumps(one, ensure_ascii=n % 2 == 0) for n, one in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n\n".join(lines), encoding="utf-8")
    (tmp_path / "b.json").write_text(
        "\ufeff " + json.dumps(rows, ensure_ascii=False, indent=3) + "\n", encoding="utf-8"
    )
    splits = [open_one(tmp_path, name, images="images") for name in ("a.json", "a.jsonl", "b.json")]
    for split in splits:
        assert [sample.id for sample in split] == [f"é{n}" for n in range(5)]
        assert [sample.turns[1][1] for sample in split] == [f"Käse {n} 猫" for n in range(5)]
        assert split[3].images == (str(tmp_path / "images/1.png"),)
        assert (split[3].row, split.lengths.tolist()) == (3, splits[0].lengths.tolist())


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", f'[{GOOD},\n {{"id" 2}}]', "line 2, column 8"),
        ("a.json", f"[{GOOD}", "syntax error"),
        ("a.json", f"[{GOOD} {GOOD}]", "','"),
        ("a.json", f"[{GOOD},]", "syntax error"),
        ("a.json", f"[{GOOD}] x", "Extra data"),
        ("a.json", "", "syntax error"),
        ("a.json", '{"rows": []}', "top level is not a list"),
        ("a.json", "[]", "no rows"),
        ("a.jsonl", "\n", "no rows"),
        ("a.jsonl", f'{GOOD}\n{{"id": 1,}}', "line 2, column"),
        ("a.jsonl", "[]", "not an object"),
        ("a.txt", "[]", "tasks.vqa.format"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"tasks\.vqa\.train") as error:
        open_one(tmp_path, name)
    assert name in str(error.value)
    assert said in str(error.value)


def test_missing_file_unset_split_and_encoding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tasks\.vqa\.train: the file .*none\.json does not exist"):
        open_one(tmp_path, "none.json")
    with pytest.raises(ValueError, match=r"tasks\.vqa\.test is not set"):
        open_split(DataConfig(root=str(tmp_path)), "vqa", TaskConfig(), "test", 0)
    (tmp_path / "a.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match="UTF-8"):
        open_one(tmp_path, "a.json")


def test_repeated_ids(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    write(tmp_path / "train.json", [row(), row()])
    assert len(open_one(tmp_path, "train.json")) == 2
    write(tmp_path / "test.json", [TEST_ROW, {**TEST_ROW, "text": "Who?"}])
    assert len(open_one(tmp_path, "test.json", "test")) == 2
    write(tmp_path / "test.json", [TEST_ROW, {**TEST_ROW, "question_id": "q2"}, TEST_ROW])
    with pytest.raises(ValueError, match=r"row 3 \(id 'q1'.*`question_id`.*row 1"):
        open_one(tmp_path, "test.json", "test")


# Images


def test_images_are_found_below_the_folder_or_the_root(tmp_path: Path) -> None:
    inside, outside = picture(tmp_path / "pics/a/1.png"), picture(tmp_path / "common/2.png")
    rows = [row(image="a/1.png"), row(image="common/2.png"), row(image=str(outside))]
    write(tmp_path / "train.json", rows)
    split = open_one(tmp_path, "train.json", images="pics")
    assert [sample.images for sample in split] == [(str(inside),), (str(outside),), (str(outside),)]
    assert all(os.path.isabs(str(sample.images[0])) for sample in split)


def test_missing_images_are_found_before_training(tmp_path: Path) -> None:
    picture(tmp_path / "pics/1.png")
    write(tmp_path / "train.json", [row(), row(id="b", image="2.png"), row(image="3.png")])
    with pytest.raises(ValueError, match=r"train\.json, row 2 .*'2\.png'.*pics/2\.png and 1 more.*tasks\.vqa\.images"):
        open_one(tmp_path, "train.json", images="pics")


def test_only_rows_in_use_need_their_images(tmp_path: Path) -> None:
    write(tmp_path / "train.json", [row(image=f"{n}.png") for n in range(20)])
    for n in range(20):
        picture(tmp_path / f"{n}.png")
    used = {sample.row for sample in open_one(tmp_path, "train.json", data={"limit_train": 3})}
    for n in set(range(20)) - used:
        (tmp_path / f"{n}.png").unlink()
    assert len(open_one(tmp_path, "train.json", data={"limit_train": 3})) == 3


def test_unreadable_images(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "1.png")
    whole = (tmp_path / "1.png").read_bytes()
    write(tmp_path / "train.json", [row()])
    split = open_one(tmp_path, "train.json")
    for content in (b"no image", whole[: len(whole) // 2], whole[:40], b""):
        (tmp_path / "1.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"train\.json, row 1 \(id 'a'.*1\.png cannot be read"):
            load_image(split[0].images[0], split[0])
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        load_image(split[0].images[0], split[0])


def test_images_become_rgb(tmp_path: Path) -> None:
    Image.new("LA", (4, 4)).save(tmp_path / "1.png")
    assert load_image(str(tmp_path / "1.png"), Sample("a", "t", (), ())).mode == "RGB"


# Subsamples


def test_fraction_and_limit_keep_the_order_and_are_nested(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [{"id": n, "conversations": [{"from": "user", "value": "?"}, TELL]} for n in range(50)])

    def rows(**data: Any) -> list[int]:
        return [sample.row for sample in open_one(tmp_path, "a.json", data=data)]

    half, tenth = rows(fraction=0.5), rows(fraction=0.1)
    assert (len(half), len(tenth)) == (25, 5)
    assert half == sorted(half) == rows(fraction=0.5)
    assert set(tenth) < set(half)
    assert rows(fraction=0.5, limit_train=5) == tenth
    assert rows(limit_train=1000, limit_test=1) == list(range(50))
    for bad in ({"fraction": 0.0}, {"fraction": 1.5}, {"limit_train": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            rows(**bad)


# Hugging Face datasets


def test_dataset_folder_with_decoded_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (6, 6), (n, 0, 0)) for n in range(3)]
    columns = {
        "pic": [pictures[0], None, pictures[2]],
        "query": ["a?", "b?", "c?"],
        "label": ["x", "y", "z"],
        "n": [7] * 3,
    }
    features = datasets.Features(
        pic=datasets.Image(), query=datasets.Value("string"), label=datasets.Value("string"), n=datasets.Value("int32")
    )
    dataset = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": dataset, "validation": dataset}).save_to_disk(str(tmp_path / "set"))
    mapping = {"image": "pic", "question": "query", "answer": "label"}
    split = open_one(tmp_path, "set", format="hf", columns=mapping)
    assert [sample.turns for sample in split][2] == (("user", "c?"), ("assistant", "z"))
    assert [len(sample.images) for sample in split] == [1, 0, 1]
    assert load_image(split[2].images[0], split[2]).getpixel((0, 0)) == (2, 0, 0)
    assert split[0].extra == {"n": 7}
    test = open_one(tmp_path, "set@validation", "test", format="hf", columns=mapping)
    assert (test[1].id, test[1].turns, test[1].reference) == ("1", (("user", "b?"),), "y")
    with pytest.raises(ValueError, match=r"tasks\.vqa\.columns\.question.*no column 'querry'.*Did you mean 'query'"):
        open_one(tmp_path, "set", format="hf", columns={"question": "querry"})
    with pytest.raises(ValueError, match=r"tasks\.vqa\.columns: unknown field 'prompt'"):
        open_one(tmp_path, "set", format="hf", columns={"prompt": "query"})
    with pytest.raises(
        ValueError, match=r"train: the dataset 'set' has no split 'trn'. It has: train, validation\. Did"
    ):
        open_one(tmp_path, "set@trn", format="hf", columns=mapping)
    with pytest.raises(ValueError, match=r"tasks\.vqa\.train: the dataset 'none@dev' cannot be opened"):
        (tmp_path / "none").mkdir()
        open_one(tmp_path, "none@dev", format="hf", columns=mapping)


def test_a_single_dataset_has_no_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    dataset = datasets.Dataset.from_dict({"question": ["a?"], "answer": ["x"]})
    dataset.save_to_disk(str(tmp_path / "set"))
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    for name in ("set", "a.parquet"):
        assert len(open_one(tmp_path, name, "test", format="hf")) == 1
        with pytest.raises(ValueError, match=rf"tasks\.vqa\.test: '{name}@test' .* one dataset without splits"):
            open_one(tmp_path, f"{name}@test", "test", format="hf")


def test_a_corrupt_picture_in_a_dataset_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    columns = {"question": ["a?"], "answer": ["x"]}
    one, several = {"bytes": b"no picture", "path": None}, datasets.List(datasets.Image())
    for name, value, feature, said in (
        ("a", one, datasets.Image(), r"in column 'image', row 1 cannot"),
        ("b", [one], several, r"in column 'image', row 1, picture 1 cannot"),
    ):
        dataset = datasets.Dataset.from_dict({**columns, "image": [value]}).cast_column("image", feature)
        dataset.to_parquet(str(tmp_path / f"{name}.parquet"))
        split = open_one(tmp_path, f"{name}.parquet")
        with pytest.raises(ValueError, match=rf"/{name}\.parquet, row 1 .*{said} be read: not a known") as raised:
            load_image(split[0].images[0], split[0])
        assert "BytesIO" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_columns_are_for_datasets(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(GOOD)
    with pytest.raises(ValueError, match=r"tasks\.vqa\.columns is set, but tasks\.vqa\.train \(a\.json"):
        open_one(tmp_path, name, columns={"question": "query"})


def test_dataset_file_with_our_keys_and_lists_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    turns = [{"from": "human", "value": "<image><image>Same?"}, {"from": "gpt", "value": "no"}]
    columns = {"images": [[Image.new("RGB", (5, 5), (n, n, n)) for n in (1, 2)]], "conversations": [turns]}
    dataset = datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(datasets.Image()))
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    split = open_one(tmp_path, "a.parquet")
    assert split[0].turns == (("user", "Same?"), ("assistant", "no"))
    assert [load_image(image, split[0]).getpixel((0, 0)) for image in split[0].images] == [(1, 1, 1), (2, 2, 2)]


def test_malformed_rows_of_a_dataset_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    columns = {"question": ["a?", None, "c?"], "answer": ["x", "y", None]}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"a\.parquet, row 2 .*`text` is null"):
        open_one(tmp_path, "a.parquet", "test")
    split = open_one(tmp_path, "a.parquet", "test", malformed="skip")
    assert ([sample.id for sample in split], split.skipped) == (["0"], 2)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/flowers", ("owner/flowers", None, "train")),
        ("owner/flowers@validation", ("owner/flowers", None, "validation")),
        ("owner/flowers:small@test[:2]", ("owner/flowers", "small", "test[:2]")),
    ],
)
def test_a_dataset_by_its_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[Any, ...]
) -> None:
    """What the library is asked for, and that its rows and pictures come out; nothing is looked for below `data.root`."""
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    content = {"picture": images, "query": ["What?", "Which?"], "label": ["rose", "iris"]}
    features = datasets.Features(
        {"picture": datasets.Image(), "query": datasets.Value("string"), "label": datasets.Value("string")}
    )
    table = datasets.Dataset.from_dict(content, features=features)
    calls = []

    def load(repository: str, config: str | None, split: str) -> Any:
        calls.append((repository, config, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    columns = {"image": "picture", "question": "query", "answer": "label"}
    opened = open_split(
        DataConfig(root=str(tmp_path)), "t", TaskConfig(train=name, format="hf", columns=columns), "train", 0
    )
    assert calls == [asked]
    assert [sample.turns[1][1] for sample in opened] == ["rose", "iris"]
    assert load_image(opened[1].images[0], opened[1]).getpixel((0, 0)) == (0, 0, 255)
