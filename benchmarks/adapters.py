"""Cost of the adapter layer: one training step and one decode step of a decoder, relative to plain LoRA of the same total rank.

    python benchmarks/adapters.py                              # CPU: SmolLM2's shapes and one layer of LLaVA-7B
    python benchmarks/adapters.py --cpu-time --threads 1       # on a machine that is busy with other work
    python benchmarks/adapters.py --device cuda --dtype bfloat16 --layers 32 --shapes llava7b

A training step is forward, backward and AdamW; a decode step is one token after a prefill, with a KV cache, as in an evaluation.
All variants run in turn, round after round, in one process. A round's time is divided by plain LoRA's in the same round, and the
table gives the median and the spread (10th to 90th percentile) of these ratios.

Memory is counted without the weights, their gradients and the optimizer's state: the peak of one forward and backward, and what
autograd keeps between the two. `lora-equal` is plain LoRA with as many trainable parameters as BranchLoRA. Where `peft` is
installed, plain LoRA by it is measured too.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sizes import LLAVA7B, QUICKSTART
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaModel

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.gates import GateState, RouterGate

EXPERTS, TOP_K = 8, 2
HAS_PEFT = importlib.util.find_spec("peft") is not None
KINDS = ["lora", *(["peft"] if HAS_PEFT else []), "moelora", "branchlora", "loop"]
SHAPES = {"smollm2": QUICKSTART.text, "llava7b": LLAVA7B.text}


class ExpertLoop(nn.Module):
    """MoELoRA as a loop over experts, each with its own products and dropout: the reference that is not used."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.router = nn.Parameter(torch.randn(EXPERTS, base.in_features) * 0.01)
        self.a = nn.ParameterList(torch.randn(rank // EXPERTS, base.in_features) * 0.01 for _ in range(EXPERTS))
        self.b = nn.ParameterList(torch.zeros(base.out_features, rank // EXPERTS) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, d_in] -> [B, S, d_out]."""
        y = self.base(x)
        x = x.to(self.router.dtype)
        weights = (x @ self.router.T).softmax(-1)
        for index in range(EXPERTS):
            y = y + (2.0 * weights[..., index : index + 1] * (x @ self.a[index].T @ self.b[index].T)).to(y.dtype)
        return y


def adapt(model: LlamaModel, kind: str, rank: int, state: GateState) -> None:
    """Put one kind of adapter around every linear of the decoder; only adapters train."""
    model.requires_grad_(False)
    if kind == "peft":
        from peft import LoraConfig, get_peft_model

        names = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=sorted(names))
        get_peft_model(model, config)  # puts its layers into `model`
        return
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for path, linear in linears:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _wrap(path, linear, kind, rank, state))


def _wrap(path: str, linear: nn.Linear, kind: str, rank: int, state: GateState) -> nn.Module:
    device = linear.weight.device
    if kind == "loop":
        return ExpertLoop(linear, rank).to(device)
    layer = AdapterLinear(linear, scale=2.0)
    if kind in ("lora", "lora-equal"):
        layer.add_branch("lora", rank, seed=0, path=path)
        return layer
    routed = kind == "branchlora"
    if routed:
        for index in range(EXPERTS):
            layer.add_branch(f"expert{index}", rank // EXPERTS, seed=0, path=path, trunk="trunk")
    else:
        layer.add_branch("experts", rank, seed=0, path=path, gates=EXPERTS)
    layer.add_router("task", seed=0, path=path)
    gate = RouterGate(
        path, layer, top_k=TOP_K if routed else None, gate_input="first" if routed else "token", normalize=routed
    )
    gate.state = state
    layer.gate = gate
    return layer


def saved_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes that autograd keeps between forward and backward; storages counted once, parameters not at all."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that were allocated at once during `run`, beyond those at its start."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class Subject:
    """One variant of a decoder, and what is measured of it.

    Args:
        kind: `lora`, `lora-equal`, `peft`, `moelora`, `branchlora` or `loop`.
        config: the decoder's shape.
        rank: total rank per linear.
        x: [B, S, hidden], the decoder's input.
        checkpointing: recompute activations in the backward pass.
    """

    def __init__(self, kind: str, config: LlamaConfig, rank: int, x: Tensor, *, checkpointing: bool) -> None:
        self.x, self.rank, self.dtype = x, rank, x.dtype
        self.state = GateState(mask=torch.ones(x.shape[:2], device=x.device, dtype=torch.long), router="task")
        self.model = LlamaModel(config).to(x.device, x.dtype).train()
        adapt(self.model, kind, rank, self.state)
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)  # there all the time, so that memory is of activations alone
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def loss(self) -> Tensor:
        """Of a training forward, [] (a scalar)."""
        self.state.generating, self.state.counting = False, True
        with self._autocast():
            hidden = self.model(inputs_embeds=self.x.detach().requires_grad_(), use_cache=False).last_hidden_state
        return hidden.float().square().mean()

    def backward(self) -> None:
        """Forward and backward."""
        self.loss().backward()

    def step(self) -> None:
        """A whole training step."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    @torch.no_grad()
    def decode(self, tokens: int, clock: Callable[[], float]) -> float:
        """Seconds per token after a prefill."""
        self.model.eval()
        self.state.generating, self.state.counting = True, False
        self.state.decided.clear()
        layers = [module for module in self.model.modules() if isinstance(module, AdapterLinear)]
        with self._autocast(), ExitStack() as contexts:
            for layer in layers:
                contexts.enter_context(layer.keep())
            cache = DynamicCache(config=self.model.config)
            self.model(inputs_embeds=self.x, past_key_values=cache)
            self.model(inputs_embeds=self.x[:, :1], past_key_values=cache)
            start = clock()
            for _ in range(tokens):
                self.model(inputs_embeds=self.x[:, :1], past_key_values=cache)
            seconds = (clock() - start) / tokens
        self.model.train()
        return seconds


def equal_rank(config: LlamaConfig, trainable: int) -> int:
    """Rank at which plain LoRA has about that many trainable parameters."""
    with torch.device("meta"):
        linears = [module for module in LlamaModel(config).layers.modules() if isinstance(module, nn.Linear)]
    return round(trainable / sum(linear.in_features + linear.out_features for linear in linears))


def measure(shape: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of the table for one decoder shape."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    layers = options.layers or (4 if shape == "smollm2" else 1)
    rank = options.rank or (32 if shape == "smollm2" else 128)
    sizes = {**SHAPES[shape], "num_hidden_layers": layers, "vocab_size": 8}
    config = LlamaConfig(**sizes, attn_implementation="sdpa")
    torch.manual_seed(0)
    x = torch.randn(options.batch_size, options.length, config.hidden_size, device=device, dtype=dtype)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if options.cpu_time else time.perf_counter()

    def build(kind: str, rank: int) -> Subject:
        return Subject(kind, config, rank, x, checkpointing=options.activation_checkpointing)

    subjects = {kind: build(kind, rank) for kind in KINDS}
    size = sum(parameter.numel() for parameter in subjects["branchlora"].trained)
    subjects["lora-equal"] = build("lora-equal", equal_rank(config, size))
    saved = {kind: saved_bytes(subject.loss, subject.model) for kind, subject in subjects.items()}
    for subject in subjects.values():
        subject.step()  # warm up; the optimizer makes its state
    peak = {kind: peak_bytes(subject.backward, device) for kind, subject in subjects.items()}
    times: dict[str, dict[str, list[float]]] = {what: {kind: [] for kind in subjects} for what in ("step", "decode")}
    kinds = list(subjects)
    for round_number in range(options.rounds):
        for kind in kinds[round_number % len(kinds) :] + kinds[: round_number % len(kinds)]:
            start = clock()
            subjects[kind].step()
            times["step"][kind].append(clock() - start)
            times["decode"][kind].append(subjects[kind].decode(options.tokens, clock))
    rows = []
    for kind, subject in subjects.items():
        row: dict[str, object] = {"shape": shape, "layers": layers, "rank": subject.rank, "adapter": kind}
        for what, samples in times.items():
            ratios = sorted(a / b for a, b in zip(samples[kind], samples["lora"], strict=True))
            low, high = ratios[math.floor(0.1 * (len(ratios) - 1))], ratios[math.ceil(0.9 * (len(ratios) - 1))]
            row[what] = statistics.median(ratios)
            row[f"{what}_spread"] = [low, high]
            row[f"{what}_seconds"] = statistics.median(samples[kind])
        row |= {"peak": peak[kind] / peak["lora"], "peak_bytes": peak[kind]}
        row |= {"saved": saved[kind] / saved["lora"], "saved_bytes": saved[kind]}
        row["trainable"] = sum(parameter.numel() for parameter in subject.trained)
        rows.append(row)
    return rows


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, help="decoder layers; default 4 for SmolLM2, 1 for LLaVA-7B")
    parser.add_argument("--rank", type=int, help="total rank; default 32 for SmolLM2, 128 for LLaVA-7B")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=8, help="decode steps of a round")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--cpu-time", action="store_true", help="count the process's CPU time, not the wall clock")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    if options.cpu_time and options.device != "cpu":
        parser.error("--cpu-time does not count the time of another device")
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = [row for shape in options.shapes for row in measure(shape, options)]
    table = Table(title=f"relative to plain LoRA; {options.device}, {options.dtype}, torch {torch.__version__}")
    for column in ("shape", "adapter", "trainable", "training step", "decode step", "peak", "saved"):
        table.add_column(column, justify="left" if column in ("shape", "adapter") else "right", no_wrap=True)
    for row in rows:
        cells = [
            f"{row[what]:.2f} ({row[f'{what}_spread'][0]:.2f}-{row[f'{what}_spread'][1]:.2f})"
            for what in ("step", "decode")
        ]  # type: ignore[index]
        name = f"{row['shape']} x{row['layers']}, r={row['rank']}"
        memory = (f"{row[what]:.2f}" for what in ("peak", "saved"))
        table.add_row(name, str(row["adapter"]), f"{row['trainable']:,}", *cells, *memory)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if not HAS_PEFT:
        console.print("peft is not installed, so there is no row for its LoRA")
    if options.json:
        about = {key: value for key, value in vars(options).items() if key != "json"}
        versions = {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", *(["peft"] * HAS_PEFT))
        }
        about |= {"threads": torch.get_num_threads(), "versions": versions}
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
