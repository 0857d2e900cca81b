"""The page's first part: who is ahead, by how much, and how sure that is."""

from html import escape

from mcit_lightning.comparison.gallery import Gallery
from mcit_lightning.comparison.intervals import Row, interval_plot
from mcit_lightning.comparison.measures import SCORES, Measure, best_of, shown_scores
from mcit_lightning.comparison.methods import Group, Method, method_html
from mcit_lightning.comparison.statistics import Estimate, paired
from mcit_lightning.evaluation.formatting import NONE, number_text
from mcit_lightning.evaluation.page import section

FINAL = SCORES[0]
"""The score by which methods are ranked."""
PERCENT = (0.0, 100.0)


def leaderboard_section(group: Group, gallery: Gallery) -> str:
    """A drawing of the final scores, and the table of all of them."""
    ranked = [(method, final) for method in group.ranked() if (final := FINAL.of(method)) is not None]
    drawn = ""
    if ranked:
        rows = [Row(method.name, method.style, final, method.bound or "") for method, final in ranked]
        limits = (0.0, max(100.0, *(seed for _, final in ranked for seed in final.values)))

        def draw(width: int) -> str:
            return interval_plot(rows, width=width, title="Final score of every method", limits=limits, zero=True)

        drawn = gallery.add_sizes(f"order{group.number}/leaderboard", draw)
    measures = shown_scores(group)
    listed = "; ".join(f"{measure.heading}: {measure.why}" for measure in measures)
    return section(
        "Leaderboard",
        "Mean score after the last stage (MFN, percent). Dot: mean over the seeds; line and ±: 95 % t-interval over the seeds, "
        "none for a single one; rings: seeds.",
        drawn,
        _table(group, measures),
        f'<p class="soft small">{escape(listed)}. Bold: the best mean; bounds are not ranked.</p>',
    )


def _table(group: Group, measures: list[Measure]) -> str:
    best = {measure.key: best_of(measure, group) for measure in measures}
    head = "".join(f'<th scope="col" title="{escape(measure.why)}">{measure.heading}</th>' for measure in measures)
    rows = []
    for method in group.ranked():
        cells = "".join(
            f"<td>{_cell(measure.of(method), measure, bold=method.name in best[measure.key])}</td>"
            for measure in measures
        )
        note = f' <span class="soft">{method.bound}</span>' if method.bound else ""
        rows.append(f'<tr><th scope="row">{method_html(method, note)}</th><td>{len(method.runs)}</td>{cells}</tr>')
    return (
        '<div class="scroll"><table class="lines leaders"><thead><tr><th scope="col">Method</th><th scope="col">Seeds</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(value: Estimate | None, measure: Measure, *, bold: bool) -> str:
    if value is None:
        return NONE
    mean = number_text(value.mean, signed=measure.signed)
    text = f"<b>{mean}</b>" if bold else mean
    return text if value.half is None else f'{text} <span class="soft">± {number_text(value.half)}</span>'


def differences_section(group: Group, reference: str, gallery: Gallery) -> str:
    """Each method less the reference, seed by seed; empty if that is the only method with a score."""
    base = next((method for method in group.methods if method.name == reference), None)
    if base is None:
        return ""
    parts = []
    for key in ("MFN", "BWT"):
        measure = next(measure for measure in SCORES if measure.key == key)
        rows = [
            Row(method.name, method.style, found, _wins(found))
            for method in group.ranked()
            if method is not base and (found := difference(method, base, measure)) is not None
        ]
        if not rows:
            continue

        def draw(width: int, rows: list[Row] = rows, key: str = key) -> str:
            title = f"Difference in {key} to {reference}"
            return interval_plot(rows, width=width, title=title, limits=(-100.0, 100.0), zero=True, signed=True)

        parts.append(f"<h3>{key}: {measure.why}</h3>{gallery.add_sizes(f'order{group.number}/difference_{key}', draw)}")
    if not parts:
        return ""
    return section(
        f"Paired differences to {escape(reference)}",
        "Method less reference with the same seed, in points: mean, 95 % t-interval and seeds. An interval that does not touch "
        "zero is a difference that another seed would be unlikely to turn round; with many methods some will be so by chance, "
        "as the intervals are not corrected for their number. n/m: seeds in which the method is ahead.",
        *parts,
    )


def difference(method: Method, base: Method, measure: Measure) -> Estimate | None:
    """Mean over the common seeds of a measure's difference between two methods."""
    return paired(method.by_seed(measure.value), base.by_seed(measure.value))


def _wins(value: Estimate) -> str:
    return f"{sum(seed > 0 for seed in value.values)}/{len(value.values)}"
