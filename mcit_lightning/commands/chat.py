"""`mcit-lightning chat RUN --image FILE`: ask a trained model, and see where it routes the question."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcit_lightning.trained import Trained

PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Run, pictures and questions."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="may be given again")
    parser.add_argument(
        "--ask", action="append", default=[], metavar="TEXT", help="a question; without one, they are read line by line"
    )
    parser.add_argument("--stage", metavar="NAME", help="the model after this stage; the last trained one by default")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (64)")


def command(options: argparse.Namespace) -> int:
    """Answer every question about the pictures. Questions do not see earlier ones.

    Raises:
        ValueError: no run, no such stage, or a picture that cannot be read.
    """
    from rich.console import Console

    from mcit_lightning.commands.quiet import quiet_libraries
    from mcit_lightning.trained import load_trained

    for image in options.image:
        if not image.is_file():
            raise ValueError(f"--image: no file {image}")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: is {options.max_new_tokens}, must be at least 1")
    quiet_libraries()
    trained = load_trained(options.run_folder, options.stage)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for question in _questions(options.ask):
        text, routed = answer(trained, question, options.image, options.max_new_tokens)
        console.print(text, style="bold")
        if routed is not None:
            console.print(f"routed to: {', '.join(routed) or 'no task, the pretrained model answers'}", style="dim")
    return 0


def answer(trained: "Trained", question: str, images: list[Path], max_new_tokens: int) -> tuple[str, list[str] | None]:
    """The model's answer to one question, and the tasks whose experts gave it (None if the strategy does not route).

    Raises:
        ValueError: a picture cannot be read, or the question holds the image token.
    """
    import torch

    from mcit_lightning.data.collate import EvalCollator, ReadsSamples
    from mcit_lightning.data.records import Sample
    from mcit_lightning.generation import generate_answers

    module, config = trained.module, trained.config
    collator = EvalCollator(module.processor, config.prompt)
    collator.reader = module.strategy.sample_reader() if isinstance(module.strategy, ReadsSamples) else None
    pictures = tuple(str(path.absolute()) for path in images)
    batch: dict[str, Any] = collator([Sample("0", "", pictures, (("user", question),))])
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=module.model.dtype == torch.bfloat16)
    with torch.no_grad(), autocast, module.strategy.routing(module.towers, batch, None):
        inputs = module.strategy.inputs(batch)
        (text,) = generate_answers(module.model, module.processor, inputs, max_new_tokens, collator.encoder.end_id)
    routed = module.strategy.routed_to()
    return text, None if routed is None else routed[0]


def _questions(given: list[str]) -> Iterator[str]:
    """The questions of the command line, or the lines of the standard input until it ends."""
    if given:
        yield from given
        return
    typing = sys.stdin.isatty()
    while True:
        if typing:
            sys.stderr.write(PROMPT)
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
