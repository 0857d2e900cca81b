"""The stream of tasks as a Lightning datamodule: a pointer to the current stage and the loaders that belong to it."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from mcit_lightning.config import ExperimentConfig, TaskConfig
from mcit_lightning.data.collate import EvalCollator, ReadsSamples, TrainCollator
from mcit_lightning.data.cuts import CutLog
from mcit_lightning.data.records import Sample, Split, did_you_mean
from mcit_lightning.data.replay import Replay, ReplaySampler, kept_rows
from mcit_lightning.data.sampler import EvalSlice, StageLoader, StageSampler, derive_seed, init_worker
from mcit_lightning.data.splits import TaskSplit, open_split
from mcit_lightning.stages import Stage

logger = logging.getLogger(__name__)


class StageData(Dataset[Sample]):
    """Several splits as one dataset, each as often as the stage repeats it.

    Args:
        splits: the parts.
        repeats: how often each part appears.
        replayed: samples of other splits behind them: a split and the positions in it.
    """

    def __init__(
        self,
        splits: Sequence[TaskSplit],
        repeats: Sequence[int],
        replayed: Sequence[tuple[TaskSplit, np.ndarray]] = (),
    ) -> None:
        own = [(split, np.tile(np.arange(len(split)), times)) for split, times in zip(splits, repeats, strict=True)]
        parts = [*own, *replayed]
        self._splits = [split for split, _ in parts]
        self._part = np.concatenate([np.full(len(rows), number) for number, (_, rows) in enumerate(parts)])
        self._row = np.concatenate([rows for _, rows in parts])
        self.lengths = np.concatenate([np.asarray(split.lengths)[rows] for split, rows in parts])
        self.own = sum(len(rows) for _, rows in own)
        """How many samples are not replayed; they come first."""

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> Sample:
        return self._splits[self._part[index]][int(self._row[index])]


class ContinualDataModule(L.LightningDataModule):
    """Hands out the loaders of one stage at a time.

    Everything is read and checked at construction; pixels are read by the loaders only. The module shards data over
    processes itself (see `StageSampler`, `EvalSlice`), so the trainer needs `use_distributed_sampler=False`.

    Args:
        config: the experiment.
        processor: the backbone's processor.
        stages: the run's stages.

    Raises:
        ValueError: a file, row or image is missing or malformed.
    """

    def __init__(self, config: ExperimentConfig, processor: Any, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.config = config
        self.processor = processor
        self.stages = list(stages)
        # With very few rows a process may have none of one task; there are no collectives inside an evaluation loop.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.train_collator = TrainCollator(processor, config.prompt, max_length=config.data.max_length)
        self.train_collator.keys = config.data.feature_cache != "never"
        self._index = 0
        self._explicit: list[str] | None = None
        self.replay: Callable[[Stage, Mapping[str, int]], Replay] | None = None
        """Says which samples of earlier tasks a stage trains on; `setup` takes the strategy's."""
        self._splits: dict[tuple[str, Split], TaskSplit] = {}
        self.check()
        self._cuts = self._new_cuts()
        self._warn_of_batch_sizes()

    def check(self) -> None:
        """Open every split that the run needs: training data of trained tasks, tests of all, validation where named.

        Raises:
            ValueError: something is missing or malformed.
        """
        trained = {task for stage in self.stages for task in stage.train}
        for task in (*self.config.order, *self.config.held_out):
            config = self._task(task)
            splits: list[Split] = ["test"]
            if task in trained:
                splits += ["train", "val"] if config.val else ["train"]
            for split in splits:
                if (task, split) not in self._splits:
                    self._splits[task, split] = open_split(self.config.data, task, config, split, self.config.seed)
            self.max_new_tokens(task)

    def setup(self, stage: str) -> None:
        """Ask the module's strategy what it wants to know of the samples, and what it replays.

        Raises:
            ValueError: what it replays does not fit into the batches.
        """
        strategy = getattr(self.trainer.lightning_module, "strategy", None) if self.trainer else None
        self.replay = getattr(strategy, "replay", None)
        for each in self.stages:
            self._replay(each).per_batch(self.batch_size(each))
        self.train_collator.reader = strategy.sample_reader() if isinstance(strategy, ReadsSamples) else None

    @property
    def stage(self) -> Stage:
        """The current stage; set it by index. Setting it ends `evaluate_only`."""
        return self.stages[self._index]

    @stage.setter
    def stage(self, index: int) -> None:
        if not 0 <= index < len(self.stages):
            raise ValueError(f"There is no stage {index}; the run has {len(self.stages)}, counted from 0.")
        self._index = index
        self._explicit = None
        self._cuts = self._new_cuts()

    @property
    def task(self) -> str:
        """Name of the current stage: the task's, or `joint`."""
        return self.stage.name

    @property
    def test_tasks(self) -> list[str]:
        """Tasks whose test loaders come next: those of the stream in their order, then the held-out ones."""
        if self._explicit is not None:
            return list(self._explicit)
        evaluate = self.stage.evaluate
        if isinstance(evaluate, tuple):
            return [*evaluate, *self.config.held_out]
        everything = "all" in (evaluate, self.config.evaluate)
        tasks = self.config.order if everything else self.config.order[: self.stage.row + 1]
        return [*tasks, *self.config.held_out]

    def evaluate_only(self, tasks: Iterable[str] | None) -> None:
        """Test these tasks instead of the stage's own, until the stage is set again; None returns to the stage's own.

        Raises:
            ValueError: a task is neither in `order` nor in `held_out`.
        """
        chosen = None if tasks is None else list(tasks)
        for task in chosen or []:
            known = [*self.config.order, *self.config.held_out]
            if task not in known:
                raise ValueError(f"Unknown task {task!r}. In `order`: {', '.join(known)}.{did_you_mean(task, known)}")
        self._explicit = chosen

    def split(self, task: str, split: Split) -> TaskSplit:
        """The samples of a split, for probes and replay buffers."""
        return self._splits[task, split]

    def epochs(self, stage: Stage) -> int:
        """Epochs of a stage: the task's own; 1 for several tasks, whose rows then repeat within the epoch instead."""
        return self._task(stage.train[0]).epochs if len(stage.train) == 1 else 1

    def batch_size(self, stage: Stage) -> int:
        """Samples per device and step: the tasks' own if they agree, else `data.batch_size`."""
        sizes = {self._task(task).batch_size or self.config.data.batch_size for task in stage.train}
        return sizes.pop() if len(sizes) == 1 else self.config.data.batch_size

    def max_new_tokens(self, task: str) -> int:
        """Most tokens of an answer to the task."""
        own = self._task(task).max_new_tokens
        return self.config.data.max_new_tokens if own is None else own

    def metric(self, task: str) -> str:
        """Name of the task's metric."""
        return self._task(task).metric

    def train_dataloader(self) -> StageLoader:
        """The current stage's training tasks, and what the strategy replays, mixed. Resumes inside an epoch."""
        stage = self.stage
        # Several tasks in one epoch: each sample as often as the sequence of stages would show it.
        repeats = [1 if len(stage.train) == 1 else self._task(task).epochs for task in stage.train]
        replay = self._replay(stage)
        replayed = []
        for task, count in replay.rows.items():
            split = self._splits[task, "train"]
            replayed.append((split, kept_rows(len(split), count, seed=self.config.seed, task=task)))
        dataset = StageData([self._splits[task, "train"] for task in stage.train], repeats, replayed)
        options: dict[str, Any] = {
            "batch_size": self.batch_size(stage),
            "rank": self._rank,
            "world_size": self._world_size,
            "seed": derive_seed(self.config.seed, "train", stage.index),
            "group_by_length": self.config.data.group_by_length,
        }
        per_batch = replay.per_batch(options["batch_size"])
        if per_batch:
            options.update(own=dataset.own, replayed=per_batch)
        sampler = (ReplaySampler if per_batch else StageSampler)(dataset.lengths, **options)
        return StageLoader(
            dataset,
            sampler,
            observer=self._cuts,
            epoch_batches=self._epoch_batches(-(-len(sampler) // sampler.batch_size)),
            collate_fn=self.train_collator,
            **self._loader_options(),
        )

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader over the validation rows of the stage's tasks; none if no task has any."""
        splits = [self._splits[task, "val"] for task in self.stage.train if (task, "val") in self._splits]
        if not splits:
            return []
        dataset = StageData(splits, [1] * len(splits))
        self._check_share(len(dataset), "validation")
        return [self._eval_loader(dataset, dataset.lengths, self.train_collator)]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """One loader per test task, in the order of `test_tasks`."""
        rows = [len(self._splits[task, "test"]) for task in self.test_tasks]
        if rows:
            self._check_share(max(rows), "test")
        loaders = []
        for task in self.test_tasks:
            own = self._task(task).prompt_suffix
            suffix = self.config.prompt.suffix if own is None else own
            split = self._splits[task, "test"]
            collator = EvalCollator(self.processor, self.config.prompt, suffix=suffix)
            collator.reader, collator.keys = self.train_collator.reader, self.train_collator.keys
            loaders.append(self._eval_loader(split, split.lengths, collator))
        return loaders

    def _replay(self, stage: Stage) -> Replay:
        earlier = [] if stage.reset else self.stages[: stage.index]
        tasks = dict.fromkeys(task for before in earlier for task in before.train)
        rows = {task: len(self._splits[task, "train"]) for task in tasks if task not in stage.train}
        return Replay() if self.replay is None else self.replay(stage, rows)

    @property
    def train_rows(self) -> int:
        """Training rows of the current stage, each counted once."""
        return sum(len(self._splits[task, "train"]) for task in self.stage.train)

    def probe_loader(self, count: int, batch_size: int | None = None) -> DataLoader[Any]:
        """This process's share of a fixed random sample of the stage's training rows, for probes and routers.

        The sample depends on the experiment's seed and the stage alone; position `i` belongs to rank `i % world_size`, and
        a smaller sample is the beginning of a larger one.

        Args:
            count: rows over all processes.
            batch_size: samples per batch; None for the stage's.
        """
        stage = self.stage
        dataset = StageData([self._splits[task, "train"] for task in stage.train], [1] * len(stage.train))
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "probe", stage.index))
        chosen = torch.randperm(len(dataset), generator=generator)[:count].tolist()
        return DataLoader(
            Subset(dataset, chosen[self._rank :: self._world_size]),
            batch_size=batch_size or self.batch_size(stage),
            collate_fn=self.train_collator,
            worker_init_fn=init_worker,
            generator=torch.Generator().manual_seed(0),
            **self._loader_options(),
        )

    def kept_samples(self, task: str, count: int) -> list[Sample]:
        """The training samples of a task that a replay buffer of that size holds (see `kept_rows`); pixels are not read."""
        split = self._splits[task, "train"]
        return [split[int(row)] for row in kept_rows(len(split), count, seed=self.config.seed, task=task)]

    def tuning_loader(
        self, samples: Sequence[Sample], steps: Sequence[Sequence[int]]
    ) -> Iterator[tuple[dict[str, Any], bool]]:
        """This process's part of every step, as a training batch that is never cut, and whether it counts.

        A process that has no part in a step gets the step's first sample, which does not count: where the decoder is spread
        over processes, all must run it.

        Args:
            samples: what to show.
            steps: positions in `samples` of the samples of every step, over all processes.
        """
        own = [[*step[self._rank :: self._world_size]] or [*step[:1]] for step in steps]
        loader: DataLoader[Any] = DataLoader(
            samples,  # type: ignore[arg-type]
            batch_sampler=own,
            collate_fn=TrainCollator(self.processor, self.config.prompt, max_length=sys.maxsize),
            worker_init_fn=init_worker,
            generator=torch.Generator().manual_seed(0),
            **self._loader_options(),
        )
        for step, batch in zip(steps, loader, strict=True):
            yield batch, self._rank < len(step)

    def has_text_only(self) -> bool:
        """Whether a training row has no image, so that a batch may leave the projector without a gradient."""
        return any(split.text_only for (_, kind), split in self._splits.items() if kind == "train")

    def report(self) -> dict[str, dict[str, int]]:
        """Per task: rows in use by split, malformed rows that were left out, and how many training rows the current stage has
        shortened or dropped.

        The last two count each row once, over epochs, interruptions and, since the last epoch's end, all processes.
        """
        report: dict[str, dict[str, int]] = {}
        for (task, split), samples in self._splits.items():
            counts = report.setdefault(task, self._cuts.counts(task))
            counts[f"{split}_rows"] = len(samples)
            if samples.skipped:
                counts[f"{split}_malformed"] = samples.skipped
        return report

    def check_trained(self) -> None:
        """At the end of a stage's training: bring `report` up to date. Collective.

        The train loader does this at every epoch's end; a training that stops inside an epoch (`max_steps`) needs it.

        Raises:
            ValueError: no sample of a task had an answer token left, so it has trained on nothing.
        """
        self._cuts.end_epoch()

    def _eval_loader(self, dataset: Dataset[Sample], lengths: np.ndarray, collator: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.config.data.eval_batch_size,
            sampler=EvalSlice(lengths, rank=self._rank, world_size=self._world_size),
            collate_fn=collator,
            worker_init_fn=init_worker,
            # A generator of its own: evaluation must not move the global random state of training.
            generator=torch.Generator().manual_seed(derive_seed(self.config.seed, "eval")),
            **self._loader_options(),
        )

    def _check_share(self, rows: int, what: str) -> None:
        # A process without any batch would leave the loop early, and the others would wait for it at the next reduction.
        if rows < self._world_size:
            raise ValueError(
                f"There are {rows} {what} rows for {self._world_size} processes. Use more rows (data.limit_*) or lower "
                "trainer.devices."
            )

    def _loader_options(self) -> dict[str, Any]:
        if self.config.data.num_workers > 0:
            # Read when a process forks, so the workers' own initialisation would come too late to prevent the warning.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return {"num_workers": self.config.data.num_workers, "pin_memory": torch.cuda.is_available()}

    def _epoch_batches(self, batches: int) -> int:
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return limit if isinstance(limit, int) else int(batches * (limit or 1.0))

    def _new_cuts(self) -> CutLog:
        tasks = self.stage.train if self.stages else ()
        return CutLog(
            {task: self._splits[task, "train"].total for task in tasks},
            max_length=self.config.data.max_length,
            largest=self._largest,
        )

    def _largest(self, values: Tensor) -> Tensor:
        """Element-wise maximum over the processes; collective."""
        if self.trainer is None or self._world_size == 1:
            return values
        strategy = self.trainer.strategy
        return strategy.reduce(values.to(strategy.root_device, copy=True), reduce_op="max")

    def _warn_of_batch_sizes(self) -> None:
        for stage in self.stages:
            sizes = {task: self._task(task).batch_size or self.config.data.batch_size for task in stage.train}
            if len(set(sizes.values())) > 1:
                logger.warning(
                    "Stage %s trains on several tasks at once, whose batch sizes differ (%s): it uses data.batch_size=%d.",
                    stage.name,
                    ", ".join(f"{task}: {size}" for task, size in sizes.items()),
                    self.config.data.batch_size,
                )

    def _task(self, task: str) -> TaskConfig:
        assert task in self.config.tasks, f"loading checks that {task!r} is in `tasks`"
        return self.config.tasks[task]

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size
