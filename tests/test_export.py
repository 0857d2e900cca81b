"""Exports load with plain transformers and PEFT, and compute what the run's model computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mcit_lightning.__main__ import main
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.collate import EvalCollator
from mcit_lightning.data.records import Sample
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.runner import run
from mcit_lightning.trained import Trained, load_trained

peft = pytest.importorskip("peft")

SMALL = ("prepare=null", "data.limit_train=16", "data.limit_test=4", "order=[colours,shapes]", "zero_shot=false")
QUESTION = (("user", "Which colour is this?"),)


@pytest.fixture(scope="module")
def made(smoke_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made(name)`: the directory of a short run of `experiments/<name>.yaml`, made once."""
    folder = tmp_path_factory.mktemp("exported")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            config: ExperimentConfig = load_config(
                experiments_dir() / f"{name}.yaml",
                [*SMALL, f"data.root={smoke_root}", f"out={folder / name}", "trainer.enable_progress_bar=false"],
            )
            run(config)
        return folder / name

    return make


def inputs(trained: Trained) -> dict[str, Any]:
    """A batch of a question about a picture of the smoke tasks."""
    root = Path(trained.config.data.root)
    picture = str(next(root.glob("colours/images/**/*.png")))
    collator = EvalCollator(trained.module.processor, trained.config.prompt)
    return collator([Sample("0", "colours", (picture,), QUESTION)])


def gated_logits(trained: Trained, *tasks: str) -> Tensor:
    """Logits of the run's model with the experts of some tasks, all branches where there is no gate."""
    batch = inputs(trained)
    for layer in trained.module.towers.adapters.values():
        if tasks:
            layer.use([task for task in tasks if task in layer.lora_b])
            layer.gate = None
    with torch.no_grad():
        logits: Tensor = trained.module.model(**batch["inputs"]).logits
    return logits


def plain_logits(model: Any, trained: Trained) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs(trained)["inputs"]).logits
    return logits


def test_one_lora_and_its_projector_load_in_peft(made: Callable[[str], Path], tmp_path: Path) -> None:
    root = made("smoke")
    out = tmp_path / "adapter"
    assert main(["export", str(root), "--to", "peft", "--out", str(out)]) == 0
    trained = load_trained(root)
    base = AutoModelForImageTextToText.from_pretrained(trained.config.backbone.id)
    before = plain_logits(base, trained)
    model = peft.PeftModel.from_pretrained(base, out)
    expected = gated_logits(trained)
    assert not torch.allclose(before, expected, atol=1e-4)
    torch.testing.assert_close(plain_logits(model, trained), expected, atol=1e-5, rtol=1e-4)


