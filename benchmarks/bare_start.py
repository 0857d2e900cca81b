"""What `boundaries.py` compares the framework with: a script without any framework, from its start to its first training step.

    python benchmarks/bare_start.py FOLDER --cpu-time      # FOLDER as `workload.build` writes it

It imports the libraries that a run of the framework imports, loads model and processor, puts LoRA of the given rank beside every
linear of the decoder, and takes one step of AdamW on the first rows of a task, with the loss on each row's last tokens, as many
as the longest answer has. Nothing of mcit_lightning is imported. Prints the clock after each part as JSON.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

CPU_TIME = "--cpu-time" in sys.argv


def clock() -> float:
    """Seconds of CPU time of this process, or of the day."""
    return time.process_time() if CPU_TIME else time.time()


import lightning.pytorch  # noqa: E402, F401
import omegaconf  # noqa: E402, F401
import rich  # noqa: E402, F401
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin  # noqa: E402


class LoRA(nn.Module):
    """y = W0 x + 2 B A x."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * F.linear(F.linear(x, self.a), self.b)


def load(folder: Path, rank: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model with adapters, and processor."""
    processor = AutoProcessor.from_pretrained(folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32).requires_grad_(False)
    decoder = model.get_decoder()
    for path, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(decoder.get_submodule(parent), name, LoRA(module, rank))
    return model.train(), processor


def first_step(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, task: str, size: int) -> None:
    """One optimizer step on the first rows of a task."""
    rows = json.loads((folder / task / "train.json").read_text(encoding="utf-8"))[:size]
    images = [Image.open(folder / row["image"]).convert("RGB") for row in rows]
    prompts = [row["conversations"][0]["value"] for row in rows]
    answers = [f"\n{row['conversations'][1]['value']}" for row in rows]
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    inputs = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    tail = max(len(ids) for ids in processor.tokenizer(answers)["input_ids"])  # answers end where rows end
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    hidden = model.base_model(**inputs).last_hidden_state[:, -tail - 1 : -1]
    logits = model.get_output_embeddings()(hidden)
    F.cross_entropy(logits.flatten(0, 1), inputs["input_ids"][:, -tail:].flatten()).backward()
    optimizer.step()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", default="colours")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time instead of giving the time of the day")
    options = parser.parse_args()
    found = {"imported": clock()}
    model, processor = load(options.folder, options.rank)
    found["loaded"] = clock()
    first_step(model, processor, options.folder, options.task, options.batch_size)
    found["stepped"] = clock()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
