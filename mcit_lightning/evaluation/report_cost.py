"""The report's tables of what each stage cost."""

from mcit_lightning.evaluation.formatting import NONE, bytes_text, count_text, number_text, seconds_text
from mcit_lightning.evaluation.page import line_table, section
from mcit_lightning.evaluation.results import CostRow, Results

OPTIONAL = ("Probe", "Router", "Routing per sample", "First time", "Generation per sample")
"""Columns that are there only if some stage has a value for them."""


def cost_section(results: Results) -> str:
    """Two tables with a row per stage; empty before the first one."""
    if not results.cost:
        return ""
    routed = results.routing is not None
    training, columns = _table([(entry.stage, _training(entry)) for entry in results.cost])
    evaluation, more = _table([(entry.stage, _evaluation(entry, routed=routed)) for entry in results.cost])
    why = ["Parameters that were trained in a stage and that must be kept after it, without the pretrained model."]
    if "Probe" in columns or "Router" in columns:
        why.append(
            "Probe and router: the work before the training that decides where adapters go and makes the router, also as a share "
            "of the training's time."
        )
    if "Routing per sample" in more:
        why.append("Routing: also as a share of the time for the sample's answer, generation included.")
    if "First time" in more:
        why.append("First time: of samples that the router had not seen before; it remembers the others.")
    return section("Cost", " ".join(why), "<h3>Training</h3>", training, "<h3>Evaluation</h3>", evaluation)


def _table(rows: list[tuple[str, dict[str, str]]]) -> tuple[str, list[str]]:
    """A table of the columns that have a value or must be there, and their names."""
    columns = [name for name in rows[0][1] if name not in OPTIONAL or any(values[name] != NONE for _, values in rows)]
    return line_table(
        ["Stage", *columns], [(stage, [values[name] for name in columns]) for stage, values in rows]
    ), columns


def _training(entry: CostRow) -> dict[str, str]:
    return {
        "Trainable": count_text(entry.trainable_params),
        "Stored": count_text(entry.stored_params),
        "Probe": _before(entry.proxy_seconds, entry.train_seconds),
        "Router": _before(entry.router_seconds, entry.train_seconds),
        "Time": seconds_text(entry.train_seconds),
        "Samples/s": number_text(entry.train_samples_per_second),
        "Peak memory": bytes_text(entry.peak_memory_bytes),
    }


def _evaluation(entry: CostRow, *, routed: bool) -> dict[str, str]:
    """Without a router there is no routing to time, only a call."""
    return {
        "Time": seconds_text(entry.eval_seconds),
        "Samples/s": number_text(entry.eval_samples_per_second),
        "Routing per sample": _routing(entry.routing_seconds_per_sample, entry) if routed else NONE,
        "First time": _routing(entry.first_routing_seconds_per_sample, entry) if routed else NONE,
        "Generation per sample": seconds_text(entry.generation_seconds_per_sample),
    }


def _before(seconds: float | None, training: float | None) -> str:
    if seconds is None or not training:
        return seconds_text(seconds)
    return f"{seconds_text(seconds)} ({100 * seconds / training:.1f} %)"


def _routing(routing: float | None, entry: CostRow) -> str:
    generation = entry.generation_seconds_per_sample
    if routing is None or not generation:
        return seconds_text(routing)
    return f"{seconds_text(routing)} ({100 * routing / (routing + generation):.0f} %)"
