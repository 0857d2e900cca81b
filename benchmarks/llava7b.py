"""LLaVA-1.5-7B's shapes on a GPU: training and evaluation of plain LoRA, MoELoRA, BranchLoRA and D-MoLE, against a bare
PyTorch loop with PEFT's LoRA.

    python benchmarks/llava7b.py
    # to try it, 6 minutes:
    python benchmarks/llava7b.py --device cpu --divide 24 --batch 2 --steps 2 --rows 2 --rank 8 --rounds 1

Weights are random, in bfloat16; attention is PyTorch's own (sdpa), and the decoder's activations are computed again in the
backward pass, as `experiments/_base/llava7b.yaml` has it. A strategy is an ordinary run of two tasks, and what counts is
the second epoch of the second one: D-MoLE has looked up its co-experts then. The bare loop trains LoRA of equal rank on the
same rows, with the same loss on answer tokens. Each variant is a process of its own. Loaders have workers, and a span
begins and ends with a synchronised device. Pictures are 336 x 336, questions have some 20 to 30 tokens.

Model FLOPs utilisation is the operations that a step needs, over those that the device could do in its time: per token and
weight of the decoder 4 (forward, and the gradient of its input; frozen weights have none), per token and trained parameter
6, causal attention, the output head on answer tokens, the tower forward and, where it is adapted, back. What is computed
again does not count, and neither does padding.

Evaluation answers the same rows at batch size 1 and batched, each with its own route, from the checkpoint of the run. In
bfloat16 the best two tokens of a random model are often equal to the last bit, so not all answers need be the same; the
tests compare tokens in float32.

A variant that fails, for want of memory for example, is left out of the table and named at the end.
"""

import argparse
import gc
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import workload
import yaml
from lightning.fabric.utilities import move_data_to_device
from ratios import Row, in_turn, parser, prepare, ratio_row, report
from sizes import LLAVA7B
from training_step import BareLoop
from transformers import AutoConfig

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.generation import generate_answers
from mcit_lightning.loading import load_config
from mcit_lightning.module import MCITModule

BARE = "bare loop with PEFT LoRA"
STRATEGIES = ("sequential", "moelora", "branchlora", "dmole")
ORDER = ("colours", "shapes")
ANSWER = 16
"""Tokens of an answer in evaluation."""
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""TFLOP/s of dense bfloat16 products, by a part of the device's name (of the SXM form where there are several)."""


def config_of(options: argparse.Namespace, folder: Path, strategy: str) -> ExperimentConfig:
    """LLaVA-1.5-7B's preset, the benchmark's tasks, and a strategy with its paper's settings."""
    tasks = folder / "tasks.yaml"
    splits = ("train", "val", "test")
    content = {
        "data": {"root": str(folder)},
        "tasks": {task: {s: f"{task}/{s}.json" for s in splits} for task in ORDER},
    }
    tasks.write_text(yaml.safe_dump(content), encoding="utf-8")
    rank = [f"strategy.rank={options.rank}", f"strategy.alpha={2 * options.rank}"] if strategy != "dmole" else []
    if strategy == "sequential":
        rank.append("strategy.targets={language: [all-linear]}")
    config = load_config(
        f"llava7b+{tasks}+{strategy}",
        [
            f"backbone.id={folder / 'model'}",
            "backbone.train_projector=false",
            f"out={folder / strategy}",
            f"order=[{', '.join(ORDER)}]",
            f"tasks.{ORDER[-1]}.epochs=2",
            "zero_shot=false",
            f"data.batch_size={options.batch}",
            "data.max_length=1024",
            f"data.num_workers={options.workers}",
            f"data.max_new_tokens={ANSWER}",
            "optim.lr=1e-6",  # what is learnt in some steps would make all answers the same
            *(f"tasks.{task}.min_new_tokens={ANSWER}" for task in ORDER),
            f"trainer.accelerator={'gpu' if options.device == 'cuda' else 'cpu'}",
            "trainer.devices=1",
            "trainer.precision=bf16-mixed",
            "trainer.enable_progress_bar=false",
            *rank,
        ],
    )
    config.callbacks.insert(0, {"_target_": "workload.Epochs"})
    config.overwrite = True
    return config