def test_every_task_of_dmole_is_an_adapter_and_two_add_up(made: Callable[[str], Path], tmp_path: Path) -> None:
    root = made("dmole_smoke")
    out = tmp_path / "adapters"
    assert main(["export", str(root), "--to", "peft", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["colours", "shapes"]
    trained = load_trained(root)
    base = AutoModelForImageTextToText.from_pretrained(trained.config.backbone.id)
    model = peft.PeftModel.from_pretrained(base, out / "colours", adapter_name="colours")
    model.load_adapter(out / "shapes", adapter_name="shapes")
    for task in ("colours", "shapes"):
        model.set_adapter(task)
        torch.testing.assert_close(plain_logits(model, trained), gated_logits(trained, task), atol=1e-5, rtol=1e-4)
    model.base_model.set_adapter(["colours", "shapes"])
    both = gated_logits(trained, "colours", "shapes")
    torch.testing.assert_close(plain_logits(model, trained), both, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(both, gated_logits(trained, "colours"), atol=1e-4)


@pytest.mark.parametrize(("name", "adapters"), [("smoke", ()), ("dmole_smoke", ("colours", "shapes"))])
def test_merged_weights_need_nothing_but_transformers(
    made: Callable[[str], Path], tmp_path: Path, name: str, adapters: tuple[str, ...]
) -> None:
    root, out = made(name), tmp_path / "merged"
    arguments = [part for adapter in adapters for part in ("--adapter", adapter)]
    assert main(["export", str(root), "--to", "merged", "--out", str(out), *arguments]) == 0
    trained = load_trained(root)
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert {key for key, _ in model.named_parameters()} == {
        key.replace(".base.", ".") for key, _ in trained.module.model.named_parameters() if ".lora_" not in key
    }
    torch.testing.assert_close(plain_logits(model, trained), gated_logits(trained, *adapters), atol=1e-5, rtol=1e-4)
    assert AutoProcessor.from_pretrained(out).image_token == trained.module.processor.image_token


def test_a_task_of_branchlora_is_merged_with_its_fixed_mixture(made: Callable[[str], Path], tmp_path: Path) -> None:
    root = made("branchlora_smoke")
    seen = []
    for task in ("colours", "shapes"):
        out = tmp_path / task
        assert main(["export", str(root), "--to", "merged", "--adapter", task, "--out", str(out)]) == 0
        trained = load_trained(root)
        strategy: Any = trained.module.strategy
        with strategy.merged(trained.module.towers, inputs(trained), task), torch.no_grad():
            expected = trained.module.model(**inputs(trained)["inputs"]).logits
        seen.append(plain_logits(AutoModelForImageTextToText.from_pretrained(out), trained))
        torch.testing.assert_close(seen[-1], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(*seen, atol=1e-4)


def test_what_a_router_mixes_for_every_input_is_refused(
    made: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, out = made("branchlora_smoke"), str(tmp_path / "out")
    assert main(["export", str(root), "--to", "peft", "--out", out]) == 2
    assert main(["export", str(root), "--to", "merged", "--out", out]) == 2
    assert "mixed by a router for every input" in caplog.text and "name one learnt task: colours, shapes" in caplog.text


def test_the_card_says_what_it_is(made: Callable[[str], Path], tmp_path: Path) -> None:
    root, out = made("dmole_smoke"), tmp_path / "adapters"
    assert main(["export", str(root), "--to", "peft", "--out", str(out), "--stage", "colours"]) == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    trained = load_trained(root, "colours")
    assert f"base_model: {trained.config.backbone.id}" in card and "library_name: peft" in card
    assert "tuned on 1 task(s) in this order: colours" in card and "arXiv 2506.11672" in card
    assert trained.results is not None
    assert f"| colours | exact_match | – | {trained.results.matrix.scores[0][0]:.1f} |" in card
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["r"] == trained.config.strategy["rank"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--to", "peft", "--out", "{used}"], "--out: "),
        (["--to", "peft", "--out", "{new}", "--adapter", "colours"], "--adapter: goes with --to merged"),
        (["--to", "merged", "--out", "{new}"], "name one or two of colours, shapes"),
        (["--to", "merged", "--out", "{new}", "--adapter", "colour"], "Did you mean 'colours'"),
        (["--to", "peft", "--out", "{new}", "--stage", "counts"], "--stage: 'counts' is no trained stage"),
    ],
)
def test_wrong_arguments_are_one_line(
    made: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    arguments: list[str],
    named: str,
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("keep me")
    filled = [part.format(used=used, new=tmp_path / "new") for part in arguments]
    assert main(["export", str(made("dmole_smoke")), *filled]) == 2
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert named in message
    assert [path.name for path in used.iterdir()] == ["mine.txt"] and not (tmp_path / "new").exists()


def test_no_run_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["export", str(tmp_path), "--to", "peft", "--out", str(tmp_path / "out")]) == 2
    assert "holds no config.yaml" in caplog.text


def test_chat_answers_and_says_where_it_routed(
    made: Callable[[str], Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = made("dmole_smoke")
    data = Path(load_trained(root).config.data.root)
    picture = str(next(data.glob("colours/images/**/*.png")))
    question = "Which colour is this? Answer with one word."
    assert main(["chat", str(root), "--image", picture, "--ask", question, "--ask", "And now?"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("routed to: ") for line in lines) == 2
    assert main(["chat", str(root), "--image", "nowhere.png", "--ask", "?"]) == 2
    assert "--image: no file nowhere.png" in caplog.text
