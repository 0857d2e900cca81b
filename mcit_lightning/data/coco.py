"""COCO caption annotations (COCO, Flickr30k, TextCaps, VizWiz-Captions): one file with `images` and `annotations`."""

import json
from pathlib import Path
from typing import Any

from mcit_lightning.data.jsonscan import BOM, encoding_error, refuse_half_characters, syntax_error
from mcit_lightning.data.readers import Visit, check_file
from mcit_lightning.data.records import CAPTION_PROMPT, Split


class CocoRows:
    """Rows made of a COCO caption file, which is held in memory: its captions lie apart from its images.

    A test split has one row per image, whose reference is the list of its captions; other splits have one row per caption.
    The question is that of InternVL's evaluation, `CAPTION_PROMPT`.

    Args:
        path: the file, for messages.
        images: image id to file name.
        annotations: image id and caption of every annotation.
        split: which split.
    """

    def __init__(self, path: Path, images: dict[Any, str], annotations: list[tuple[Any, str]], split: Split) -> None:
        self.source = str(path)
        self._images = images
        self._ids = list(images)
        self._annotations = annotations
        self._test = split == "test"
        self._captions: dict[Any, list[str]] = {identity: [] for identity in images} if self._test else {}
        for identity, caption in annotations if self._test else ():
            self._captions[identity].append(caption)

    def __len__(self) -> int:
        return len(self._ids) if self._test else len(self._annotations)

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` in the form of the JSON files."""
        if self._test:
            identity = self._ids[index]
            answer = self._captions[identity]
            name = self._images[identity]
            return {"question_id": identity, "image": name, "text": CAPTION_PROMPT, "answer": answer}
        identity, caption = self._annotations[index]
        turns = [{"from": "human", "value": CAPTION_PROMPT}, {"from": "gpt", "value": caption}]
        return {"id": f"{identity}_{index}", "image": self._images[identity], "conversations": turns}


def is_object(path: Path) -> bool:
    """Whether a JSON file has an object on top, as COCO's have, and not a list."""
    with path.open("rb") as file:
        start = file.read(4096)
    return start.removeprefix(BOM).lstrip(b" \t\r\n")[:1] == b"{"


def read_json(path: Path, key: str) -> Any:
    """The content of a whole JSON file.

    Raises:
        ValueError: there is no such file, or it is not UTF-8 or no JSON; names file, line and column.
    """
    check_file(path, key)
    try:
        text = path.read_bytes().removeprefix(BOM).decode("utf-8")
        content = json.loads(text)
        if "\\u" in text:
            refuse_half_characters(content)
        return content
    except UnicodeDecodeError as error:
        raise encoding_error(path, key, error) from None
    except json.JSONDecodeError as error:
        raise syntax_error(path, key, error.msg, error.lineno, error.colno) from None
    except (ValueError, RecursionError) as error:
        raise syntax_error(path, key, str(error), 1, 1) from None


def read_coco(path: Path, key: str, split: Split, visit: Visit) -> CocoRows:
    """Read a COCO caption file, calling `visit(index, row)` for every row.

    Raises:
        ValueError: it is no JSON or no COCO caption file; names the entry, its key and the remedy.
    """
    content = read_json(path, key)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(
            f"{path} ({key}): the top level is not a list, and not COCO's object of `images` and `annotations` either. "
            f"The file must be one JSON array of rows; for one row per line set {key.rsplit('.', 1)[0]}.format to jsonl."
        )
    images = coco_images(content, f"{path} ({key})")
    rows = CocoRows(path, images, coco_captions(content, images, f"{path} ({key})"), split)
    for index in range(len(rows)):
        visit(index, rows.row(index))
    return rows


def coco_images(content: dict[str, Any], source: str) -> dict[Any, str]:
    """Image id to file name, in the order of the file.

    Raises:
        ValueError: an entry of `images` has no id, an id twice, or no file name (`file_name`, or `image` as TextCaps).
    """
    images: dict[Any, str] = {}
    for number, entry in enumerate(_entries(content, "images", source)):
        identity = _identity(entry, "id", source, f"images[{number}]")
        name = entry.get("file_name", entry.get("image"))
        if not isinstance(name, str) or not name:
            raise ValueError(f"{source}: images[{number}] has the file name {name!r}. Give `file_name`.")
        if identity in images:
            raise ValueError(f"{source}: images[{number}].id repeats {identity!r}. Number the images anew.")
        images[identity] = name
    return images


def coco_captions(content: dict[str, Any], images: dict[Any, str], source: str) -> list[tuple[Any, str]]:
    """Image id and caption of every annotation, in the order of the file.

    Raises:
        ValueError: an annotation names an image that is not there, or its caption is no text.
    """
    annotations = []
    for number, entry in enumerate(_entries(content, "annotations", source)):
        identity = _identity(entry, "image_id", source, f"annotations[{number}]")
        if identity not in images:
            raise ValueError(f"{source}: annotations[{number}].image_id is {identity!r}, but `images` has no such id.")
        if not isinstance(entry.get("caption"), str):
            raise ValueError(f"{source}: annotations[{number}].caption is {entry.get('caption')!r}, not a text.")
        annotations.append((identity, entry["caption"]))
    return annotations


def _entries(content: dict[str, Any], name: str, source: str) -> list[dict[str, Any]]:
    entries = content[name]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{source}: `{name}` is not a list of objects. The file is not a COCO caption file.")
    return entries


def _identity(entry: dict[str, Any], key: str, source: str, place: str) -> Any:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{source}: {place}.{key} is {value!r}. An image id is a number or a text.")
    return value
