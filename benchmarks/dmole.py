"""What D-MoLE adds to training and evaluation: gradient probe, features, autoencoder, co-experts, routing.

    python benchmarks/dmole.py                                                  # CPU: the quickstart's shapes
    python benchmarks/dmole.py --shapes llava7b --divide 8                      # LLaVA-1.5-7B with an eighth of its layers
    python benchmarks/dmole.py --shapes llava7b --device cuda --dtype bfloat16  # all of it, random weights
    python benchmarks/dmole.py --shapes llava7b --operations                    # nothing runs: products are counted

Every figure is the time per sample relative to a training step's in the same run (median over rounds, 10th to 90th percentile of
the rounds' ratios). The pre-stage cost of a stage with N samples follows from it: probe and features of 1 % of them (at least the
minimum) and the autoencoder, over N training samples. The co-expert of a sample is looked up once, in its first epoch. A test
sample is routed once with a look at it, and remembered when it is tested again after every later task; the share of routing in
all the evaluations of a run follows from both.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sizes import LLAVA7B, QUICKSTART
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mcit_lightning.loss import answer_loss
from mcit_lightning.probe import gradient_scores
from mcit_lightning.stages import sequential_stages
from mcit_lightning.strategies import DMoLE, DMoLEConfig
from mcit_lightning.towers import Towers

TASKS = ["first", "second", "third"]
IMAGE = 3
SIZES = {"quickstart": QUICKSTART, "llava7b": LLAVA7B}
CLIP_NAMES = ["q_proj", "k_proj", "v_proj", "out_proj"]
DINO_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]


def build(shape: str, divide: int) -> tuple[LlavaForConditionalGeneration, list[str]]:
    """A random model of a shape with a fraction of its layers, and the names of its tower's attention linears."""
    sizes = SIZES[shape].divided(divide)
    seen = {**sizes.vision, "image_size": sizes.pixels, "patch_size": 14}
    if shape == "quickstart":
        seen.pop("intermediate_size")  # DINOv2 has a ratio in its place, whose default says the same
        vision: Any = Dinov2Config(**seen)
        layer, names = -1, DINO_NAMES
    else:
        vision = CLIPVisionConfig(**seen)
        layer, names = -2, CLIP_NAMES
    text = LlamaConfig(**sizes.text)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=layer)
    return LlavaForConditionalGeneration(config), names


def make_batch(
    model: LlavaForConditionalGeneration, size: int, question: int, answer: int, number: int
) -> dict[str, Any]:
    """A training batch of one image, a question and an answer per row."""
    vision, device = model.config.vision_config, model.device
    tokens = (vision.image_size // vision.patch_size) ** 2
    length = 4 + tokens + question + answer
    ids = torch.randint(10, 1000, (size, length), device=device)
    ids[:, 4 : 4 + tokens] = IMAGE
    first = length - answer
    rows = torch.arange(size, device=device).repeat_interleave(answer)
    columns = torch.arange(first, length, device=device).repeat(size)
    pixels = torch.randn(size, 3, vision.image_size, vision.image_size, device=device, dtype=model.dtype)
    return {
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels},
        "targets": ids[rows, columns],
        "positions": rows * length + columns - 1,
        "rows": rows,
        "num_images": [1] * size,
        "id": [str(row) for row in range(size)],
        "index": [number * size + row for row in range(size)],
    }


def prompts(batch: dict[str, Any], answer: int) -> dict[str, Any]:
    """The same rows as an evaluation batch."""
    inputs = dict(batch["inputs"])
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, :-answer]
    return {
        "inputs": inputs,
        "num_images": batch["num_images"],
        "id": batch["id"],
        "index": batch["index"],
        "task": ["third"] * len(batch["id"]),
    }


def asked_alike(batch: dict[str, Any]) -> dict[str, Any]:
    """The same pictures, all with the first row's question, as in captioning."""
    ids = batch["inputs"]["input_ids"]
    return {**batch, "inputs": {**batch["inputs"], "input_ids": ids[:1].expand_as(ids).contiguous()}}


