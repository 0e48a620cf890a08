"""A picture of the layouts, if matplotlib is installed (the extra ``plots``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.sync.layouts import Layout

__all__ = ["plot_layouts"]


def plot_layouts(layouts: Sequence[Layout], path: Path) -> bool:
    """Bytes and requests per workload and layout, side by side. False when there is nothing to draw with or to draw."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    if not layouts:
        return False
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "silo"  # the same picture for the same numbers
    from matplotlib import pyplot

    workloads = list(dict.fromkeys(one.workload for one in layouts))
    names = list(dict.fromkeys(one.layout for one in layouts))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    width = 0.8 / len(names)
    for axes, quantity, label in (
        (panels[0], lambda one: one.upload_ratio, "bytes PUT ÷ bytes written"),
        (panels[1], lambda one: one.puts / one.cuts, "PUTs per cut"),
    ):
        for index, name in enumerate(names):
            found = {one.workload: quantity(one) for one in layouts if one.layout == name}
            places = [position + index * width for position in range(len(workloads))]
            axes.bar(places, [found.get(workload, 0) for workload in workloads], width, label=name)
        axes.set_xticks([position + 0.4 - width / 2 for position in range(len(workloads))], workloads)
        axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.tick_params(labelsize=8)
    panels[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
