"""Evaluation of a three-task sequence against the way in which published code bases evaluate: one sample at a time, and the
model loaded anew for every task after every stage.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --cpu-time --threads 1     # on a machine that is busy with other work

The framework's time is that of the evaluations of an ordinary run (six cells, loaders, scores, files and report included). The
reference loads model, processor and adapters for each cell and calls transformers' `generate` with a KV cache, batch size 1.
Published scripts are processes of their own, which import everything anew: that is not counted. With the model loaded once, it
would be the same time without loading five of the six times. A last group of rows says which parts of a sample's evaluation a
batch makes faster.

Prompts are a picture of 36 tokens and a question of some 20 to 30. The answers of two tasks have 4 tokens, as class names and
short answers to questions do; those of the second, which fills two of the six cells, have 16, as captions do (in UCIT two of six
tasks are captions): no end is taken before. Every row has a picture of its own. Batches have the 16 rows that are the default
(`data.eval_batch_size`). The reference answers a seeded sample of each cell, every fourth row; its time without loading counts
four times.

It also says for how many of those rows both gave the same answer: with a random model in bfloat16 the best two tokens are often
equal to the last bit, so this need not be all of them (the tests compare tokens in float32).
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import workload
from ratios import in_turn, parser, prepare, ratio_row, report

from mcit_lightning.config import DataConfig, ExperimentConfig
from mcit_lightning.engine import resolve_precision
from mcit_lightning.evaluation.predictions import read_predictions
from mcit_lightning.generation import generate_tokens
from mcit_lightning.module import MCITModule

Answers = dict[tuple[int, str, int], str]
BATCH = DataConfig.eval_batch_size
LENGTHS = dict(zip(workload.TASKS, (4, 16, 4), strict=True))
"""Tokens of an answer to each task."""
PARTS = {
    "batch": "making a row of a batch",
    "picture": "vision tower, per row",
    "prefill": "prefill, per row",
    "decoding": "decoding, per row and token",
}


class Sequence:
    """A run whose training is a step per task, and what its evaluations found."""

    def __init__(self, folder: Path, strategy: str, clock: Callable[[], float]) -> None:
        self.folder, self.strategy, self.clock, self.answers = folder, strategy, clock, Answers()

    def config(self, out: Path, *overrides: str) -> ExperimentConfig:
        """Three tasks, all evaluated after each that is trained."""
        settings = (
            "optim.lr=1e-6",  # what is learnt in a step would make all answers the same
            f"data.eval_batch_size={BATCH}",
            *(
                f"tasks.{task}.{bound}_new_tokens={length}"
                for task, length in LENGTHS.items()
                for bound in ("min", "max")
            ),
        )
        return workload.experiment(
            self.folder, out, f"strategy={self.strategy}", "data.limit_train=8", *settings, *overrides
        )

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

    def one_by_one(self, answers: Answers, rows: int, share: int) -> tuple[float, float]:
        """Seconds of the same cells one sample at a time, with a model loaded for each; and those of loading.

        Args:
            answers: gets the answers.
            rows: of each cell, a seeded sample.
            share: they are one in so many; their seconds count so often.
        """
        config = self.config(self.folder / "run", f"data.limit_test={rows}")
        config.data.eval_batch_size = 1
        begin, loading = self.clock(), 0.0
        for row in range(len(config.order)):
            for task in config.order[: row + 1]:
                since = self.clock()
                module = workload.trained_module(config, row + 1)
                loading += self.clock() - since
                self._cell(config, module, row, task, answers)
        return loading + share * (self.clock() - begin - loading), loading

    def parts(self, size: int) -> dict[str, float]:
        """Seconds per row of the parts of an evaluation in batches of a size, over one batch's rows of the long answers' task."""
        config, task = self.config(self.folder / "run"), max(LENGTHS, key=LENGTHS.__getitem__)
        config.data.eval_batch_size = size
        module = workload.trained_module(config, len(LENGTHS))
        loader = iter(workload.evaluation_stream(config, module, task).test_dataloader()[0])
        batches = []
        found = {"batch": self._timed(lambda: batches.extend(next(loader) for _ in range(BATCH // size)))}
        tower = module.model.get_submodule(module.towers.vision)
        with (
            torch.inference_mode(),
            module.strategy.routing(module.towers, batches[0], None),
            module.towers.generating(),
        ):

            def generate(tokens: int) -> None:
                for batch in batches:
                    generate_tokens(module.model, batch["inputs"], tokens, end_id=-1)

            def see() -> None:
                for batch in batches:
                    tower(batch["inputs"]["pixel_values"], output_hidden_states=True)

            generate(1)  # warm up
            found["picture"] = self._timed(see)
            first = self._timed(lambda: generate(1))
            found["decoding"] = (self._timed(lambda: generate(LENGTHS[task])) - first) / (LENGTHS[task] - 1)
            found["prefill"] = first - found["picture"]
        return {part: seconds / BATCH for part, seconds in found.items()}

    def _timed(self, run: Callable[[], object]) -> float:
        begin = self.clock()
        run()
        return self.clock() - begin

    def _cell(self, config: ExperimentConfig, module: MCITModule, row: int, task: str, answers: Answers) -> None:
        stream = workload.evaluation_stream(config, module, task)
        end = stream.train_collator.encoder.end_id
        enabled = resolve_precision(config.trainer) == "bf16-mixed"
        for batch in stream.test_dataloader()[0]:
            with (
                torch.no_grad(),
                torch.autocast("cpu", torch.bfloat16, enabled=enabled),
                module.strategy.routing(module.towers, batch, None),
            ):
                tokens = module.model.generate(  # type: ignore[operator]
                    **batch["inputs"],
                    do_sample=False,
                    min_new_tokens=LENGTHS[task],
                    max_new_tokens=LENGTHS[task],
                    eos_token_id=end,
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
        loading: list[float] = []

        def one_by_one() -> float:
            seconds, loads = sequence.one_by_one(reference, options.rows // options.share, options.share)
            loading.append(loads)
            return seconds

        variants = {
            "framework": sequence.framework,
            "framework, features kept": lambda: sequence.framework("data.feature_cache=always"),
            "one by one, reloading": one_by_one,
        }
        samples = in_turn(variants, options.rounds)
        parts = [(sequence.parts(BATCH), sequence.parts(1)) for _ in range(options.rounds)]
    cells = len(LENGTHS) * (len(LENGTHS) + 1) // 2
    samples["one by one"] = [
        seconds - loads * (cells - 1) / cells
        for seconds, loads in zip(samples["one by one, reloading"], loading, strict=True)
    ]
    assert all(sequence.answers.values()), "an answer is empty: it has ended early, or its tokens have no text"
    same = sum(sequence.answers[key] == text for key, text in reference.items()) / len(reference)
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
    for part, name in PARTS.items():
        pairs = {"batched": [batch[part] for batch, _ in parts], "single": [one[part] for _, one in parts]}
        rows.append(ratio_row("batched", "single", pairs, name=f"evaluation, {name}", base="batch size 1"))
    report(f"evaluation, {options.layers} decoder layers, {options.rows} rows a task, 6 cells", rows, options)


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--layers", type=int, default=30, help="of the decoder; SmolLM2-135M has 30")
    arguments.add_argument("--rows", type=int, default=64, help="test rows per task")
    arguments.add_argument("--share", type=int, default=4, help="the reference answers one row in so many")
    given = arguments.parse_args()
    if given.rows < BATCH or given.rows % given.share:
        arguments.error(f"--rows must be at least {BATCH}, and a multiple of --share ({given.share})")
    measure(given)
