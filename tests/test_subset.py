"""`data sample`: a part of an experiment's data in the same formats, and the experiment file runs on it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mcit_lightning.__main__ import main
from mcit_lightning.config import ExperimentConfig, TaskConfig
from mcit_lightning.data.records import Sample, Split
from mcit_lightning.data.splits import open_split
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loading import find_experiment, load_config
from mcit_lightning.subset import write_subset

Config = Callable[..., ExperimentConfig]
SMOKE = find_experiment("smoke")


def opened(config: ExperimentConfig, task: str, split: Split) -> list[Sample]:
    return list(open_split(config.data, task, config.tasks[task], split, config.seed))


def content(samples: list[Sample], root: Path) -> list[object]:
    """What must be the same in the part: everything but where it lies."""
    return [
        (
            s.id,
            s.turns,
            s.reference,
            [Path(i).relative_to(root).as_posix() if isinstance(i, str) else 1 for i in s.images],
        )
        for s in samples
    ]


def reopened(config: ExperimentConfig, out: Path) -> ExperimentConfig:
    """The experiment on the part, by the names that its file gives."""
    import yaml

    names = yaml.safe_load((out / f"{config.name}_sample.yaml").read_text()).get("tasks", {})
    tasks = {task: replace(own, **names.get(task, {})) for task, own in config.tasks.items()}
    return replace(config, tasks=tasks, data=replace(config.data, root=str(out), fraction=1.0))


def test_the_part_runs(smoke_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "part"
    overrides = [
        f"data.root={smoke_root}",
        f"backbone.id={smoke_root}/model",
        "prepare=null",
        "trainer.accelerator=cpu",
    ]
    overrides += [
        "order=[shapes,colours]",
        "tasks.SHAPES.epochs=2",
        "trainer.enable_progress_bar=false",
        "zero_shot=false",
    ]
    assert main(["data", "sample", "smoke", *overrides, "--rows", "4", "--out", str(out)]) == 0
    assert f"mcit-lightning {out}/smoke_sample.yaml" in capsys.readouterr().out
    config = load_config(out / "smoke_sample.yaml")
    assert config.order == ["shapes", "colours"] and config.tasks["shapes"].epochs == 2 and config.prepare is None
    assert main([str(out / "smoke_sample.yaml"), f"out={tmp_path / 'run'}"]) == 0
    results = Results.load(tmp_path / "run")
    assert [len(row) for row in results.matrix.scores] == [2, 2]
    assert json.loads((tmp_path / "run/state.json").read_text())["steps"] == [2, 1]  # 4 rows are a batch
    assert len(list(out.rglob("*.png"))) == 2 * 3 * 4
    assert main(["data", "verify", str(out / "smoke_sample.yaml"), "--out", str(tmp_path / "checked")]) == 0


def test_the_rows_are_those_that_the_experiment_uses(smoke_config: Config, smoke_root: Path, tmp_path: Path) -> None:
    config = smoke_config(order=["colours"], data={"fraction": 0.5, "limit_val": 3})
    written = write_subset(config, SMOKE, [], 5, tmp_path / "part")
    assert written.rows == {("colours", "train"): 5, ("colours", "val"): 3, ("colours", "test"): 5}
    part = reopened(config, tmp_path / "part")
    for split, limit in (("train", 5), ("val", 3), ("test", 5)):
        own = replace(config, data=replace(config.data, **{f"limit_{split}": limit}))
        expected = content(opened(own, "colours", split), smoke_root)  # type: ignore[arg-type]
        assert content(opened(part, "colours", split), tmp_path / "part") == expected  # type: ignore[arg-type]
    larger = write_subset(config, SMOKE, [], 8, tmp_path / "larger")
    ids = [{s.id for s in opened(reopened(config, f.parent), "colours", "train")} for f in (written.file, larger.file)]
    assert ids[0] < ids[1]


@pytest.fixture
def formats(smoke_root: Path, tmp_path: Path) -> tuple[Path, dict[str, TaskConfig]]:
    """One task of every format."""
    import datasets

    root = tmp_path / "data"
    shutil.copytree(smoke_root / "colours", root / "colours")
    rows = json.loads((root / "colours/train.json").read_text())
    tests = json.loads((root / "colours/test.json").read_text())
    for row in (*rows, *tests):
        row["image"] = row["image"].removeprefix("colours/")
    (root / "lines.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    (root / "asked.json").write_text(json.dumps([{**row, "answer": None} for row in tests]))
    (root / "answers.json").write_text(json.dumps({row["question_id"]: {"answer": row["answer"]} for row in tests}))
    names = [row["image"] for row in tests]
    captions = [{"image_id": n + 1, "caption": f"{word} {n}"} for n in range(8) for word in ("one", "two")]
    images = [{"id": n + 1, "file_name": name} for n, name in enumerate(names)]
    (root / "coco.json").write_text(json.dumps({"info": {}, "images": images, "annotations": captions}))
    pictures = [str(root / "colours" / name) for name in names]
    table = {"query": [f"What {n}?" for n in range(8)], "label": [str(n) for n in range(8)], "picture": pictures}
    dataset = datasets.Dataset.from_dict(table).cast_column("picture", datasets.Image())
    dataset.to_parquet(str(root / "table.parquet"))
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(str(root / "saved"))
    columns = {"image": "picture", "question": "query", "answer": "label"}
    outside = tmp_path / "elsewhere.png"
    Image.new("RGB", (30, 30)).save(outside)
    (root / "outside.json").write_text(json.dumps([{**rows[0], "image": str(outside)}]))
    return root, {
        "lines": TaskConfig(train="lines.jsonl", test="asked.json", references="answers.json", images="colours"),
        "coco": TaskConfig(train="coco.json", test="coco.json", images="colours", metric="contains"),
        "by_line": TaskConfig(
            train="lines.jsonl", test="asked.json", references="coco.json", images="colours", metric="contains"
        ),
        "parquet": TaskConfig(train="table.parquet", test="table.parquet", columns=columns),
        "saved": TaskConfig(train="saved", test="saved", columns=columns, format="hf"),
        "outside": TaskConfig(train="outside.json", test=str(root / "asked.json"), references="answers.json", images="colours"),
    }  # fmt: skip


def test_every_format_comes_back(
    smoke_config: Config, formats: tuple[Path, dict[str, TaskConfig]], tmp_path: Path
) -> None:
    root, tasks = formats
    config = smoke_config(order=list(tasks), tasks=tasks, data={"root": str(root)})
    out = tmp_path / "part"
    written = write_subset(config, SMOKE, [], 3, out)
    part = reopened(config, out)
    assert written.outside == 1
    for task in tasks:
        for split in ("train", "test"):
            own = replace(config, data=replace(config.data, limit_train=3, limit_test=3))
            expected, found = (opened(c, task, split) for c in (own, part))  # type: ignore[arg-type]
            assert [s.turns for s in found] == [s.turns for s in expected], (task, split)
            assert [s.reference for s in found] == [s.reference for s in expected], (task, split)
            if task not in ("parquet", "saved", "outside"):
                assert [[i.removeprefix(str(out)) for i in s.images] for s in found] == [  # type: ignore[union-attr]
                    [i.removeprefix(str(root)) for i in s.images]  # type: ignore[union-attr]
                    for s in expected
                ], (task, split)
    assert part.tasks["lines"].train == "lines.jsonl" and part.tasks["by_line"].train == "by_line/train.jsonl"
    (row,) = opened(part, "outside", "train")
    assert row.images == (str(tmp_path / "elsewhere.png"),)
    first = opened(part, "parquet", "train")[0].images[0]
    assert not isinstance(first, str) and first.open().size == (30, 30)


def test_a_folder_in_use_and_bad_data_are_refused(smoke_config: Config, smoke_root: Path, tmp_path: Path) -> None:
    config = smoke_config(order=["colours"])
    (tmp_path / "file").write_text("")
    for used in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=r"--out.*not empty"):
            write_subset(config, SMOKE, [], 2, used)
    missing: dict[str, Any] = {"train": "colours/none.json"}
    config.tasks["colours"] = replace(config.tasks["colours"], **missing)
    with pytest.raises(ValueError, match=r"tasks\.colours\.train"):
        write_subset(config, SMOKE, [], 2, tmp_path / "new")
