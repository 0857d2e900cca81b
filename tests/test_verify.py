"""`data verify`: everything that is wrong with the rows and pictures is found, and nothing else is called wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFont

from mcit_lightning.__main__ import main
from mcit_lightning.config import ExperimentConfig, TaskConfig
from mcit_lightning.verify import Limits, Report, SplitCheck, verify
from mcit_lightning.verify.rows import answer_text, survey_split
from mcit_lightning.verify.sheet import IMAGE, contact_sheet, varied
from mcit_lightning.verify.tables import SHOWN, listing
from mcit_lightning.verify.typeset import Type

Rows = list[dict[str, Any]]
Config = Callable[..., ExperimentConfig]
FAST = Limits(lengths=0, workers=2)


@pytest.fixture
def root(smoke_root: Path, tmp_path: Path) -> Path:
    """The task `colours`, to be spoilt."""
    folder = tmp_path / "data"
    shutil.copytree(smoke_root / "colours", folder / "colours")
    return folder


@pytest.fixture
def config(smoke_config: Config, root: Path) -> ExperimentConfig:
    """An experiment on it."""
    return smoke_config(order=["colours"], data={"root": str(root)})


def change(path: Path, edit: Callable[[Rows], object]) -> None:
    rows = json.loads(path.read_text())
    edit(rows)
    path.write_text(json.dumps(rows))


def check_of(report: Report, split: str) -> SplitCheck:
    (found,) = [check for check in report.checks if check.survey.split == split]
    return found


def with_task(config: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    return replace(config, tasks={"colours": replace(config.tasks["colours"], **changes)})


def test_clean_data_have_no_problem(config: ExperimentConfig) -> None:
    report = verify(config, Limits())
    assert report.problems == [] and report.general == []
    train = check_of(report, "train")
    assert (train.survey.rows, train.used, train.pictures.files, train.pictures.decoded) == (24, 24, 24, 24)
    assert train.survey.answers == {"red": 6, "green": 6, "blue": 6, "yellow": 6}
    assert check_of(report, "test").lengths is None


def test_every_broken_row_is_listed(config: ExperimentConfig, root: Path) -> None:
    def spoil(rows: Rows) -> None:
        del rows[2]["conversations"]
        rows[5]["conversations"][0]["from"] = "humna"
        rows[11]["image"] = 7

    change(root / "colours/train.json", spoil)
    change(root / "colours/test.json", lambda rows: rows[4].pop("answer"))
    report = verify(config, FAST)
    broken = check_of(report, "train").survey.broken
    assert [next(n for n in (3, 6, 12) if f"row {n} " in line) for line in broken] == [3, 6, 12]
    assert "conversations" in broken[0] and "humna" in broken[1] and "image" in broken[2]
    assert "row 5 " in check_of(report, "test").survey.broken[0]
    assert report.problems == [*broken, *check_of(report, "test").survey.broken]
    assert check_of(report, "train").used is None


def test_lines_that_are_no_json_are_listed_with_the_rows_after_them(config: ExperimentConfig, root: Path) -> None:
    rows = json.loads((root / "colours/train.json").read_text())
    lines = [json.dumps(row) for row in rows]
    lines[3], lines[8] = lines[3][:40], "nothing"
    (root / "colours/train.jsonl").write_text("\n".join(lines))
    check = check_of(verify(with_task(config, train="colours/train.jsonl"), FAST), "train")
    assert len(check.survey.broken) == 2 and (check.survey.rows, len(check.survey.entries)) == (24, 22)
    assert "line 4" in check.survey.broken[0] and "line 9" in check.survey.broken[1]


def test_a_file_that_breaks_off_or_is_absent_does_not_hide_the_others(config: ExperimentConfig, root: Path) -> None:
    path = root / "colours/train.json"
    path.write_text(path.read_text()[:-300])
    (root / "colours/val.json").unlink()
    report = verify(config, FAST)
    train, val, test = (check_of(report, split) for split in ("train", "val", "test"))
    assert train.survey.fault is not None and "syntax error" in train.survey.fault and train.survey.rows > 20
    assert val.survey.fault is not None and "does not exist" in val.survey.fault
    assert test.used == 8 and len(report.problems) == 2


def test_missing_and_unreadable_pictures_are_all_found(config: ExperimentConfig, root: Path) -> None:
    images = root / "colours/images"
    (images / "train_00003.png").unlink()
    (images / "train_00004.png").write_bytes((images / "train_00004.png").read_bytes()[:60])
    (images / "train_00009.png").write_text("no picture")
    (images / "test_00000.png").write_bytes(b"")
    change(root / "colours/train.json", lambda rows: rows[7].update(image=rows[3]["image"]))
    report = verify(config, Limits())
    train = check_of(report, "train").pictures
    assert (train.files, train.decoded) == (23, 22)  # rows 4 and 8 name one picture
    assert len(train.missing) == 1 and "train_00003.png" in train.missing[0] and "2 rows" in train.missing[0]
    assert [name in line for line, name in zip(train.unreadable, ("00004", "00009"), strict=True)] == [True, True]
    assert "row 5 " in train.unreadable[0] and train.bad_rows == {3, 7, 4, 9}
    assert len(check_of(report, "test").pictures.unreadable) == 1
    lengths = check_of(report, "train").lengths
    assert lengths is not None and (lengths.measured, lengths.longest) == (
        20,
        30,
    )  # without the rows that lack a picture
    assert len(report.problems) == 4


def test_a_picture_is_decoded_once_for_all_splits(
    config: ExperimentConfig, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mcit_lightning.verify import pictures

    decoded: list[object] = []
    load = pictures.load_image
    monkeypatch.setattr(pictures, "load_image", lambda *given: (decoded.append(given), load(*given))[1])
    name = "colours/images/train_00000.png"
    (root / name).write_text("no picture")
    for split in ("train", "val", "test"):
        change(root / f"colours/{split}.json", lambda rows: [row.update(image=name) for row in rows])
    seen: list[int] = []
    report = verify(config, FAST, lambda label, count: seen.append(count))
    assert len(decoded) == 1 and sum(seen) == 3
    assert [len(check.pictures.unreadable) for check in report.checks] == [1, 1, 1]


def test_the_limit_of_decoded_pictures_does_not_limit_the_search(config: ExperimentConfig, root: Path) -> None:
    (root / "colours/images/train_00020.png").unlink()
    pictures = check_of(verify(config, replace(FAST, pictures=5)), "train").pictures
    assert pictures.decoded == 5 and len(pictures.missing) == 1


def test_pictures_of_rows_that_are_not_in_use_may_be_missing(config: ExperimentConfig, root: Path) -> None:
    data = replace(config.data, limit_train=6)
    used = {entry.row for entry in survey_split(config, "colours", "train").entries}
    for number in used - _rows_in_use(replace(config, data=data)):
        (root / f"colours/images/train_{number:05d}.png").unlink()
    report = verify(replace(config, data=data), FAST)
    assert report.problems == [] and check_of(report, "train").pictures.decoded == 6
    assert len(check_of(verify(config, FAST), "train").pictures.missing) == 18


def _rows_in_use(config: ExperimentConfig) -> set[int]:
    from mcit_lightning.data.splits import open_split

    return {sample.row for sample in open_split(config.data, "colours", config.tasks["colours"], "train", config.seed)}


def test_repeated_training_ids_are_a_note_and_repeated_questions_a_problem(
    config: ExperimentConfig, root: Path
) -> None:
    change(root / "colours/train.json", lambda rows: [row.update(id="same") for row in rows[:3]])
    change(root / "colours/test.json", lambda rows: rows[6].update(question_id=rows[1]["question_id"]))
    report = verify(config, FAST)
    train, test = check_of(report, "train"), check_of(report, "test")
    assert train.problems == [] and "repeated ids: 2 of 24" in train.notes[0]
    assert len(test.problems) == 1 and "row 7 " in test.problems[0] and "row 2," in test.problems[0]


def test_what_is_to_be_skipped_is_noted(config: ExperimentConfig, root: Path) -> None:
    change(root / "colours/train.json", lambda rows: rows[2].pop("conversations"))
    train = check_of(verify(with_task(config, malformed="skip"), FAST), "train")
    assert (train.problems, len(train.notes), train.used) == ([], 1, 23)


def test_what_only_a_run_would_refuse_is_a_problem(config: ExperimentConfig) -> None:
    """The rows are right, but the configuration of their task is not."""
    report = verify(with_task(config, columns={"id": "number"}), FAST)
    assert len(report.problems) == 3 and all("tasks.colours.columns" in line for line in report.problems)


def test_answers_that_the_metric_cannot_score_are_listed(config: ExperimentConfig, root: Path) -> None:
    change(root / "colours/test.json", lambda rows: [row.update(answer={"a": 1}) for row in rows[2:4]])
    test = check_of(verify(config, FAST), "test")
    assert len(test.problems) == 2 and all("exact_match" in line for line in test.problems)


def test_lengths_are_those_of_training(config: ExperimentConfig, smoke_processor: Any) -> None:
    from mcit_lightning.data.collate import TrainCollator
    from mcit_lightning.data.splits import open_split

    collator = TrainCollator(smoke_processor, config.prompt, max_length=128)
    samples = list(open_split(config.data, "colours", config.tasks["colours"], "train", config.seed))
    expected = sorted(length for sample in samples for length in collator([sample])["length"])
    lengths = check_of(verify(config, Limits()), "train").lengths
    assert lengths is not None
    assert (lengths.longest, lengths.measured, lengths.over) == (expected[-1], 24, 0)
    assert lengths.median == int((expected[11] + expected[12]) / 2)
    some = check_of(verify(config, Limits(lengths=5)), "train").lengths
    assert some is not None and (some.measured, some.median) == (5, None)


def test_samples_above_the_limit_are_counted(config: ExperimentConfig) -> None:
    """The prompt alone is longer than 20 tokens: no answer is left. One token less than the longest cuts the longest."""
    whole = check_of(verify(config, Limits()), "train").lengths
    assert whole is not None
    short = check_of(verify(replace(config, data=replace(config.data, max_length=20)), Limits()), "train")
    assert short.lengths is not None and (short.lengths.over, short.lengths.dropped) == (24, 24)
    assert short.problems == [] and "24 have no answer token left" in short.notes[0]
    cut = check_of(verify(replace(config, data=replace(config.data, max_length=whole.longest - 1)), Limits()), "train")
    assert cut.lengths is not None and cut.lengths.over > 0 and cut.lengths.dropped == 0


def test_lengths_are_estimated_without_the_processor(config: ExperimentConfig) -> None:
    away = replace(config, backbone=replace(config.backbone, id="nobody/no-such-model"))
    report = verify(away, Limits())
    lengths = check_of(report, "train").lengths
    assert lengths is not None and lengths.measured == 0
    assert lengths.longest == 256 + len("Which colour is this? Answer with one word.yellow") // 4
    assert "nobody/no-such-model" in report.general[0] and report.problems == []


def test_a_sample_that_cannot_be_encoded_is_a_problem(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a text that holds the processor's own image token cannot."""
    from mcit_lightning.data.encode import Encoder

    encode = Encoder.encode

    def refuse(self: Encoder, samples: Any, turns: Any) -> Any:
        if samples[0].row in (3, 5):
            raise ValueError(f"{samples[0].place}: the prompt holds 2 image token(s) for 1 image(s)")
        return encode(self, samples, turns)

    monkeypatch.setattr(Encoder, "encode", refuse)
    train = check_of(verify(config, Limits()), "train")
    assert len(train.problems) == 2 and all("image token" in line for line in train.problems)
    assert train.lengths is not None and train.lengths.measured == 22


