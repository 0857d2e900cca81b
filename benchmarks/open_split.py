"""Start time and memory of opening a split: reading, checking and indexing every row of a large annotation file.

    python benchmarks/open_split.py                                   # 500,000 rows, JSON array and JSON lines
    python benchmarks/open_split.py --rows 50000 --kinds jsonl --out runs/open_split.json

Each measurement runs in a process of its own. The table gives the seconds of `open_split` by the clock and of the processor, the
highest resident memory while it ran and what stays resident afterwards, both above the imported packages, and the time of reading
one row at random.
"""

import argparse
import gc
import json
import logging
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

KINDS = ("json", "jsonl", "test")
"""A training JSON array, training JSON lines, and a JSON array of test rows."""
READS = 2000
MIB = 2**20


def write_rows(folder: Path, kind: str, rows: int, images: int) -> Path:
    """A file of `rows` published-style rows that name `images` different files, which are made too (empty)."""
    (folder / "images").mkdir(exist_ok=True)
    for number in range(images):
        (folder / "images" / name_of(number)).touch()
    draw = random.Random(0)
    words = [f"word{number}" for number in range(2000)]
    path = folder / f"{kind}.{'jsonl' if kind == 'jsonl' else 'json'}"
    with path.open("w", encoding="utf-8") as file:
        file.write("" if kind == "jsonl" else "[\n")
        for number in range(rows):
            text = json.dumps(row_of(number, kind, name_of(draw.randrange(images)), draw, words), ensure_ascii=False)
            file.write(text + ("\n" if kind == "jsonl" or number == rows - 1 else ",\n"))
        file.write("" if kind == "jsonl" else "]\n")
    return path


def name_of(number: int) -> str:
    """A file name of the length of COCO's."""
    return f"COCO_train2014_{number:012d}.jpg"


def row_of(number: int, kind: str, image: str, draw: random.Random, words: list[str]) -> dict[str, object]:
    """One row: a question of 8 to 30 words and an answer of 1 to 12, now and then outside ASCII."""
    question = " ".join(draw.choices(words, k=draw.randint(8, 30))) + "?"
    answer = " ".join(draw.choices(words, k=draw.randint(1, 12))) + (" 猫 é" if number % 1000 == 0 else "")
    if kind == "test":
        return {"question_id": f"q{number}", "image": image, "text": question, "answer": answer}
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"vqa_{number}", "image": image, "conversations": turns}


def resident() -> float:
    """MiB resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def measure(path: Path) -> dict[str, float]:
    """Open the split in this process."""
    from mcit_lightning.config import DataConfig, TaskConfig
    from mcit_lightning.data.splits import open_split

    split = "test" if path.stem == "test" else "train"
    task = TaskConfig(**{split: path.name, "images": "images"})
    before, began, used = resident(), time.perf_counter(), time.process_time()
    rows = open_split(DataConfig(root=str(path.parent)), "bench", task, split, seed=0)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gc.collect()
    after = resident()
    draw = random.Random(1)
    began = time.perf_counter()
    for _ in range(READS):
        rows[draw.randrange(len(rows))]
    return {
        "rows": len(rows),
        "file_mib": path.stat().st_size / MIB,
        "open_seconds": seconds,
        "open_cpu_seconds": used,
        "peak_mib": peak - before,
        "held_mib": after - before,
        "read_microseconds": (time.perf_counter() - began) / READS * 1e6,
    }


def main() -> None:
    """Write the files, open each in a fresh process and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--images", type=int, default=80_000, help="different image files that the rows name")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the files are written (default: a temporary folder)"
    )
    parser.add_argument("--out", type=Path, default=None, help="write the numbers there as JSON too")
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    if options.measure is not None:
        sys.stdout.write(json.dumps(measure(options.measure)))
        return
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for kind in options.kinds:
            path = write_rows(Path(folder), kind, options.rows, options.images)
            command = [sys.executable, __file__, "--measure", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            results[kind] = json.loads(done.stdout)
            path.unlink()
    table = Table("file", "rows", "MiB", "open, s", "CPU, s", "peak, MiB", "held, MiB", "one row, µs")
    for kind, values in results.items():
        numbers = [f"{values['rows']:,.0f}", *(f"{value:.1f}" for value in list(values.values())[1:])]
        table.add_row(kind, *numbers)
    Console().print(table)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
