"""Rows of a Hugging Face dataset: a folder, a file or a name on the hub, with our field names mapped to its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mcit_lightning.data.readers import Visit, check_file
from mcit_lightning.data.records import Split, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

FIELDS = ("id", "image", "question", "answer")
SPLITS: dict[Split, str] = {"train": "train", "val": "validation", "test": "test"}
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass(frozen=True)
class DatasetImage:
    """A picture inside a dataset, decoded when it is opened.

    Args:
        dataset: the dataset reduced to its image column.
        column: name of that column.
        row: 0-based row.
        position: which picture, where the column holds lists.
    """

    dataset: Dataset
    column: str
    row: int
    position: int | None = None

    def open(self) -> Image.Image:
        """Decode the picture."""
        value = self.dataset[self.row][self.column]
        return value if self.position is None else value[self.position]

    def __str__(self) -> str:
        which = "" if self.position is None else f", picture {self.position + 1}"
        return f"in column {self.column!r}, row {self.row + 1}{which}"


class DatasetRows:
    """Rows of a dataset in the form of our JSON files; pictures stay undecoded.

    A dataset with a question column (named `question`, or mapped by `columns`) gives one question and answer per row.
    Any other must already have the keys of our rows, for example `conversations`.
    """

    def __init__(self, dataset: Dataset, columns: Mapping[str, str], *, source: str, key: str, split: Split) -> None:
        self.source = source
        self._split = split
        self._columns = _resolve_columns(columns, dataset.column_names, source, key)
        pictures = [name for name, feature in dataset.features.items() if _holds_images(feature)]
        self._picture = next(
            (c for c in (self._columns.get("image"), "image", "images") if c is not None and c in pictures), None
        )
        self._text = dataset.remove_columns(pictures)
        self._pictures = None if self._picture is None else dataset.select_columns([self._picture])
        self._counts = None if self._pictures is None else _count_images(self._pictures, self._picture or "")

    def __len__(self) -> int:
        return len(self._text)

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` with the keys of our JSON files."""
        raw = dict(self._text[index]) if self._text.column_names else {}
        return self._convert(raw, index)

    def visit_all(self, visit: Visit) -> None:
        """Call `visit(index, row)` for every row, without decoding a picture."""
        if not self._text.column_names:
            return
        for index, raw in enumerate(self._text):
            visit(index, self._convert(dict(raw), index))

    def _convert(self, raw: dict[str, Any], index: int) -> dict[str, Any]:
        row = {name: value for name, value in raw.items() if name not in self._columns.values()}
        fields = {ours: raw[theirs] for ours, theirs in self._columns.items() if theirs in raw}
        if self._picture is not None:
            row["image"] = self._images(index)
        elif "image" in fields:
            row["image"] = fields["image"]
        if "question" not in self._columns:
            # Already in our form: the mapped columns go by our names.
            identity = "question_id" if self._split == "test" and "question_id" not in row else "id"
            names = {"id": identity, "answer": "answer"}
            return {**row, **{names[name]: value for name, value in fields.items() if name in names}}
        if self._split == "test":
            answer = {"answer": fields["answer"]} if "answer" in fields else {}
            return {**row, "question_id": fields.get("id", index), "text": fields["question"], **answer}
        turns = [{"from": "human", "value": fields["question"]}, {"from": "gpt", "value": fields.get("answer")}]
        return {**row, "id": fields.get("id", index), "conversations": turns}

    def _images(self, index: int) -> list[DatasetImage]:
        assert self._counts is not None
        assert self._pictures is not None
        assert self._picture is not None
        count, is_list = self._counts
        positions = [*range(count[index])] if is_list else [None] * count[index]
        return [DatasetImage(self._pictures, self._picture, index, position) for position in positions]