def test_coco_captions_and_references(smoke_config: Config, root: Path) -> None:
    names = ["colours/images/test_00000.png", "colours/images/test_00001.png"]
    coco = {
        "images": [{"id": 5, "file_name": names[0]}, {"id": 6, "file_name": names[1]}],
        "annotations": [{"image_id": image, "caption": text} for image, text in ((5, "one"), (6, "two"), (5, "three"))],
    }
    (root / "captions.json").write_text(json.dumps(coco))
    rows = [{"question_id": n, "image": names[0], "text": "What?"} for n in (7, 8)]
    (root / "questions.json").write_text(json.dumps(rows))
    (root / "answers.json").write_text(json.dumps({"7": {"answer": "red"}}))
    tasks = {
        "captions": TaskConfig(train="captions.json", test="captions.json", metric="contains"),
        "asked": TaskConfig(train="captions.json", test="questions.json", references="answers.json"),
    }
    report = verify(smoke_config(order=list(tasks), tasks=tasks, data={"root": str(root)}), FAST)
    captions = [check.survey for check in report.checks if check.survey.task == "captions"]
    assert [(survey.rows, survey.fault) for survey in captions] == [(3, None), (2, None)]
    asked = report.checks[-1]
    assert asked.survey.answers == {"red": 1} and len(asked.survey.broken) == 1 and "'8'" in asked.survey.broken[0]


