"""The plan of an experiment: what a run would do, need and lack. No weights and no pictures are read, and nothing is written."""

from dataclasses import dataclass

from rich.console import Console

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.dry_run.forecast import Forecast, forecast
from mcit_lightning.dry_run.inventory import KEY_ENCODER, Inventory, take_inventory
from mcit_lightning.dry_run.memory import Memory, count, estimate_memory, projector_size
from mcit_lightning.dry_run.skeleton import build_towers
from mcit_lightning.dry_run.steps import StageSteps, count_steps
from mcit_lightning.engine import planned_devices, resolve_precision
from mcit_lightning.validation import build_strategy


@dataclass
class Plan:
    """What a run would do.

    Args:
        config: the experiment.
        precision: Lightning's precision on this machine.
        devices: processes that train side by side.
        inventory: what there is of the data.
        steps: how long each stage trains.
        unknown: why nothing is known of the model; None where its configuration could be read.
        base: parameters of the model without adapters.
        projector: of these, the ones of the projector, if that trains.
        forecast: what the strategy adds; None where nothing is known of the model.
        memory: likewise.
    """

    config: ExperimentConfig
    precision: str
    devices: int
    inventory: Inventory
    steps: list[StageSteps]
    unknown: str | None = None
    base: int = 0
    projector: int = 0
    forecast: Forecast | None = None
    memory: Memory | None = None


def plan(config: ExperimentConfig) -> Plan:
    """Find out what a run of the experiment would do.

    Raises:
        ValueError: a configured target matches nothing in the model.
    """
    strategy = build_strategy({key: value for key, value in config.strategy.items() if key != KEY_ENCODER})
    strategy.tunes_projector = config.backbone.train_projector
    stages = strategy.stages(config.order)
    devices = planned_devices(config.trainer)
    inventory = take_inventory(config)
    rows = {task: used for (task, split), used in inventory.used.items() if split == "train"}
    steps = count_steps(config, stages, rows, devices, strategy.replay)
    found = Plan(config, resolve_precision(config.trainer), devices, inventory, steps)
    try:
        towers = build_towers(config.backbone)
    except ValueError as error:
        found.unknown = str(error)
        return found
    found.base = count(towers.model.parameters())
    found.projector = projector_size(towers) if config.backbone.train_projector else 0
    found.forecast = forecast(strategy, towers, stages)
    found.memory = estimate_memory(
        config, found.base, found.projector, towers, found.forecast, found.precision, devices
    )
    return found


def show(config: ExperimentConfig, console: Console | None = None) -> None:
    """Print the plan.

    Raises:
        ValueError: as `plan`.
    """
    from mcit_lightning.dry_run.tables import plan_tables

    (console or Console(highlight=False, soft_wrap=True)).print(plan_tables(plan(config)))
