"""Malformed checkpoints with a right checksum and malformed files of a saved model: one message each, nothing is executed."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import byte_mutations, content_of, problem, put, strange_places
from smoke_runs import adapters

from mcit_lightning.assemble import read_projector
from mcit_lightning.backbone import load_backbone
from mcit_lightning.checkpoints import read_checkpoint, write_checkpoint
from mcit_lightning.config import BackboneConfig, ExperimentConfig
from mcit_lightning.loggers import StageTensorBoardLogger
from mcit_lightning.module import MCITModule
from mcit_lightning.quickstart.cache import find_problem
from mcit_lightning.runner import read_for
from mcit_lightning.stages import Stage
from mcit_lightning.validation import build_strategy

JUNK: list[Any] = [
    None,
    3,
    -1,
    0.5,
    "x",
    [],
    {},
    [None],
    {"a": 1},
    torch.zeros(2),
    torch.zeros(3, 0),
    float("nan"),
    True,
]


def broken(content: dict[str, Any], seed: int, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Copies of a checkpoint in which a few values anywhere are replaced, missing or moved to another key."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        copied = copy.deepcopy(content)
        label = []
        for _ in range(draw.randint(1, 2)):
            parts = [
                part for part in _containers({k: copied[k] for k in ("mcit", "state_dict") if k in copied}) if part
            ]
            part = draw.choice([*parts, copied])
            key = draw.choice(list(part) if isinstance(part, dict) else range(len(part)))
            kind = draw.choice(["replace", "replace", "remove", "rename"])
            if kind == "remove":
                del part[key]
            elif kind == "rename" and isinstance(part, dict):
                part[f"{key}x"] = part.pop(key)
            else:
                part[key] = draw.choice(JUNK)
            label.append(f"{kind} {key!r:.40}")
        found.append(("; ".join(label), copied))
    return found


def _containers(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict | list) else []
    return own + [part for item in inner for part in _containers(item)]


def test_checkpoints_whose_content_does_not_fit(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, smoke_root: Path, tmp_path: Path
) -> None:
    config = experiment(uninterrupted)
    good = read_checkpoint(uninterrupted / "stage_02/final.ckpt")
    backbone = load_backbone(BackboneConfig(id=str(smoke_root / "model")))
    module = MCITModule(backbone, build_strategy(config.strategy), config, good["mcit"]["run_id"])
    stage = Stage(index=1, name="shapes", train=("shapes",), row=1)
    path, found = tmp_path / "final.ckpt", []
    cases = broken(good, 0, 90)
    cases += [("no list of keys", {**good, "state_dict": junk}) for junk in JUNK] + [
        ("other", {**good, "mcit": j}) for j in JUNK
    ]
    for label, content in cases:
        write_checkpoint(content, path)
        before = content_of(tmp_path)
        module.reset()
        if (wrong := problem(lambda: read_for(path, stage, module.load_weights), "final.ckpt")) is not None:
            found.append(f"{label}: {wrong}")
        assert content_of(tmp_path) == before
    assert not found, f"{len(found)} of {len(cases)}:\n" + "\n".join(found)
    module.reset()
    read_for(uninterrupted / "stage_02/final.ckpt", stage, module.load_weights)  # nothing of them has stayed
    state = module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in adapters(uninterrupted)["stage_02"].items())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_files_of_a_saved_model(name: str, count: int, smoke_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(smoke_root / "model", folder)
    path = folder / (name if (folder / name).exists() else "processor_config.json")
    whole, found, number = path.read_bytes(), [], 0
    cases: list[tuple[str, Any]] = [
        *list(byte_mutations(whole, name, count))[: count + 4],
        *list(strange_places(path))[:3],
    ]
    for label, content in cases:
        put(path, content)
        before, number = content_of(folder), number + 1
        if (wrong := problem(lambda: load_backbone(BackboneConfig(id=str(folder))), str(folder))) is not None:
            found.append(f"{label}: {wrong}")
        assert content_of(folder) == before
    assert not found, f"{len(found)} of {number}:\n" + "\n".join(found)


def test_a_models_own_code_is_not_run(smoke_root: Path, tmp_path: Path) -> None:
    folder, trace = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(smoke_root / "model", folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(trace)!r})\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"})
    (folder / "config.json").write_text(json.dumps(config))
    assert problem(lambda: load_backbone(BackboneConfig(id=str(folder))), str(folder)) is None
    assert not trace.exists()


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_projectors_are_loaded_without_executing_them(tmp_path: Path) -> None:
    path, trace = tmp_path / "mm_projector.bin", tmp_path / "executed"
    for content in ({"a": Malicious(trace)}, [1, 2], "text", {3: 4}, {"model.mm_projector.0.weight": "x"}):
        torch.save(content, path)
        assert problem(lambda: read_projector(str(path)), "mm_projector.bin") is None
    torch.save({}, path)
    for _, garbled in byte_mutations(path.read_bytes(), "projector", 10):
        path.write_bytes(garbled)
        assert problem(lambda: read_projector(str(path)), "mm_projector.bin") is None
    assert not trace.exists()


def test_damaged_caches_are_made_anew(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    manifest = {"format": 1, "fingerprint": {}, "files": {"a.txt": "0" * 64}}
    whole = json.dumps(manifest).encode()
    more = [json.dumps({**manifest, key: junk}).encode() for key in manifest for junk in (None, 3, "x", [], [[1]])]
    for content in [*(content for _, content in byte_mutations(whole, "manifest", 20)), *more]:
        (tmp_path / "manifest.json").write_bytes(content)
        assert isinstance(find_problem(tmp_path, {}) or "", str)


def test_damaged_event_files_do_not_stop_a_run(uninterrupted: Path, tmp_path: Path) -> None:
    from mcit_lightning.evaluation.results import Results

    results = Results.load(uninterrupted)
    whole = max((uninterrupted / "tensorboard").glob("events.*"), key=lambda path: path.stat().st_size)
    for number, (_, content) in enumerate(byte_mutations(whole.read_bytes(), "events", 8)):
        root = tmp_path / str(number)
        (root / "tensorboard").mkdir(parents=True)
        (root / "tensorboard/events.out.tfevents.1700000000.host.1.0").write_bytes(content)
        logger = StageTensorBoardLogger(root)
        logger.resume_from(2)
        logger.log_metrics({"train/loss": 1.0}, 2)
        logger.log_forgetting(results, 1)
        logger.close()
