"""Checkpoint files: the checksum, what is done about damage, and that nothing in a file is executed."""

import errno
import io
import logging
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill
import pytest
import torch
from smoke_runs import assert_same_run

from mcit_lightning.checkpoints import FOOTER, DamagedCheckpointError, check_seal, read_checkpoint, write_checkpoint
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.runner import run

CONTENT: dict[str, Any] = {"mcit": {"format": 1}, "state_dict": {"w": torch.arange(5000.0)}, "global_step": 3}


def stopped_at(point: tuple[Any, ...], config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill, "POINT", point)
    with pytest.raises(kill.Killed):
        run(config)


def test_what_is_written_is_read_also_by_torch_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(CONTENT, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["w"], CONTENT["state_dict"]["w"])
    for mapped in (False, True):
        assert torch.load(path, weights_only=True, mmap=mapped)["global_step"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


def test_every_cut_and_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path, draw = tmp_path / "a.ckpt", random.Random(0)
    write_checkpoint(CONTENT, path)
    whole = path.read_bytes()
    for _ in range(60):
        path.write_bytes(whole[: draw.randrange(len(whole))])
        with pytest.raises(DamagedCheckpointError, match=r"a\.ckpt: is damaged: it has no checksum at its end"):
            read_checkpoint(path)
        broken = bytearray(whole)
        broken[draw.choice([draw.randrange(len(whole)), len(whole) - draw.randint(1, FOOTER)])] ^= 1 << draw.randrange(
            8
        )
        path.write_bytes(broken)
        with pytest.raises(DamagedCheckpointError, match=r"a\.ckpt: is damaged"):
            read_checkpoint(path)
    path.write_bytes(whole)
    check_seal(path)


def test_a_broken_disk_is_damage_and_a_missing_permission_is_not(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def __init__(self, code: int) -> None:
            super().__init__(b"x" * 1000)
            self.code = code

        def read(self, *size: Any) -> bytes:
            raise OSError(self.code, os.strerror(self.code))

    with pytest.raises(DamagedCheckpointError, match="Input/output error"):
        check_seal(tmp_path / "a.ckpt", Broken(errno.EIO))
    with pytest.raises(PermissionError):
        check_seal(tmp_path / "a.ckpt", Broken(errno.EACCES))


@pytest.mark.parametrize("room", [0, 10_000])
def test_a_full_disk_leaves_the_old_file(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(CONTENT, path)
    before, opened = path.read_bytes(), Path.open

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            if self.tell() + len(content) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
            return super().write(content)

    monkeypatch.setattr(Path, "open", lambda self, mode="r": Full(self, "w") if mode == "wb" else opened(self, mode))
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(CONTENT, path)
    monkeypatch.undo()
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


class Malicious:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("environment", ["", "1"])
def test_a_malicious_checkpoint_is_refused_and_not_executed(
    form: str, environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", environment)  # which undoes torch's default, not ours
    trace, path = tmp_path / "executed", tmp_path / "final.ckpt"
    content = {**CONTENT, "payload": Malicious(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(DamagedCheckpointError):
        read_checkpoint(path)
    sealed = tmp_path / "sealed.ckpt"
    write_checkpoint(content, sealed)  # with the right checksum
    if form == "torch":
        with pytest.raises(
            ValueError, match=r"sealed\.ckpt: cannot be read as a checkpoint.*nothing in it was executed"
        ):
            read_checkpoint(sealed)
    assert not trace.exists()
    if environment == "":
        torch.load(sealed, weights_only=False)
        assert trace.exists()  # it would have been


def test_a_malicious_checkpoint_in_a_run_is_one_error(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path / "run", "zero_shot=false")
    stopped_at(("batch", 0, 2), config, monkeypatch)
    last, trace = tmp_path / "run/stage_01/last.ckpt", tmp_path / "executed"
    write_checkpoint({**read_checkpoint(last), "payload": Malicious(trace)}, last)
    with pytest.raises(ValueError, match=r"last\.ckpt: cannot be read as a checkpoint.*delete it"):
        run(config)
    assert not trace.exists() and last.exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "both"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    damage: str,
    experiment: Callable[..., ExperimentConfig],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    config = experiment(tmp_path / "run")
    stopped_at(("batch", 1, 6), config, monkeypatch)
    folder = tmp_path / "run/stage_02"
    last, previous = folder / "last.ckpt", folder / "previous.ckpt"
    steps = [read_checkpoint(path)["global_step"] for path in (last, previous)]
    assert steps == [6, 4]
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2] if damage != "flipped" else content[:999] + b"?" + content[1000:])
    if damage == "both":
        previous.write_bytes(b"")
    broken = last.read_bytes()
    run(config)
    assert "stage_02/last.ckpt: is damaged" in caplog.text and "kept as last.ckpt.damaged" in caplog.text
    assert (folder / "last.ckpt.damaged").read_bytes() == broken
    assert ("continues at step 4" in caplog.text) == (damage != "both")
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_damaged_final_checkpoint_makes_its_stage_be_done_again(
    experiment: Callable[..., ExperimentConfig],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = experiment(tmp_path / "run")
    stopped_at(("batch", 2, 0), config, monkeypatch)
    final = tmp_path / "run/stage_02/final.ckpt"
    final.write_bytes(final.read_bytes()[:-1])
    kept = (tmp_path / "run/stage_01/final.ckpt").stat().st_mtime_ns
    run(config)
    assert "stage_02/final.ckpt: is damaged" in caplog.text and "done again" in caplog.text
    assert (tmp_path / "run/stage_01/final.ckpt").stat().st_mtime_ns == kept
    assert_same_run(uninterrupted, tmp_path / "run")


def test_what_the_run_does_not_need_may_be_damaged(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path / "run")
    stopped_at(("batch", 2, 3), config, monkeypatch)
    for stage in (1, 2):  # the third stage goes on from a checkpoint of its own
        (tmp_path / f"run/stage_0{stage}/final.ckpt").write_bytes(b"gone")
    run(config)
    for path in ("predictions/stage_03/colours.jsonl", "accuracy_matrix.csv"):
        assert (tmp_path / "run" / path).read_text() == (uninterrupted / path).read_text()
