"""Every field inside of a run's `results.json`, of another type, gone, huge or no number: the report of the run and its
comparison with another one are written, or refused with one message that names the file and the field."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comparison_runs import TASKS, make_run
from fuzz import byte_mutations, content_of, problem, put, strange_places
from test_fuzz import JSONS, YAMLS

from mcit_lightning.__main__ import main
from mcit_lightning.evaluation.results import Results

GONE = object()
HUGE = "a number of 5000 digits"
JUNK: tuple[Any, ...] = (
    GONE,
    None,
    True,
    "x",
    "../../x",
    "\0",
    3,
    -1,
    0.5,
    float("nan"),
    float("inf"),
    1e300,
    10**20,
    HUGE,
    [],
    {},
    [[None]],
    {"x": {"x": None}},
)
Keys = tuple[str | int, ...]


def fields(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """The place of every value inside of a JSON value; of many alike in one mapping or list, the first and the last."""
    if keys:
        yield keys
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in inside if len(inside) < 4 or len(keys) < 1 or isinstance(value, list) else {inside[0], *inside[-2:]}:
        yield from fields(value[key], (*keys, key))


def changed(values: Any, keys: Keys, junk: Any) -> Any:
    """A copy with something else in one place."""
    whole = copy.deepcopy(values)
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    if junk is GONE:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = junk
    return whole


def name(keys: Keys) -> str:
    """`cost[1].row`, as messages write it."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def dumped(values: Any) -> str:
    """JSON text, also of numbers that `json` writes and nothing else reads, and of those too long for it to write."""
    return json.dumps(values).replace(f'"{HUGE}"', "9" * 5000)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """A run whose results have every field that there is, and another one."""
    root = make_run(tmp_path / "runs/full", strategy="dmole")
    results, frozen = Results.load(root), Results.load(make_run(tmp_path / "other", strategy="branchlora"))
    results.freezing = frozen.freezing
    results.modules["language"] = frozen.modules["language"]
    results.held_out.metrics["pope"] = "exact_match"
    for stage in range(4):
        results.held_out.set(stage, "pope", 80.0)
    for task in TASKS:
        results.matrix.set_zero_shot(task, 10.0)
    assert results.routing is not None
    results.routing |= {
        "rejected": dict.fromkeys(TASKS, 5.0),
        "experts": dict.fromkeys(TASKS, 1.5),
        "rejected_per_stage": {stage: dict.fromkeys(TASKS, 5.0) for stage in TASKS},
    }
    for row in results.cost:
        for key, value in vars(row).items():
            if value is None:
                setattr(row, key, 1.5)
    results.notes["data"] = {
        task: {"shortened": 1, "dropped": 0, "train_rows": 9, "test_malformed": 2, "test_rows": 4} for task in TASKS
    }
    results.save(root)
    return root, make_run(tmp_path / "runs/plain")


@pytest.fixture
def read(
    runs: tuple[Path, Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> Callable[[bool], Callable[[], None]]:
    """`read(compare)`: a function that writes the report of the first run, or its comparison with the second."""

    def make(compare: bool) -> Callable[[], None]:
        def report() -> None:
            caplog.clear()
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            several = [str(runs[1]), "--out", str(tmp_path / "out")] if compare else []
            status = main(["report", str(runs[0]), *several])
            errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
            assert status == (2 if errors else 0) and len(errors) <= 1
            (runs[0] / "report.html").unlink(missing_ok=True)
            if errors:
                assert not (tmp_path / "out").exists() and str(runs[0]) in errors[0], errors[0]
                raise ValueError(errors[0])

        return report

    return make


@pytest.mark.parametrize("compare", [False, True], ids=["report", "comparison"])
@pytest.mark.parametrize("every", [97, pytest.param(5, marks=pytest.mark.slow)])
def test_fields_of_results(
    every: int, compare: bool, runs: tuple[Path, Path], read: Callable[[bool], Callable[[], None]]
) -> None:
    file = runs[0] / "results.json"
    values = json.loads(file.read_text())
    values.pop("sha256")
    cases = [(keys, junk) for keys in fields(values) if not name(keys).startswith("summary") for junk in JUNK][::every]
    found = []
    for keys, junk in cases:
        file.write_text(dumped(changed(values, keys, junk)))
        before = content_of(file.parent)
        # a key above or below it may be what is not as it must be
        ends = [f"({name(keys[:length])}{end}" for length in range(1, len(keys) + 1) for end in ":.["]
        ends += ["(tasks: are not those that metrics names"] if keys[0] == "metrics" else []
        said = problem(read(compare), *ends)
        if said or content_of(file.parent) != before:
            found.append(
                f"{name(keys)} is {'gone' if junk is GONE else str(junk)[:40]}: {said or 'a file has changed'}"
            )
    assert len(cases) > 2000 // every
    assert not found, f"{len(found)} of {len(cases)}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "file", ["results.json", *(pytest.param(f, marks=pytest.mark.slow) for f in ("state.json", "config.yaml"))]
)
def test_whole_files_of_a_comparison(
    file: str, runs: tuple[Path, Path], read: Callable[[bool], Callable[[], None]]
) -> None:
    path = runs[0] / file
    whole = path.read_bytes()
    more = [text.encode() for text in (YAMLS if file.endswith("yaml") else JSONS)]
    if file == "state.json":
        more += [json.dumps({"finished": a, "steps": b}).encode() for a in (1, None, False, []) for b in (3, None, {})]
    if file == "config.yaml":
        more += [
            f"{key}: {value}".encode() for key in ("tasks", "data", "tasks: {flags") for value in ("3", "[[]]", "x")
        ]
        more += [
            f"tasks: {{flags: {{test: {value}, images: {value}}}}}".encode() for value in ("3", "[]", "{a: b}", "''")
        ]
    cases = [*byte_mutations(whole, file, 12), *strange_places(path), *((repr(text[:40]), text) for text in more)]
    found = []
    for label, content in cases:
        put(path, content)
        before = content_of(path.parent)
        said = problem(read(True), str(runs[0]))
        if said or content_of(path.parent) != before:
            found.append(f"{label}: {said or 'a file has changed'}")
    assert not found, f"{len(found)} of {len(cases)}:\n" + "\n".join(found)
