"""Grouping runs for a comparison: by task order, then by method, whose runs differ in nothing but their seed."""

from collections.abc import Iterable, Sequence
from typing import Any

from mcit_lightning.comparison.find import Run
from mcit_lightning.comparison.methods import Comparison, Group, Method
from mcit_lightning.registry import nearest
from mcit_lightning.rundir import MAY_CHANGE

NAMED = 6
"""Runs and keys that a notice names at most."""
OF_A_RUN = ("seed", "order", "name", *MAY_CHANGE)
"""Keys in which the runs of a method may differ."""
OF_A_METHOD = ("strategy", "callbacks", "imports")
"""Keys in which methods are meant to differ."""


def compare_runs(runs: Sequence[Run], left_out: Sequence[str] = (), reference: str | None = None) -> Comparison:
    """Group runs.

    Args:
        runs: finished ones.
        left_out: what was found and cannot be compared.
        reference: name of a method; None takes `sequential` if it is there, else the method that ends best.

    Raises:
        ValueError: the same seed of the same method twice, or an unknown reference.
    """
    named, notices = _methods(runs)
    styles = {name: number for number, name in enumerate(named)}
    orders: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    for name, own in named.items():
        for run in own:
            orders.setdefault(tuple(run.results.tasks), {}).setdefault(name, []).append(run)
    groups = [
        Group(list(tasks), [Method(name, styles[name], _by_seed(name, own)) for name, own in methods.items()], number)
        for number, (tasks, methods) in enumerate(orders.items(), start=1)
    ]
    settings = _settings(named)
    if left_out:
        more = f"; and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        notices.insert(0, f"Left out: {'; '.join(left_out[:NAMED])}{more}.")
    notices = [
        *notices,
        *_group_notices(groups),
        *_metric_notices(groups),
        *_seed_notices(groups),
        *_setting_notices(settings),
    ]
    return Comparison(groups, _reference(groups, reference), notices, settings)


def _methods(runs: Sequence[Run]) -> tuple[dict[str, list[Run]], list[str]]:
    """Name -> runs that differ only in seed and order; a name that stands for more settings is numbered."""
    kinds: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        print_of = repr(_identity(run.settings) or (run.results.experiment, run.results.strategy))
        kinds.setdefault(run.name, {}).setdefault(print_of, []).append(run)
    methods: dict[str, list[Run]] = {}
    notices = []
    for name, variants in kinds.items():
        lists = list(variants.values())
        methods[name] = lists[0]
        for number, own in enumerate(lists[1:], start=2):
            methods[f"{name} ({number})"] = own
            changed = _changed(lists[0][0].settings, own[0].settings)
            notices.append(
                f"{name} ({number}) ({own[0].folder}, ...) is apart from {name} ({lists[0][0].folder}, ...), because its "
                f"settings differ: {'; '.join(changed[:NAMED])}{'; ...' if len(changed) > NAMED else ''}."
            )
    return methods, notices


def _identity(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted((key, value) for key, value in settings.items() if not _below(key, OF_A_RUN))


def _changed(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {one.get(key)!r} and {two.get(key)!r}"
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key) and not _below(key, OF_A_RUN)
    ]


def _below(key: str, parents: Iterable[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _by_seed(name: str, runs: list[Run]) -> list[Run]:
    found: dict[int, Run] = {}
    for run in runs:
        other = found.setdefault(run.results.seed, run)
        if other is not run:
            raise ValueError(
                f"{other.folder} and {run.folder}: are both {name} with seed {run.results.seed} on the same tasks, "
                "and a seed counts once; name only one of them"
            )
    return [found[seed] for seed in sorted(found)]


def _settings(named: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Keys outside the strategies in which methods differ; a method without a configuration is left out."""
    known = {name: runs[0].settings for name, runs in named.items() if runs[0].settings}
    keys = sorted(
        {key for settings in known.values() for key in settings if not _below(key, (*OF_A_RUN, *OF_A_METHOD))}
    )
    values = {key: {name: settings.get(key) for name, settings in known.items()} for key in keys}
    return {key: own for key, own in values.items() if len({repr(value) for value in own.values()}) > 1}


def _group_notices(groups: list[Group]) -> list[str]:
    sets = {frozenset(group.tasks) for group in groups}
    if len(sets) > 1:
        listed = "; ".join(f"{len(g.methods)} methods on {g.order}" for g in groups)
        return [f"The runs are of {len(sets)} different task sets, which do not compare with each other: {listed}."]
    if len(groups) > 1:
        return [f"The {len(groups)} task orders are shown apart: nothing is averaged over orders."]
    return []


def _metric_notices(groups: list[Group]) -> list[str]:
    for group in groups:
        metrics = group.methods[0].runs[0].results.metrics
        if len(set(metrics.values())) > 1:
            listed = ", ".join(f"{task}: {metric}" for task, metric in metrics.items())
            return [f"The means run over different metrics ({listed})."]
    return []


def _seed_notices(groups: list[Group]) -> list[str]:
    notices = []
    for group in groups:
        counts = {method.name: len(method.runs) for method in group.methods}
        where = f" (order {group.number})" if len(groups) > 1 else ""
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            notices.append(f"The methods have different numbers of seeds{where}: {listed}.")
        few = [name for name, count in counts.items() if count < 3]
        if few:
            which = f" of {', '.join(few)}" if len(few) < len(counts) else ""
            notices.append(
                f"Fewer than three seeds{which}{where}: a mean of so few says little, and its interval is very wide."
            )
    return notices


def _setting_notices(settings: dict[str, dict[str, Any]]) -> list[str]:
    if not settings:
        return []
    return [f"The methods differ in more than the strategy: {', '.join(settings)} (see Settings that differ)."]


def _reference(groups: list[Group], wanted: str | None) -> str:
    known = list(dict.fromkeys(method.name for group in groups for method in group.methods))
    if wanted is not None:
        if wanted not in known:
            raise ValueError(f"reference={wanted}: no such method among the runs. {nearest(wanted, known)}")
        return wanted
    if "sequential" in known:
        return "sequential"
    plain = next((m.name for g in groups for m in g.methods if m.strategy == "sequential"), None)
    ranked = [method for method in groups[0].ranked() if method.bound is None] or groups[0].ranked()
    return plain or ranked[0].name