def test_pictures_inside_a_dataset(smoke_config: Config, root: Path) -> None:
    import datasets

    whole = (root / "colours/images/train_00000.png").read_bytes()
    pictures = [{"bytes": content, "path": None} for content in (whole, whole[:70], whole, b"x")]
    table = {"question": ["What?"] * 4, "answer": ["a", "b", "b", "c"], "image": pictures}
    dataset = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    dataset.to_parquet(str(root / "table.parquet"))
    task = TaskConfig(train="table.parquet", test="table.parquet")
    config = smoke_config(order=["table"], tasks={"table": task}, data={"root": str(root)})
    train = check_of(verify(config, Limits()), "train")
    assert (train.pictures.files, train.pictures.decoded) == (4, 4) and len(train.problems) == 2
    assert "row 2" in train.problems[0] and "row 4" in train.problems[1]
    assert train.lengths is not None and train.lengths.measured == 2
    assert train.survey.answers == {"a": 1, "b": 2, "c": 1}
    assert contact_sheet("table", "", [train.survey], samples=4).height > IMAGE[1]


@pytest.mark.parametrize(
    ("reference", "text"),
    [("red", "red"), (["a", "b", "b"], "b"), (3, "3"), ([0.5, 1], "[0.5, 1]"), ({"é": 1}, '{"é": 1}')],
)
def test_an_answer_as_text(reference: Any, text: str) -> None:
    assert answer_text(reference) == text


