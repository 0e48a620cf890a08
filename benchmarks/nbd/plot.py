"""A picture of the ratios, if matplotlib is installed (the extra ``plots``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.nbd.report import Measured, best_ratio

__all__ = ["plot_ratios"]


def plot_ratios(measured: Sequence[Measured], path: Path) -> bool:
    """Draw one bar per row of ours ÷ the better of the others. False when there is nothing to draw with or to draw."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "silo"  # the same picture for the same numbers
    from matplotlib import pyplot

    bars = [
        (f"{one.cell.name}  {one.transport}  {name.removeprefix('silo-')}", found[1])
        for one in measured
        for name in one.ours()
        if (found := best_ratio(one, name)) is not None
    ]
    if not bars:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 0.24 * len(bars) + 1), layout="constrained")
    labels = [label for label, _ in bars]
    medians = [summary.median for _, summary in bars]
    spread = [
        [summary.median - summary.low for _, summary in bars],
        [summary.high - summary.median for _, summary in bars],
    ]
    colours = ["tab:blue" if median >= 1 else "tab:orange" for median in medians]
    axes.barh(labels, medians, xerr=spread, color=colours, error_kw={"linewidth": 0.8, "ecolor": "0.3"})
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(
        "requests per second, ours ÷ the better of nbdkit and qemu-nbd (median, minimum, maximum)"
    )
    axes.tick_params(labelsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
