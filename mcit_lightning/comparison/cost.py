"""The page's part on cost: what trains, what must be kept, and how long it took."""

from html import escape

from mcit_lightning.comparison.gallery import Gallery
from mcit_lightning.comparison.measures import COSTS, SCORES, Measure
from mcit_lightning.comparison.methods import Group, method_html
from mcit_lightning.comparison.scatter import Point, scatter
from mcit_lightning.comparison.statistics import Estimate
from mcit_lightning.evaluation.formatting import NONE, bytes_text, count_text, number_text, seconds_text
from mcit_lightning.evaluation.page import legend, section

MILLION = 1e6


def cost_section(group: Group, gallery: Gallery) -> str:
    """A table, and the final score against the parameters that must be kept."""
    shown = [measure for measure in COSTS if any(measure.of(method) is not None for method in group.methods)]
    if not shown:
        return ""
    head = "".join(f'<th scope="col" title="{escape(measure.why)}">{measure.heading}</th>' for measure in shown)
    rows = "".join(
        f'<tr><th scope="row">{method_html(method)}</th>'
        + "".join(f"<td>{cost_text(measure.of(method), measure)}</td>" for measure in shown)
        + "</tr>"
        for method in group.ranked()
    )
    listed = "; ".join(f"{measure.heading}: {measure.why}" for measure in shown)
    return section(
        "Cost",
        "Means over the seeds. Times compare only between runs on the same, equally busy machine.",
        f'<div class="scroll"><table class="lines leaders"><thead><tr><th scope="col">Method</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
        f'<p class="soft small">{escape(listed)}. On a CPU, memory is the resident memory of the process.</p>',
        _scatter(group, gallery),
    )


def cost_text(value: Estimate | None, measure: Measure) -> str:
    """A mean cost for reading."""
    if value is None:
        return NONE
    if measure.key.endswith("_params"):
        return count_text(value.mean)
    return bytes_text(value.mean) if measure.key.endswith("_bytes") else seconds_text(value.mean)


def _scatter(group: Group, gallery: Gallery) -> str:
    final, stored = SCORES[0], COSTS[1]
    points = []
    for method in group.ranked():
        score = final.of(method)
        size = method.estimate(lambda run: None if (count := stored.value(run)) is None else count / MILLION)
        if score is not None and size is not None:
            points.append(Point(method.name, method.style, size, score))
    if len(points) < 2:
        return ""

    def digits(value: float) -> str:
        return number_text(value, digits=0 if max(p.x.mean for p in points) > 4 else 2)

    def draw(width: int) -> str:
        labels = ("Parameters to keep after the last stage, in millions", "Score at the end (MFN, percent)")
        title = "Final score against stored parameters"
        return scatter(
            points,
            width=width,
            height=380 if width > 600 else 320,
            title=title,
            labels=labels,
            zeros=(True, True),
            x_text=digits,
        )

    names = legend([(point.name, point.style) for point in points])
    return f"<h3>Score for its size</h3>{gallery.add_sizes(f'order{group.number}/score_size', draw, below=names)}"