def bare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train the loop; its span."""
    config = config_of(options, folder, "sequential")
    config.order = [ORDER[-1]]
    loop = BareLoop(config, all_logits=False, rank=options.rank, device=options.device)
    return asdict(loop.span(options.steps))


def framework(options: argparse.Namespace, folder: Path, strategy: str) -> dict[str, Any]:
    """Run a strategy; the span of its last epoch, its evaluation's seconds per row by batch size, the share of equal answers."""
    config = config_of(options, folder, strategy)
    workload.quiet_run(config)
    gc.collect()  # the model of the training
    module = workload.trained_module(config, len(ORDER)).to(options.device)
    found = {size: answer(options, config, module, size) for size in (1, options.eval_batch)}
    seconds = {size: took for size, (took, _) in found.items()}
    one, many = (answers for _, answers in found.values())
    assert all(one), "an answer is empty: its tokens have no text"
    same = sum(left == right for left, right in zip(one, many, strict=True)) / len(one)
    return {**asdict(workload.SPANS[-1]), "seconds_per_row": seconds, "same": same}


def answer(
    options: argparse.Namespace, config: ExperimentConfig, module: MCITModule, size: int
) -> tuple[float, list[str]]:
    """Seconds per row of the last task's test rows in batches of a size, and the answers in the rows' order."""
    config.data.eval_batch_size = size
    stream = workload.evaluation_stream(config, module, ORDER[-1])
    end, answers = stream.train_collator.encoder.end_id, dict[Any, str]()
    batches = [move_data_to_device(batch, options.device) for batch in stream.test_dataloader()[0]]

    def generate(batch: dict[str, Any], tokens: int) -> list[str]:
        unseen = {key: value for key, value in batch.items() if key != "index"}  # nothing is remembered
        with (
            torch.inference_mode(),
            torch.autocast(options.device, torch.bfloat16),
            module.strategy.routing(module.towers, unseen, None),
            module.towers.generating(),
        ):
            inputs = module.strategy.inputs(unseen)
            return generate_answers(module.model, module.processor, inputs, tokens, end, tokens)

    generate(batches[0], 2)  # warm up
    begin = workload.now()
    for batch in batches:
        answers.update(zip(batch["index"], generate(batch, ANSWER), strict=True))
    took = workload.now() - begin
    return took / len(answers), [answers[index] for index in sorted(answers)]


def operations(config: Any, span: dict[str, Any], rows: int, *, tower: bool) -> float:
    """Operations that a step of so many rows needs; the module's docstring says what counts.

    Args:
        config: the model's.
        span: of the steps.
        tower: whether the gradient goes back through the vision tower.
    """
    text, vision = config.text_config, config.vision_config
    tokens, answers = span["tokens"] / span["steps"], span["answers"] / span["steps"]
    heads = text.num_key_value_heads / text.num_attention_heads
    layer = (2 + 2 * heads) * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    attention = 6 * (tokens / rows) ** 2 * text.hidden_size * rows
    decoder = text.num_hidden_layers * (4 * layer * tokens + attention)
    head = 4 * text.hidden_size * text.vocab_size * answers
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    block = 2 * weights * patches + 4 * patches**2 * vision.hidden_size
    seen = (2 if tower else 1) * vision.num_hidden_layers * block * rows
    return decoder + head + seen + 6 * span["trained"] * tokens


def child(options: argparse.Namespace, folder: Path, variant: str) -> dict[str, Any]:
    """One variant; runs in a process of its own."""
    workload.CLOCK[0] = prepare(options)
    if variant == "build":
        workload.build(
            folder,
            train=options.batch * options.steps,
            test=options.rows,
            sizes=LLAVA7B.divided(options.divide),
            dtype=torch.bfloat16,
            device=options.device,
        )
        return {}
    return bare(options, folder) if variant == BARE else framework(options, folder, variant)


