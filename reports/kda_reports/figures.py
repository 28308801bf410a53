"""The figures of the error report: each a set of panels, one per tensor, that share their axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from kda_reports import charts
from kda_reports.envelopes import (
    SMALLEST_DECAY,
    decay_panels,
    quantile_panels,
    size_panels,
    token_panels,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kda_reports.envelopes import Panel
    from kda_reports.errors import Standing

MOST_SIZES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Panels that share their axes, and what must be known to read them.

    Attributes
    ----------
    identifier
        Anchor on the page.
    caption
        What is plotted.
    x_name
        Column head of the position in the table beside each panel.
    panels
        Each with its drawing.
    """

    identifier: str
    title: str
    caption: str
    x_name: str
    panels: Sequence[tuple[Panel, Markup]]

    @property
    def num_measures(self) -> int:
        """Return how many measured tensors the figure shows."""
        return sum(series.num_measures for panel, _ in self.panels for series in panel.series)


def figures(standings: Sequence[Standing]) -> list[Figure]:
    """Return the figures of the report; one without panels has nothing to show."""
    tokens, decays = token_panels(standings), decay_panels(standings)
    shares = quantile_panels(standings)
    return [
        _figure(
            standings,
            shares,
            identifier="distribution",
            title="How errors are distributed",
            caption="Score that a share of the measured tensors does not exceed, of each output and gradient; at the right end the worst.",
            x_name="share of measured tensors",
            x_domain=(0.0, 1.0),
        ),
        _figure(
            standings,
            tokens,
            identifier="by-token",
            title="Along the sequence",
            caption="Largest error over bound at each token position: the maximum over all calls, heads and channels.",
            x_name="first token",
            x_title="token",
            x_domain=(0.0, max(_largest_x(tokens), 1.0)),
        ),
        _figure(
            standings,
            decays,
            identifier="by-decay",
            title="Against accumulated decay",
            caption="Largest error over bound against the decay accumulated since the sequence began, averaged over "
            "channels (nats, logarithmic axis; the leftmost bin holds all that is less).",
            x_name="decay from (nats)",
            x_title="accumulated decay (nats)",
            x_domain=(SMALLEST_DECAY, max(_largest_x(decays), 1.0)),
            log_x=True,
        ),
        _against_size(standings, "T", "tokens", "number of tokens"),
        _against_size(standings, "K", "width", "width of a key head"),
    ]


def _against_size(standings: Sequence[Standing], letter: str, identifier: str, what: str) -> Figure:
    panels = size_panels(standings, letter)
    sizes = sorted({x for panel in panels for series in panel.series for x, _ in series.points}) or [1.0]
    # The end of the axis says more than an even spacing.
    shown = (
        sizes if len(sizes) <= MOST_SIZES else [*sizes[:: -(-len(sizes) // MOST_SIZES)][: MOST_SIZES - 1], sizes[-1]]
    )
    return _figure(
        standings,
        panels,
        identifier=f"by-{identifier}",
        title=f"Against {letter}",
        caption=f"Largest score over all calls, against the {what} {letter}, in bins that begin at powers of two (logarithmic axis; "
        "0 counts as 1).",
        x_name=f"{letter} from",
        x_title=letter,
        x_domain=(sizes[0] / 1.2, sizes[-1] * 1.2),
        log_x=True,
        ticks=shown,
    )


def _figure(
    standings: Sequence[Standing],
    panels: Sequence[Panel],
    *,
    identifier: str,
    title: str,
    caption: str,
    x_name: str,
    x_domain: tuple[float, float],
    x_title: str | None = None,
    log_x: bool = False,
    ticks: Sequence[float] = (),
) -> Figure:
    frame = charts.Frame(
        names=[standing.name for standing in standings],
        top=charts.top_of(panels),
        x_title=x_title or x_name,
        x_domain=x_domain,
        log_x=log_x,
        ticks=ticks,
    )
    # The only foreign text in a drawing are names of implementations, which the renderer escapes.
    drawn = [(panel, Markup(charts.without_namespaces(charts.draw(panel, frame)))) for panel in panels]  # noqa: S704
    return Figure(identifier=identifier, title=title, caption=caption, x_name=x_name, panels=drawn)


def _largest_x(panels: Sequence[Panel]) -> float:
    return max((x for panel in panels for series in panel.series for x, _ in series.points), default=0.0)
