"""The adapter benchmark runs, and the memory that it counts is what the layer promises. Its times are not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def test_memory_of_the_variants(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    options = "--shapes smollm2 --layers 1 --rounds 1 --tokens 1 --threads 1 --batch-size 2 --length 64"
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/adapters.py"), *options.split(), "--json", str(path)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    rows = {row["adapter"]: row for row in json.loads(path.read_text())["rows"]}
    assert {"lora", "lora-equal", "moelora", "branchlora", "loop"} <= rows.keys()
    equal, branch = rows["lora-equal"], rows["branchlora"]
    assert abs(equal["trainable"] / branch["trainable"] - 1) < 0.03
    for what in ("peak_bytes", "saved_bytes"):
        assert branch[what] <= 1.05 * equal[what]
        assert rows["moelora"][what] <= 1.05 * rows["lora"][what] < rows["loop"][what]
    assert all(row["step_seconds"] > 0 and row["decode_seconds"] > 0 for row in rows.values())
