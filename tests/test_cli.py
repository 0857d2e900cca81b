"""The command line: exit status and one line for what went wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mcit_lightning.__main__ import main
from mcit_lightning.commands import COMMANDS, find_command


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


def test_help_lists_every_command_and_loads_nothing_slow() -> None:
    """In a process of its own: here torch is loaded already."""
    ask = (
        "import sys\nfrom mcit_lightning.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'lightning', 'omegaconf'} & set(sys.modules), 'slow'"
    )
    shown = {}
    for words in (("--help",), *((*command.words, "--help") for command in COMMANDS[1:]), ("--version",)):
        done = subprocess.run([sys.executable, "-c", ask, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        shown[words] = done.stdout
    for command in COMMANDS:
        assert f"{command.name} {command.usage}" in shown[("--help",)] and command.help in shown[("--help",)]
        if command.words:
            assert f"usage: {command.name} " in shown[(*command.words, "--help")]
    assert "--rows N" in shown[("data", "sample", "--help")] and "exit status" in shown[("data", "verify", "--help")]


@pytest.mark.parametrize(("words", "hint"), [(["data", "verfy"], "'verify'"), (["data"], "sample, verify")])
def test_an_unknown_command_is_named_with_the_nearest(
    words: list[str], hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(words) == 2
    assert hint in caplog.text and "--help" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words", "rest"),
    [
        (["smoke", "a=b"], (), ["smoke", "a=b"]),
        (["data", "verify", "x"], ("data", "verify"), ["x"]),
        (["score", "x"], ("score",), ["x"]),
        (["data.yaml"], (), ["data.yaml"]),
        ([], (), []),
    ],
)
def test_a_command_is_found_by_its_words(arguments: list[str], words: tuple[str, ...], rest: list[str]) -> None:
    command, left = find_command(arguments)
    assert (command.words, left) == (words, rest)


def test_options_and_overrides_may_be_mixed() -> None:
    parser = find_command(["data", "verify"])[0].parser()
    options = parser.parse_intermixed_args(["smoke", "--lengths", "3", "seed=1", "--images", "0", "data.root=x"])
    assert options.overrides == ["seed=1", "data.root=x"] and (options.lengths, options.images) == (3, 0)
    for wrong in (["--lengths", "-1"], ["--samples", "0"], ["--workers", "many"]):
        with pytest.raises(SystemExit) as stop:
            main(["data", "verify", "smoke", *wrong])
        assert stop.value.code == 2


def test_only_a_run_says_that_it_continues(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from mcit_lightning.commands import data_sample, run

    def stop(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_sample, "command", stop)
    monkeypatch.setattr(run, "command", stop)
    assert main(["data", "sample", "smoke", "--rows", "1", "--out", "x"]) == 130
    assert "interrupted" in caplog.text and "continues" not in caplog.text
    assert main(["smoke"]) == 130 and "continues the run" in caplog.text


def test_too_little_gpu_memory_is_one_line_with_remedies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from mcit_lightning.commands import run

    def full(options: object) -> int:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"
        )

    monkeypatch.setattr(run, "command", full)
    assert main(["smoke"]) == 1
    assert "CUDA out of memory; in training lower data.batch_size" in caplog.text and "Tried" not in caplog.text


def test_predictions_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"question_id": str(n), "text": text, "answer": "red"} for n, text in enumerate(("red", "Red.", "blue", ""))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main(["score", str(tmp_path / "rows.jsonl"), "--metric", "exact_match"]) == 0
    assert "50.00" in capsys.readouterr().out
    assert main(["score", str(tmp_path / "none.jsonl"), "--metric", "exact_match"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM")]
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
