"""Run directories made by hand, for tests of comparisons: several methods, seeds and task orders in a few milliseconds."""

import json
from pathlib import Path
from typing import Any

import yaml

from mcit_lightning.evaluation.results import Results

TASKS = ("digits", "flags", "icons")
PATHS = [f"model.vision.layers.{layer}.{name}" for layer in range(2) for name in ("q", "v")]
LANGUAGE = [path.replace("vision", "language") for path in PATHS]


def make_run(
    root: Path,
    *,
    strategy: str = "sequential",
    seed: int = 0,
    tasks: tuple[str, ...] = TASKS,
    learnt: float = 60.0,
    lost: float = 20.0,
    finished: bool = True,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A run that learns each task to `learnt + seed` and loses `lost` of it with every later task.

    Strategies `dmole` and `branchlora` also have what their pages show: a router and a budget, or frozen branches.
    """
    results = Results(f"{strategy}_exp", strategy, "org/model", seed, list(tasks), dict.fromkeys(tasks, "exact_match"))
    rows = range(len(tasks)) if strategy != "joint" else range(len(tasks) - 1, len(tasks))
    for row in rows:
        stage = tasks[row] if strategy != "joint" else "joint"
        cost = results.cost_row(stage, f"stage_{row + 1:02d}", row)
        cost.trainable_params, cost.stored_params = 2_000_000, 3_000_000 + 1000 * len(strategy)
        cost.train_seconds, cost.eval_seconds, cost.peak_memory_bytes = 10.0, 2.0, 2**30
        for column in range(row + 1):
            results.matrix.set(row, tasks[column], max(0.0, learnt + seed - lost * (row - column)))
            _answers(root, results, row, column, right=lost == 0 or row == column)
    if strategy == "dmole":
        _budget(results)
    if strategy in ("dmole", "branchlora"):
        confusion = {task: {task: 9, tasks[0]: 1} if task != tasks[0] else {task: 10} for task in tasks}
        per_stage = {task: 100.0 - 5 * row for row, task in enumerate(tasks)}
        results.routing = {"accuracy": 90.0 + seed, "among": 90.0, "confusion": confusion, "per_stage": per_stage}
    if strategy == "branchlora":
        results.modules = {"language": {path: ["e0", "e1", "e2"] for path in LANGUAGE}}
        results.freezing = {
            tasks[0]: {path: ["e0"] for path in LANGUAGE},
            tasks[1]: {path: ["e0", "e1"] for path in LANGUAGE[:2]},
        }
    root.mkdir(parents=True, exist_ok=True)
    results.save(root)
    (root / "state.json").write_text(json.dumps({"run_id": "x", "steps": [3] * len(rows), "finished": finished}))
    config = {
        "name": f"{strategy}_exp",
        "seed": seed,
        "out": str(root),
        "order": list(tasks),
        "data": {"limit_train": 100},
        "tasks": {task: {"test": f"{task}.json"} for task in tasks},
        "strategy": {"name": strategy, "rank": 4},
        "callbacks": [{"_target_": f"callbacks.{strategy}"}],
        **(settings or {}),
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def make_sweep(root: Path, *, seeds: int = 3, orders: int = 1) -> Path:
    """A sweep of four strategies; the last of them forgets nothing."""
    methods = {"sequential": 30.0, "branchlora": 15.0, "dmole": 0.0, "joint": 0.0}
    for number in range(1, orders + 1):
        tasks = TASKS if number == 1 else TASKS[::-1]
        for name, lost in methods.items():
            for seed in range(seeds):
                folder = root / name / (f"seed{seed}" if number == 1 else f"order{number}/seed{seed}")
                make_run(folder, strategy=name, seed=seed, tasks=tasks, lost=lost)
    return root


def _answers(root: Path, results: Results, row: int, column: int, *, right: bool) -> None:
    """Two test questions of a task after a stage."""
    folder, task = root / "predictions" / f"stage_{row + 1:02d}", results.tasks[column]
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "index": n,
            "prompt": f"<{task}> {n}?",
            "text": "yes" if right else "no",
            "answer": "yes",
            "score": float(right),
        }
        for n in range(2)
    ]
    (folder / f"{task}.jsonl").write_text("".join(f"{json.dumps({**row, 'task': task})}\n" for row in rows))


def _budget(results: Results) -> None:
    """Half of the vision tower's modules in even seeds and three quarters in odd ones, all of the language model's."""
    vision = PATHS[:2] if results.seed % 2 == 0 else PATHS[:3]
    chosen = [*vision, *LANGUAGE]
    results.modules = {"vision": {path: [] for path in PATHS}, "language": {path: ["e"] for path in LANGUAGE}}
    results.allocation = {
        task: {
            "ratios": {"vision": 0.4, "language": 0.6},
            "budget": {"vision": len(vision), "language": len(LANGUAGE)},
            "difficulty": {"vision": 1.0, "language": 2.0},
            "scores": dict.fromkeys([*PATHS, *LANGUAGE], 1.0),
            "ranks": dict.fromkeys(chosen, 4),
        }
        for task in results.tasks
    }
