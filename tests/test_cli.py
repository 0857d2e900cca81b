"""The command line: exit status and one line for what went wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mcit_lightning.__main__ import main


def test_bad_input_is_one_line_and_status_2(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["smoke", "optim.lrr=1"]) == 2
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and "optim.lrr" in errors[0] and "'lr'" in errors[0]
    assert "Traceback" not in capfd.readouterr().err


def test_a_full_disk_is_one_line_and_status_3(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    import errno

    import mcit_lightning.rundir as rundir

    def full(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(rundir, "write_atomic", full)
    assert main(["smoke", f"out={tmp_path / 'run'}"]) == 3
    assert "No space left on device" in caplog.text and "the run continues" in caplog.text


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as stop:
            main([flag])
        assert stop.value.code == 0
    assert "mcit-lightning" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_say_that_the_run_continues(
    smoke_root: Path, tmp_path: Path, sent: signal.Signals, status: int, word: str
) -> None:
    root = Path(__file__).parent.parent
    arguments = [
        f"data.root={smoke_root}",
        "prepare=null",
        f"out={tmp_path / 'run'}",
        "trainer.enable_progress_bar=false",
    ]
    command = [
        sys.executable,
        "-m",
        "mcit_lightning",
        "smoke",
        *arguments,
        "tasks.shapes.epochs=300",
        "trainer.accelerator=cpu",
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (tmp_path / "run/stage_02/last.ckpt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    assert f"{word}; the same command continues the run" in output and "Traceback" not in output
