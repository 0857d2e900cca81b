"""A plan as text for the terminal, 80 columns wide where names allow it."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mcit_lightning.data.records import Split
from mcit_lightning.dry_run import Plan
from mcit_lightning.dry_run.forecast import Forecast, Range
from mcit_lightning.dry_run.inventory import KEY_ENCODER, SPLITS
from mcit_lightning.dry_run.memory import Memory
from mcit_lightning.dry_run.steps import StageSteps
from mcit_lightning.evaluation.formatting import NONE, bytes_text, count_text
from mcit_lightning.verify.rows import data_root

ABOUT = "~"
"""Before a number that follows from the published number of rows."""


def plan_tables(plan: Plan) -> Group:
    """Tasks, stages, adapters, memory, and what is missing."""
    config = plan.config
    head = Text.assemble(
        (config.name, "bold"), f": {config.strategy['name']} on {config.backbone.id}, {plan.precision}"
    )
    parts: list[RenderableType] = [head, Text(), _tasks(plan), Text(), _stages(plan), Text()]
    if plan.forecast is None or plan.memory is None:
        parts += [Text(f"adapters and memory unknown: {plan.unknown}", style="yellow"), Text()]
    else:
        if plan.forecast.modules:
            parts += [_adapters(plan.forecast), Text()]
        parts += [_memory(plan, plan.memory), Text()]
        if plan.config.strategy.get(KEY_ENCODER) is not None:
            parts += [
                Text(f"strategy.{KEY_ENCODER} is a model of its own, which is not counted here", style="yellow"),
                Text(),
            ]
    findings = {
        "broken (mcit-lightning data verify lists every row)": plan.inventory.broken,
        "missing": plan.inventory.missing,
    }
    for title, lines in findings.items():
        if lines:
            parts += [Text(title, style="bold red"), *_lines(lines), Text()]
    if any(key.startswith("tasks.") for key, _ in plan.inventory.missing):
        parts += [_where(plan), Text()]
    if not plan.inventory.broken and not plan.inventory.missing:
        parts.append(Text("nothing is missing"))
    parts.append(Text("dry run: nothing was loaded, trained or written", style="dim"))
    return Group(*parts)


def _tasks(plan: Plan) -> Table:
    title = "rows in use" + (f" ({ABOUT}: as published, the file is not here)" if plan.inventory.estimated else "")
    table = _table(title, ("task",), ("train", "val", "test"))
    table.add_column("metric")
    for name in plan.config.order:
        task = plan.config.tasks[name]
        cells = [_rows(plan, name, split) if getattr(task, split) else "" for split in SPLITS]
        table.add_row(Text(name), *cells, task.metric)
    return table


def _rows(plan: Plan, task: str, split: Split) -> str:
    used = plan.inventory.used.get((task, split))
    rows = plan.inventory.rows.get((task, split))
    if used is None:
        return NONE
    if rows is None:
        return f"{ABOUT}{used:,}"
    return f"{used:,}" if used == rows else f"{used:,} of {rows:,}"


def _where(plan: Plan) -> Text:
    """Where missing files can be had and where they are looked for."""
    data = plan.config.data
    get = f"the files: {data.source}\n" if data.source else ""
    return Text(
        f"{get}they are looked for below data.root, {data_root(plan.config)}; data.root=FOLDER names another place"
    )


def _stages(plan: Plan) -> RenderableType:
    config = plan.config
    if not plan.steps:
        return Text("no training: the model is only evaluated")
    accumulate = int(config.trainer.get("accumulate_grad_batches", 1))
    title = f"training: {plan.devices} device{'s' if plan.devices > 1 else ''}"
    title += f", {accumulate} micro-batches per step" if accumulate > 1 else ""
    table = _table(title, ("stage",), ("samples", "epochs", "batch", "per step", "steps", "trainable"))
    forecasts = [] if plan.forecast is None else plan.forecast.stages
    for number, steps in enumerate(plan.steps):
        about = _about(plan, [steps])
        trainable = _range(forecasts[number].trainable.plus(plan.projector)) if forecasts else NONE
        table.add_row(
            Text(steps.stage.name),
            NONE if steps.rows is None else f"{about}{steps.rows:,}",
            str(steps.epochs),
            str(steps.batch_size),
            str(steps.batch_size * plan.devices * accumulate),
            NONE if steps.steps is None else f"{about}{steps.steps:,}",
            trainable,
        )
    known = [steps.steps for steps in plan.steps if steps.steps is not None]
    if len(plan.steps) > 1 and known:
        more = f"{_about(plan, plan.steps)}{sum(known):,}" + ("" if len(known) == len(plan.steps) else " +")
        table.add_row("total", "", "", "", "", more, "", style="bold")
    return table


def _about(plan: Plan, stages: Sequence[StageSteps]) -> str:
    """What stands before a number of steps or samples: nothing where every row was counted."""
    tasks = {(task, "train") for steps in stages for task in steps.stage.train}
    return "" if tasks.isdisjoint(plan.inventory.estimated) else ABOUT


def _adapters(forecast: Forecast) -> Group:
    parameters = "parameters, if adapted" if forecast.choice else "parameters"
    table = _table("linears with adapters", ("tower", "linears"), ("modules", parameters))
    for tower, end, modules, size in forecast.modules:
        table.add_row(tower, end, f"{modules:,}", count_text(size))
    modules, size = sum(row[2] for row in forecast.modules), sum(row[3] for row in forecast.modules)
    table.add_row("total", "", f"{modules:,}", count_text(size), style="bold")
    return Group(table, *([Text(forecast.choice)] if forecast.choice else []))


def _memory(plan: Plan, memory: Memory) -> Table:
    data, backbone = plan.config.data, plan.config.backbone
    table = _table("memory of each device while it trains (estimate)", ("what",), ("",))
    table.show_header = False
    table.add_row(f"model, {count_text(plan.base)} parameters", bytes_text(memory.base))
    if memory.training:
        table.add_row("adapters and routers after the last stage", bytes_text(memory.stored))
        table.add_row("gradients and Adam", bytes_text(memory.training))
        how = "recomputed" if backbone.activation_checkpointing else "kept"
        what = f"activations ({how}), roughly, at {data.max_length} tokens a sample"
        table.add_row(what, bytes_text(memory.activations))
        table.add_row("together", bytes_text(memory.total), style="bold")
    return table


def _range(number: Range) -> str:
    if number.low is None:
        return f"up to {count_text(number.high)}"
    if number.low == number.high:
        return count_text(number.high)
    return f"{count_text(number.low)} to {count_text(number.high)}"


def _lines(lines: Sequence[tuple[str, str]]) -> list[Text]:
    width = max(len(key) for key, _ in lines)
    return [Text.assemble(f"  {key:<{width}}  ", what) for key, what in lines]


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table
