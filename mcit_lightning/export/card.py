"""The model card that goes with an export: what it is, how it was trained, what it scored, how to load it."""

from pathlib import Path

import yaml

from mcit_lightning import __version__
from mcit_lightning.trained import Trained

PAPERS = {
    "branchlora": "Zhang et al., Enhancing Multimodal Continual Instruction Tuning with BranchLoRA, ACL 2025, arXiv 2506.02041",
    "dmole": "Ge et al., Dynamic Mixture of Curriculum LoRA Experts for Continual Multimodal Instruction Tuning, ICML 2025, "
    "arXiv 2506.11672",
    "moelora": "Chen et al., CoIN: A Benchmark of Continual Instruction Tuning for Multimodal Large Language Models, NeurIPS "
    "2024, arXiv 2403.08350",
}


def write_card(trained: Trained, folder: Path, *, adapter: str | None = None, merged: bool = False) -> None:
    """Write `README.md` into an export's folder.

    Args:
        adapter: which of the run's adapters the folder holds, where it has several.
        merged: the folder holds a whole model.
    """
    config = trained.config
    base = config.backbone.id
    front = {
        "base_model": base,
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["continual-learning", "multimodal-continual-instruction-tuning", str(config.strategy["name"])],
    }
    tasks = config.order[: trained.stage.row + 1]
    what = "The whole model with its adapters merged into the weights" if merged else "LoRA adapters in PEFT's format"
    part = f", adapter `{adapter}`" if adapter else ""
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {config.name}: {config.strategy['name']} after {trained.stage.name}",
        f"{what}{part}, tuned on {len(tasks)} task(s) in this order: {', '.join(tasks)}.",
        f"Base model: `{base}`. Made with mcit_lightning {__version__}, seed {config.seed}.",
        "## Loading",
        _loading(base, merged=merged),
        *_scores(trained),
        "## Training",
        f"```yaml\n{yaml.safe_dump(dict(config.strategy), sort_keys=False)}```",
    ]
    if paper := PAPERS.get(str(config.strategy["name"])):
        lines += [f"Method: {paper}."]
    lines += [
        "## Limits",
        "Scores are those of the run's own test splits. Licence and terms of use are those of the base model and of the tasks' "
        "data; whoever publishes this folder states them here. The router of a continual-learning method is not part of this "
        "folder: it answers as the named adapter does, for every input.",
    ]
    (folder / "README.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _loading(base: str, *, merged: bool) -> str:
    lines = ["```python", "from transformers import AutoModelForImageTextToText, AutoProcessor"]
    if merged:
        lines += [
            "",
            'model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder")',
            'processor = AutoProcessor.from_pretrained("path/to/this/folder")',
        ]
    else:
        lines += [
            "from peft import PeftModel",
            "",
            f'model = AutoModelForImageTextToText.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
            f'processor = AutoProcessor.from_pretrained("{base}")',
        ]
    return "\n".join([*lines, "```"])


def _scores(trained: Trained) -> list[str]:
    """Zero-shot and final score of every task, in percent."""
    results = trained.results
    if results is None:
        return []
    row = results.matrix.scores[trained.stage.row]
    rows = ["| task | metric | pretrained | after this stage |", "|---|---|---|---|"]
    for index, task in enumerate(results.tasks):
        cells = (None if results.zero_shot is None else results.zero_shot[index], row[index])
        if cells[1] is not None:
            shown = ["–" if cell is None else f"{cell:.1f}" for cell in cells]
            rows.append(f"| {task} | {results.metrics[task]} | {shown[0]} | {shown[1]} |")
    return ["## Scores (percent)", "\n".join(rows)] if len(rows) > 2 else []
