"""Some rows of a task's file, written in the file's own format."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcit_lightning.config import TaskConfig
from mcit_lightning.data.coco import is_object, read_json
from mcit_lightning.data.hf import BUILDERS
from mcit_lightning.data.hf import SPLITS as HF_SPLITS
from mcit_lightning.data.readers import file_format, read_file
from mcit_lightning.data.records import Split
from mcit_lightning.data.references import read_references
from mcit_lightning.evaluation.files import write_atomic


class Target:
    """The folder that a subset is written to. No two splits get the same file.

    Args:
        folder: it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._taken: set[Path] = set()

    def place(self, name: str, otherwise: str) -> str:
        """The name below the folder under which a file goes: its own, unless that leads out of the folder or is taken."""
        path = Path(name)
        chosen = otherwise if path.is_absolute() or ".." in path.parts or path in self._taken else name
        self._taken.add(Path(chosen))
        return chosen


def write_split(own: TaskConfig, task: str, split: Split, root: Path, numbers: Sequence[int], target: Target) -> str:
    """Write rows of a split.

    Args:
        own: the task.
        task: its name.
        split: which split.
        root: `data.root`.
        numbers: 0-based rows, ascending.
        target: where to.

    Returns:
        The name under which the split's file now is, for the task's configuration.
    """
    name, key = str(getattr(own, split)), f"tasks.{task}.{split}"
    kind = file_format(name, own.format, key)
    if kind == "hf":
        return _write_dataset(name, root, split, numbers, target, f"{task}/{split}")
    path = root / name
    chosen = target.place(name, f"{task}/{split}{path.suffix}")
    if kind == "json" and is_object(path):
        content = coco_part(read_json(path, key), split, numbers)
        write_atomic(target.folder / chosen, json.dumps(content, ensure_ascii=False))
        return chosen
    wanted, rows = set(numbers), []

    def visit(index: int, row: Any) -> None:
        if index in wanted:
            rows.append(json.dumps(row, ensure_ascii=False))

    read_file(path, kind, key, visit, lambda index, error: None)
    text = "[\n" + ",\n".join(rows) + "\n]\n" if kind == "json" else "".join(f"{row}\n" for row in rows)
    write_atomic(target.folder / chosen, text)
    return chosen


def write_references(own: TaskConfig, task: str, root: Path, numbers: Sequence[int], target: Target) -> str | None:
    """Copy the answers that a task keeps in a file of their own; those that go by the row's number are numbered anew.

    Returns:
        The name under which they now are; None if the task has none.
    """
    if own.references is None:
        return None
    path, key = root / own.references, f"tasks.{task}.references"
    chosen = target.place(own.references, f"{task}/references{path.suffix}")
    if read_references(path, key).by_line:
        content = read_json(path, key)
        write_atomic(target.folder / chosen, json.dumps(_renumbered(content, numbers), ensure_ascii=False))
    else:
        write_atomic(target.folder / chosen, path.read_bytes())
    return chosen


def coco_part(content: dict[str, Any], split: Split, numbers: Sequence[int]) -> dict[str, Any]:
    """Some rows of a COCO caption file: a row is an image in a test split, a caption in others."""
    images, annotations = content["images"], content["annotations"]
    if split == "test":
        images = [images[number] for number in numbers]
        kept = {image["id"] for image in images}
        annotations = [annotation for annotation in annotations if annotation["image_id"] in kept]
    else:
        annotations = [annotations[number] for number in numbers]
        kept = {annotation["image_id"] for annotation in annotations}
        images = [image for image in images if image["id"] in kept]
    return {**content, "images": images, "annotations": annotations}


def _renumbered(content: dict[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """The captions of some rows, whose images' ids are the rows' 1-based numbers."""
    new = {str(number + 1): position + 1 for position, number in enumerate(numbers)}
    images = [{**entry, "id": new[str(entry["id"])]} for entry in content["images"] if str(entry["id"]) in new]
    annotations = [
        {**entry, "image_id": new[str(entry["image_id"])]}
        for entry in content["annotations"]
        if str(entry["image_id"]) in new
    ]
    return {**content, "images": images, "annotations": annotations}


def _write_dataset(name: str, root: Path, split: Split, numbers: Sequence[int], target: Target, otherwise: str) -> str:
    """Rows of a Hugging Face dataset, with their pictures: a parquet file stays one, anything else becomes a saved folder."""
    import datasets

    base, _, asked = name.partition("@")
    chosen, local = asked or HF_SPLITS[split], root / base
    if local.is_file():
        dataset = datasets.load_dataset(BUILDERS[local.suffix.lower()], data_files=str(local), split="train")
    elif (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        dataset = datasets.load_from_disk(str(local))
    elif local.is_dir():
        dataset = datasets.load_dataset(str(local), split=chosen)
    else:
        repository, _, config = base.partition(":")
        dataset = datasets.load_dataset(repository, config or None, split=chosen)
    part = (dataset[chosen] if isinstance(dataset, dict) else dataset).select(numbers)
    if local.suffix.lower() == ".parquet":
        place = target.place(base, f"{otherwise}.parquet")
        (target.folder / place).parent.mkdir(parents=True, exist_ok=True)
        part.to_parquet(str(target.folder / place))
        return place
    place = target.place(otherwise, otherwise)
    part.save_to_disk(str(target.folder / place))
    return place
