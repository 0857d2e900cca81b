"""Evaluation of a three-task sequence against the way in which published code bases evaluate: one sample at a time, and the
model loaded anew for every task after every stage.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --cpu-time --threads 1     # on a machine that is busy with other work

The framework's time is that of the evaluations of an ordinary run (six cells, loaders, scores, files and report included). The
reference loads model, processor and adapters for each cell and calls transformers' `generate` with a KV cache, batch size 1. It
also says for how many rows both gave the same answer: with a random model in bfloat16 the best two tokens are often equal to the
last bit, so this need not be all of them (the tests compare tokens in float32).
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import workload
from ratios import in_turn, parser, prepare, ratio_row, report

from mcit_lightning.backbone import load_backbone
from mcit_lightning.checkpoints import read_checkpoint
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.engine import resolve_precision
from mcit_lightning.evaluation.predictions import read_predictions
from mcit_lightning.module import MCITModule
from mcit_lightning.validation import build_strategy

Answers = dict[tuple[int, str, int], str]


class Sequence:
    """A run whose training is a step per task, and what its evaluations found."""

    def __init__(self, folder: Path, strategy: str, clock: Callable[[], float]) -> None:
        self.folder, self.strategy, self.clock, self.answers = folder, strategy, clock, Answers()

    def config(self, out: Path, *overrides: str) -> ExperimentConfig:
        """Three tasks, all evaluated after each that is trained."""
        return workload.experiment(self.folder, out, f"strategy={self.strategy}", "data.limit_train=8", *overrides)

    def framework(self, *overrides: str) -> float:
        """Seconds of all evaluations of a run."""
        workload.CLOCK[0] = self.clock
        out = self.folder / "run"
        config = self.config(out, *overrides)
        config.overwrite = True
        workload.quiet_run(config)
        for row in range(len(config.order)):
            for task in config.order[: row + 1]:
                for index, found in read_predictions(out, f"stage_{row + 1:02d}", task).items():
                    self.answers[row, task, index] = found["text"]
        begins = [at for name, at in workload.EVENTS if name == "setup test"]
        ends = [at for name, at in workload.EVENTS if name == "teardown test"]
        return sum(ends) - sum(begins)

    def one_by_one(self, answers: Answers, *, reload: bool) -> float:
        """Seconds of the same cells, one sample at a time."""
        config = self.config(self.folder / "run")
        config.data.eval_batch_size = 1
        begin = self.clock()
        module: MCITModule | None = None
        for row in range(len(config.order)):
            checkpoint = read_checkpoint(self.folder / "run" / f"stage_{row + 1:02d}" / "final.ckpt")
            for column, task in enumerate(config.order[: row + 1]):
                if module is None or reload:
                    module = self._load(config)
                if column == 0 or reload:
                    module.load_weights(checkpoint)
                    module.eval()
                self._cell(config, module, row, task, answers)
        return self.clock() - begin

    def _load(self, config: ExperimentConfig) -> MCITModule:
        backbone = load_backbone(config.backbone, precision=resolve_precision(config.trainer))
        return MCITModule(backbone, build_strategy(config.strategy), config)

    def _cell(self, config: ExperimentConfig, module: MCITModule, row: int, task: str, answers: Answers) -> None:
        stream = ContinualDataModule(config, module.processor, module.strategy.stages(config.order))
        stream.evaluate_only([task])
        end = stream.train_collator.encoder.end_id
        enabled = resolve_precision(config.trainer) == "bf16-mixed"
        for batch in stream.test_dataloader()[0]:
            with (
                torch.no_grad(),
                torch.autocast("cpu", torch.bfloat16, enabled=enabled),
                module.strategy.routing(module.towers, batch, None),
            ):
                tokens = module.model.generate(  # type: ignore[operator]
                    **batch["inputs"], do_sample=False, max_new_tokens=config.data.max_new_tokens, eos_token_id=end
                )[:, batch["inputs"]["input_ids"].shape[1] :]
            (text,) = module.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            answers[row, task, batch["index"][0]] = text.strip()


def measure(options: argparse.Namespace) -> None:
    """Run the benchmark."""
    clock = prepare(options)
    strategy = "{name: sequential, rank: 16, alpha: 32}"
    with tempfile.TemporaryDirectory() as name:
        folder = workload.build(Path(name), layers=options.layers, train=8, test=options.rows)
        sequence, reference = Sequence(folder, strategy, clock), Answers()
        sequence.framework()  # leaves the checkpoints that the others read
        variants = {
            "framework": sequence.framework,
            "framework, features kept": lambda: sequence.framework("data.feature_cache=always"),
            "one by one, reloading": lambda: sequence.one_by_one(reference, reload=True),
            "one by one": lambda: sequence.one_by_one(reference, reload=False),
        }
        samples = in_turn(variants, options.rounds)
    same = sum(text == reference.get(key) for key, text in sequence.answers.items()) / len(sequence.answers)
    rows = [
        ratio_row(
            "framework",
            "one by one, reloading",
            samples,
            invert=True,
            name="evaluation throughput, 3 tasks",
            base="batch size 1, model loaded per cell",
            target=">= 5",
            note=f"{same:.0%} same answers",
        ),
        ratio_row(
            "framework",
            "one by one",
            samples,
            invert=True,
            name="evaluation throughput, 3 tasks",
            base="batch size 1, model loaded once",
        ),
        ratio_row(
            "framework",
            "framework, features kept",
            samples,
            name="evaluation, 3 tasks",
            base="with data.feature_cache=always",
            note="above 1: the cache pays",
        ),
    ]
    report(f"evaluation, {options.layers} decoder layers, {options.rows} rows a task, 6 cells", rows, options)


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--layers", type=int, default=30, help="of the decoder; SmolLM2-135M has 30")
    arguments.add_argument("--rows", type=int, default=32, help="test rows per task")
    measure(arguments.parse_args())
