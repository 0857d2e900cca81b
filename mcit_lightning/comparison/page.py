"""The page of a comparison: one self-contained file, no network, no script, light and dark, readable on a phone."""

from html import escape
from pathlib import PurePath

from mcit_lightning.comparison.cost import cost_section
from mcit_lightning.comparison.curves import curves_section, matrices_section, plasticity_section
from mcit_lightning.comparison.freezing import freezing_section
from mcit_lightning.comparison.gallery import Gallery
from mcit_lightning.comparison.leaderboard import differences_section, leaderboard_section
from mcit_lightning.comparison.methods import Comparison
from mcit_lightning.comparison.placement import modality_section, placement_section
from mcit_lightning.comparison.routing import routing_section
from mcit_lightning.comparison.samples import PicturesOf, samples_section
from mcit_lightning.evaluation.formatting import NONE
from mcit_lightning.evaluation.page import render_page, section, shortened

PAGE_FILE = "comparison.html"


def comparison_page(comparison: Comparison, title: str, pictures: PicturesOf) -> tuple[str, Gallery]:
    """Draw everything.

    Args:
        comparison: what to show.
        title: heading.
        pictures: finds the test pictures of a run.

    Returns:
        The page, and its figures.
    """
    gallery = Gallery()
    body = [_header(comparison, title)]
    for group in comparison.groups:
        if len(comparison.groups) > 1:
            body.append(f'<h1 class="part" id="order{group.number}">Order {group.number}: {escape(group.order)}</h1>')
        body += [
            leaderboard_section(group, gallery),
            differences_section(group, comparison.reference, gallery),
            plasticity_section(group, gallery),
            curves_section(group, gallery),
            matrices_section(group, gallery),
            modality_section(group, gallery),
            placement_section(group, gallery),
            freezing_section(group, gallery),
            routing_section(group, gallery),
            cost_section(group, gallery),
            samples_section(group, pictures),
        ]
    body += [_settings(comparison), _runs(comparison)]
    return render_page(title, body), gallery


def _header(comparison: Comparison, title: str) -> str:
    runs, groups = comparison.runs, comparison.groups
    backbones = dict.fromkeys(_short_path(run.results.backbone) for run in runs)
    facts = {
        "Methods": str(len(comparison.names)),
        "Runs": str(len(runs)),
        "Seeds": ", ".join(map(str, sorted({run.results.seed for run in runs}))),
        "Backbone": ", ".join(backbones),
        **({"Tasks": groups[0].order} if len(groups) == 1 else {"Task orders": str(len(groups))}),
    }
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    notices = "".join(f'<p class="note">{escape(notice)}</p>' for notice in comparison.notices)
    links = "".join(f'<li><a href="#order{g.number}">Order {g.number}: {escape(g.order)}</a></li>' for g in groups)
    contents = f'<ul class="contents">{links}</ul>' if len(groups) > 1 else ""
    return f'<header><h1>{escape(title)}</h1><dl class="facts">{listed}</dl>{notices}{contents}</header>'


def _short_path(backbone: str) -> str:
    """The end of a local folder; a hub name as it is."""
    parts = PurePath(backbone).parts
    return "/".join(parts[-2:]) if PurePath(backbone).is_absolute() else backbone


def _settings(comparison: Comparison) -> str:
    """Keys outside the strategies in which the methods differ, each value with its methods."""
    rows = []
    for key, values in comparison.settings.items():
        methods: dict[str, list[str]] = {}
        for name, value in values.items():
            methods.setdefault(NONE if value is None else str(value), []).append(name)
        listed = "<br>".join(
            f"<b>{escape(shortened(value, 80))}</b>: {escape(', '.join(names))}" for value, names in methods.items()
        )
        rows.append(f"<dt><code>{escape(key)}</code></dt><dd>{listed}</dd>")
    if not rows:
        return ""
    why = "Keys outside the strategies in which the methods were not configured alike."
    return section("Settings that differ", why, f'<dl class="settings">{"".join(rows)}</dl>')


def _runs(comparison: Comparison) -> str:
    """Where the numbers come from."""
    parts = []
    for group in comparison.groups:
        for method in group.methods:
            listed = ", ".join(f"{run.folder} (seed {run.results.seed})" for run in method.runs)
            where = f"order {group.number}, " if len(comparison.groups) > 1 else ""
            parts.append(f"<dt>{escape(where + method.name)}</dt><dd>{escape(listed)}</dd>")
    return f'<details><summary>Runs</summary><dl class="settings">{"".join(parts)}</dl></details>'