def read_dataset(
    name: str, root: Path, columns: Mapping[str, str], key: str, split: Split, visit: Visit
) -> DatasetRows:
    """Open the dataset `name` and call `visit(index, row)` for every row.

    Args:
        name: a file, a folder (written by `save_to_disk` or holding data files) relative to `root`, or a hub name.
            `@SPLIT` at the end names the split (default `train`, `validation`, `test`; a file and the folder of a single
            dataset have none); a hub name may have `:CONFIG` before it.
        root: `data.root`.
        columns: our field name to the dataset's column.
        key: the configuration key, for messages.
        split: which of our splits this is.
        visit: sees each row once.

    Raises:
        ValueError: the library is missing, the dataset cannot be opened, it has no such split, or a column is unknown.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{key}: format hf needs the package `datasets`. Install it: pip install datasets") from None
    base, _, asked = name.partition("@")
    chosen = asked or SPLITS[split]
    local = root / base
    if local.suffix.lower() in BUILDERS:  # a hub, which has no such name, may take minutes to say so
        check_file(local, key)
    # A file, or a folder that `save_to_disk` wrote of one dataset.
    single = local.is_file() or (local / "state.json").is_file()
    if single and asked:
        raise ValueError(
            f"{key}: {name!r} asks for the split {asked!r}, but {local} is one dataset without splits, so every split "
            f"would read the same rows. Name one file or folder per split, without `@{asked}`."
        )
    try:
        dataset = _open(datasets, base, local, chosen)
    except Exception as error:  # the library raises a dozen kinds
        raise ValueError(
            f"{key}: the dataset {name!r} cannot be opened: {error} Correct {key}: a path relative to data.root or a "
            f"hub name, with `@SPLIT` at its end where the split is not {SPLITS[split]!r}."
        ) from error
    if isinstance(dataset, dict):
        if chosen not in dataset:
            raise ValueError(
                f"{key}: the dataset {base!r} has no split {chosen!r}. It has: {', '.join(dataset)}."
                f"{did_you_mean(chosen, dataset)} Name one of them: {base}@SPLIT."
            )
        dataset = dataset[chosen]
    source = str(local if local.exists() else base) + ("" if single else f"@{chosen}")
    rows = DatasetRows(dataset, columns, source=source, key=key, split=split)
    rows.visit_all(visit)
    return rows


def _open(datasets: Any, base: str, local: Path, split: str) -> Any:
    """The dataset, or all splits of one that `save_to_disk` wrote."""
    if local.is_file():
        return datasets.load_dataset(BUILDERS[local.suffix.lower()], data_files=str(local), split="train")
    if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(local))
    if local.is_dir():
        return datasets.load_dataset(str(local), split=split)
    repository, _, config = base.partition(":")
    return datasets.load_dataset(repository, config or None, split=split)


def _resolve_columns(columns: Mapping[str, str], known: list[str], source: str, key: str) -> dict[str, str]:
    setting = f"{key.rsplit('.', 1)[0]}.columns"
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            raise ValueError(
                f"{setting}: unknown field {ours!r}. Known: {', '.join(FIELDS)}.{did_you_mean(ours, FIELDS)}"
            )
        if theirs not in known:
            raise ValueError(
                f"{setting}.{ours}: {source} has no column {theirs!r}. It has: {', '.join(known)}."
                f"{did_you_mean(theirs, known)}"
            )
    return {ours: columns.get(ours, ours) for ours in FIELDS if columns.get(ours, ours) in known}


def _holds_images(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)
    return type(inner).__name__ == "Image"


def _count_images(dataset: Dataset, column: str) -> tuple[list[int], bool]:
    """Pictures per row and whether the column holds lists, from the table itself: no byte of a picture is read."""
    import pyarrow.compute as pc

    values = dataset.flatten_indices().data.column(column)
    if hasattr(dataset.features[column], "feature"):
        return pc.fill_null(pc.list_value_length(values), 0).to_pylist(), True
    return pc.cast(pc.is_valid(values), "int8").to_pylist(), False