def test_a_sheet_shows_every_answer_once_before_any_twice(config: ExperimentConfig) -> None:
    survey = survey_split(config, "colours", "train")
    four = varied(survey, 4)
    assert {parts.turns[1][1] for _, parts in four} == {"red", "green", "blue", "yellow"}
    assert [row for row, _ in four] == sorted(row for row, _ in four)
    assert len(varied(survey, 100)) == 24


def test_a_sheet_holds_the_pictures(config: ExperimentConfig, root: Path) -> None:
    """Eight flat test pictures, each of another grey: all of them must be found in the sheet at their size."""
    for number in range(8):
        Image.new("RGB", (30, 30), (20 * number, 20 * number, 0)).save(root / f"colours/images/test_{number:05d}.png")
    surveys = [survey_split(config, "colours", "test")]
    sheet = contact_sheet("colours", "", surveys, samples=8)
    counted = {colour: count for count, colour in sheet.getcolors(maxcolors=2**24)}
    area = (min(IMAGE) - 2) ** 2
    assert all(counted.get((20 * number, 20 * number, 0), 0) >= area for number in range(8))


def test_a_sheet_draws_what_is_broken(config: ExperimentConfig, root: Path, tmp_path: Path) -> None:
    (root / "colours/images/train_00000.png").unlink()
    change(root / "colours/train.json", lambda rows: rows[1].pop("image"))
    change(root / "colours/train.json", lambda rows: rows[2].update(image=[rows[2]["image"]] * 6))
    change(
        root / "colours/train.json", lambda rows: rows[3]["conversations"][0].update(value="<image>\n" + "汉字" * 400)
    )
    change(root / "colours/train.json", lambda rows: rows[1]["conversations"][0].update(value="no image"))
    change(root / "colours/train.json", lambda rows: rows[2]["conversations"][0].update(value="six images"))
    (root / "colours/val.json").unlink()
    surveys = [survey_split(config, "colours", split) for split in ("train", "val")]
    assert surveys[0].broken == []
    sheet = contact_sheet("colours", "x" * 500, surveys, samples=24)
    assert sheet.width < 1500 and sheet.height > 4 * IMAGE[1]
    (tmp_path / "font.ttf").write_text("no font")
    with pytest.raises(ValueError, match=r"--font.*font\.ttf"):
        contact_sheet("colours", "", surveys, samples=1, font=tmp_path / "font.ttf")


@pytest.mark.parametrize("text", ["", "one", "a few short words " * 9, "x" * 300, "short " + "y" * 90 + " end"])
def test_wrapped_text_fits_and_loses_nothing_but_its_end(text: str) -> None:
    pen, font = Type(None), ImageFont.load_default(size=13)
    for lines in (1, 2, 5):
        wrapped = pen.wrap(text, 120, lines)
        assert len(wrapped) <= lines and all(font.getlength(line) <= 120 for line in wrapped)
        whole = "".join("".join(wrapped).split()).removesuffix("…")
        assert "".join(text.split()).startswith(whole) and bool(whole) == bool(text.strip())
    assert "".join(pen.wrap(text, 10000, 3)) == text.strip()


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "checked"
    arguments = ["data", "verify", "smoke", "--out", str(out), f"data.root={root}", "prepare=null", "order=[colours]"]
    arguments += ["--lengths", "0", "--workers", "1"]
    assert main(arguments) == 0
    assert "no problems" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"colours.png", "problems.txt"}
    change(root / "colours/train.json", lambda rows: [row.pop("conversations") for row in rows])
    assert main(arguments) == 1
    shown, listed = capsys.readouterr().out, (out / "problems.txt").read_text()
    assert shown.count("problem: ") == SHOWN and "4 more problems" in shown and "24 problems;" in shown
    assert listed.count("problem: ") == 24 and "row 24 " in listed
    assert main([*arguments, "optim.lrr=1"]) == 2
    assert main(["data", "verify", "no_such_experiment"]) == 2


def test_nothing_found_is_said() -> None:
    assert listing(Report()) == "nothing was found\n"