def in_child(options: argparse.Namespace, folder: Path, variant: str) -> dict[str, Any]:
    """`child` in a new process, which may start loader workers."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(child, options, folder, variant).result()


def training_rows(
    options: argparse.Namespace, config: Any, found: dict[str, list[dict[str, Any]]], peak: float | None
) -> list[Row]:
    """The table's part on training: speed and memory against the bare loop, and utilisation."""
    rows = []
    per_token = {name: [span["seconds"] / span["tokens"] for span in spans] for name, spans in found.items()}
    for name, spans in found.items():
        speed = 1 / statistics.median(per_token[name])
        if name != BARE:
            target = ">= 0.95" if name == "sequential" else ""
            fields = {"name": f"{name}: tokens per second", "value": speed, "unit": "tokens/s", "target": target}
            rows.append(ratio_row(name, BARE, per_token, invert=True, **fields))
        if peak:
            used = sorted(
                operations(config, span, options.batch, tower=name == "dmole") * span["steps"] / span["seconds"] / 1e12
                for span in spans
            )
            middle = statistics.median(used)
            target = ">= 0.45" if name == "sequential" else ""
            rows.append(
                Row(
                    f"{name}: model FLOPs utilisation",
                    f"{peak:g} TFLOP/s",
                    middle / peak,
                    used[0] / peak,
                    used[-1] / peak,
                    middle,
                    "TFLOP/s",
                    target,
                    f"{speed:.0f} tokens/s" if name == BARE else "",
                )
            )
        if name != BARE and spans[0]["peak"]:
            memory = {key: [span["peak"] / 2**30 for span in found[key]] for key in (name, BARE)}
            note = f"{spans[0]['trained']:,} for {found[BARE][0]['trained']:,} trained parameters"
            rows.append(ratio_row(name, BARE, memory, name=f"{name}: peak memory", unit="GiB", note=note))
    return rows


def evaluation_rows(options: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """The table's part on evaluation, batched against batch size 1."""
    rows = []
    for name in (name for name in found if name != BARE):
        sizes = {"batched": options.eval_batch, "one": 1}
        samples = {key: [span["seconds_per_row"][size] for span in found[name]] for key, size in sizes.items()}
        rows.append(
            ratio_row(
                "batched",
                "one",
                samples,
                invert=True,
                name=f"{name}: evaluation, batches of {options.eval_batch}",
                base="batch size 1",
                value=1 / statistics.median(samples["batched"]),
                unit="rows/s",
                note=f"{statistics.median(span['same'] for span in found[name]):.0%} same answers",
            )
        )
    return rows


def spans_of(options: argparse.Namespace, folder: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """What every variant has measured in each round, and why some have not, for example for want of memory."""
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in (BARE, *options.strategies)}
    failed: dict[str, str] = {}

    def once(variant: str) -> float:
        begin = time.perf_counter()
        if variant not in failed:
            try:
                found[variant].append(in_child(options, folder, variant))
            except (RuntimeError, ValueError) as error:
                failed[variant] = str(error)
        took = time.perf_counter() - begin
        sys.stderr.write(f"{variant}: {'failed after ' if variant in failed else ''}{took:.0f} s\n")
        return took

    in_turn({variant: partial(once, variant) for variant in found}, options.rounds)
    if BARE in failed:
        raise SystemExit(f"{BARE} failed: {failed[BARE]}")
    return {variant: spans for variant, spans in found.items() if variant not in failed}, failed


def measure(options: argparse.Namespace) -> None:
    """Run the benchmark."""
    prepare(options)
    name = torch.cuda.get_device_name() if options.device == "cuda" else ""
    peak = options.peak or next((value for part, value in PEAKS.items() if part in name), None)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        in_child(options, folder, "build")
        found, failed = spans_of(options, folder)
        config = AutoConfig.from_pretrained(folder / "model")
    title = f"LLaVA-1.5-7B's shapes, {config.text_config.num_hidden_layers} layers, batch {options.batch}"
    report(title, training_rows(options, config, found, peak) + evaluation_rows(options, found), options)
    if failed:
        raise SystemExit("\n".join(f"left out: {variant} failed: {reason}" for variant, reason in failed.items()))


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=2)
    arguments.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    arguments.add_argument("--divide", type=int, default=1, help="take this fraction of the layers")
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--steps", type=int, default=12, help="per epoch")
    arguments.add_argument("--rank", type=int, default=128, help="of all but D-MoLE, whose experts have rank 8")
    arguments.add_argument("--rows", type=int, default=64, help="to answer")
    arguments.add_argument("--eval-batch", type=int, default=32)
    arguments.add_argument("--workers", type=int, default=4, help="of a loader")
    arguments.add_argument("--peak", type=float, help="TFLOP/s in bfloat16 of a device that is not known")
    arguments.add_argument("--scratch", type=Path, help="folder for model and runs (14 GB, and 3 for checkpoints)")
    measure(arguments.parse_args())