def learnt(towers: Towers, names: list[str], rank: int) -> DMoLE:
    """The strategy after two tasks, at the start of the third, with random scores."""
    targets = {"vision": names, "language": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    strategy = DMoLE(DMoLEConfig(rank=rank, alpha=2.0 * rank, dropout=0.0, targets=targets))
    for stage in sequential_stages(TASKS):
        paths = [path for paths in strategy.candidates(towers).values() for path in paths]
        scores = torch.rand(len(paths), generator=torch.Generator().manual_seed(stage.index)) + 0.1
        strategy.scores = dict(zip(paths, scores.tolist(), strict=True))
        strategy.grow(towers, strategy.plan(stage, towers))
    return strategy


def measure(shape: str, options: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds per sample of every part, as lists over the rounds."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    model, names = build(shape, options.divide)
    model = model.to(device, dtype).eval().requires_grad_(False)
    towers = Towers.of(model)
    strategy = learnt(towers, names, options.rank)
    for parameter in strategy.trainable(towers, sequential_stages(TASKS)[-1]):
        parameter.requires_grad_(True)
    size, answer = options.batch_size, options.answer
    batches = [make_batch(model, size, options.question, answer, number) for number in range(2)]
    asked = prompts(batches[0], answer)
    alike = asked_alike(asked)
    features = torch.cat([strategy.features(towers, batch) for batch in batches])
    samples = features.repeat(-(-options.router_samples // len(features)), 1)[: options.router_samples]
    samples = samples + samples.std() * torch.randn_like(samples)
    for stage in sequential_stages(TASKS):
        strategy.fit_router(stage, samples)
    paths = [path for paths in strategy.candidates(towers).values() for path in paths]

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def train() -> None:
        with autocast(), strategy.routing(towers, batches[0], "third"):
            loss = answer_loss(model, batches[0]).loss
        loss.backward()
        model.zero_grad()

    def co_experts() -> None:
        strategy._helpers.clear()
        with torch.no_grad(), autocast(), strategy.routing(towers, batches[0], "third"):
            pass

    def probe() -> None:
        gradient_scores(towers, paths, batches[:1], size, context=autocast)

    def route(batch: dict[str, Any], *, again: bool = False) -> None:
        if not again:
            strategy._tested.clear()
        with torch.no_grad(), autocast(), strategy.routing(towers, batch, None):
            pass

    def generate() -> None:
        with torch.no_grad(), autocast():
            model.generate(  # type: ignore[operator]
                **asked["inputs"],
                do_sample=False,
                min_new_tokens=options.new_tokens,
                max_new_tokens=options.new_tokens,
                pad_token_id=0,
                suppress_tokens=[IMAGE],
            )

    def fit() -> None:
        strategy.fit_router(sequential_stages(TASKS)[-1], samples)

    parts: dict[str, tuple[Callable[[], None], int]] = {
        "training step": (train, size),
        "probe": (probe, size),
        "features": (lambda: strategy.features(towers, batches[0]) is None, size),  # type: ignore[dict-item]
        "co-expert": (co_experts, size),
        "autoencoder": (fit, options.router_samples),
        "routing, first time": (lambda: route(asked), size),
        "routing, first time, one question": (lambda: route(alike), size),
        "routing, seen before": (lambda: route(alike, again=True), size),
        "generation": (generate, size),
    }
    for run, _ in parts.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.rounds):
        for name, (run, count) in parts.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((clock() - began) / count)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"shape": shape, "seconds": seconds, "peak_memory_bytes": peak}


def pre_stage(median: dict[str, float], rows: int) -> float:
    """Probe, features and autoencoder of a stage with so many samples, relative to its training (one epoch)."""
    config = DMoLEConfig()
    probed = min(rows, max(config.proxy_minimum, round(config.proxy_fraction * rows)))
    seen = min(rows, max(config.router_minimum, round(config.router_fraction * rows)))
    cost = probed * median["probe"] + seen * (median["features"] + median["autoencoder"])
    return cost / (rows * median["training step"])


def operations(shape: str, options: argparse.Namespace) -> dict[str, float]:
    """Multiplications and additions of all products, in units of 1e12 per sample, on a model without weights.

    In generation they are few but wait for memory, so the share of routing in its time is smaller than in its operations.
    """
    with torch.device("meta"):
        model, _ = build(shape, options.divide)
    towers = Towers.of(model.requires_grad_(False))
    vision, decoder = (model.get_submodule(path) for path in (towers.vision, towers.language))
    config = model.config.vision_config
    tokens, width = (config.image_size // config.patch_size) ** 2, model.config.text_config.hidden_size
    pixels = torch.empty(1, 3, config.image_size, config.image_size, device="meta")

    def count(run: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return counter.get_total_flops() / 1e12

    def read(length: int) -> Callable[[], object]:
        embedded = torch.empty(1, length, width, device="meta")
        mask = torch.empty(1, 1, length, length, device="meta")  # ready-made: making one looks at values
        return lambda: decoder(inputs_embeds=embedded, attention_mask=mask, use_cache=False)

    found = {"vision tower": count(lambda: vision(pixels)), "question alone": count(read(options.question))}
    prompt = count(read(4 + tokens + options.question))
    found["generation"] = found["vision tower"] + prompt + (options.new_tokens - 1) * count(read(1))
    return found


def routing_share(median: dict[str, float], first: str, times: float) -> float:
    """Routing over generation, for a sample that is tested so many times."""
    later = (times - 1) * median["routing, seen before"]
    return (median[first] + later) / (times * median["generation"])


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["quickstart"], choices=list(SIZES))
    parser.add_argument("--divide", type=int, default=1, help="take only this fraction of the layers of both towers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--question", type=int, default=20, help="tokens of a question, the template's included")
    parser.add_argument("--answer", type=int, default=4, help="tokens of a training answer")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens to generate per sample")
    parser.add_argument("--router-samples", type=int, default=512)
    parser.add_argument("--operations", action="store_true", help="count products instead of measuring time")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of one thread, where others use the machine"
    )
    parser.add_argument("--tasks", type=int, default=9, help="length of the task sequence, for the share over a run")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    console = Console(file=sys.stdout)
    if options.operations:
        for shape in options.shapes:
            count = operations(shape, options)
            console.print(
                f"{shape}, 1e12 operations per sample: " + ", ".join(f"{k} {v:.3f}" for k, v in count.items())
            )
            for batch in (1, options.batch_size):
                looked = count["vision tower"] + count["question alone"] / batch
                console.print(
                    f"routing over generation, a question for every {batch}: {looked / count['generation']:.1%}"
                )
        return
    if options.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if options.cpu_time else time.perf_counter
    found = [measure(shape, options, clock) for shape in options.shapes]
    for result in found:
        seconds = result["seconds"]
        median = {name: statistics.median(values) for name, values in seconds.items()}
        table = Table(
            title=f"{result['shape']} / {options.divide}, {options.device}, {options.dtype}, torch {torch.__version__}"
        )
        for column in ("part", "ms per sample", "relative to a training sample", "10-90 %"):
            table.add_column(column, justify="left" if column == "part" else "right")
        for name, values in seconds.items():
            ratios = sorted(a / b for a, b in zip(values, seconds["training step"], strict=True))
            low, high = ratios[round(0.1 * (len(ratios) - 1))], ratios[round(0.9 * (len(ratios) - 1))]
            ratio = median[name] / median["training step"]
            table.add_row(name, f"{1000 * median[name]:.2f}", f"{ratio:.3f}", f"{low:.3f}-{high:.3f}")
        console.print(table)
        result["pre_stage"] = {rows: pre_stage(median, rows) for rows in (20_000, 50_000, 150_000)}
        stages = ", ".join(f"{rows:,} samples {100 * share:.2f} %" for rows, share in result["pre_stage"].items())
        console.print(f"pre-stage cost over one epoch of training: {stages}")
        result["routing_share"] = {}
        for first in ("routing, first time", "routing, first time, one question"):
            shares = {"once": routing_share(median, first, 1)}
            shares["a run that tests seen tasks"] = routing_share(median, first, (options.tasks + 1) / 2)
            shares["a run that tests all tasks"] = routing_share(median, first, options.tasks)
            result["routing_share"][first] = shares
            text = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
            console.print(f"{first}, over generation of {options.new_tokens} tokens ({options.tasks} tasks): {text}")
        if result["peak_memory_bytes"]:
            console.print(f"peak memory {result['peak_memory_bytes'] / 2**30:.1f} GiB")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
