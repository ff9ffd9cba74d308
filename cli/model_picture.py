"""The picture of `regrow model check`: how large every layer is, and how much of it each level keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regrow.errors import UsageError

ROW_INCHES = 0.28


def draw(report: dict[str, Any], densities: Sequence[float], path: Path) -> None:
    """Write a picture of a report: bars of parameters to the left, the share of every layer that each level keeps to the right.

    Raises:
        LocalError: matplotlib knows no such kind of file.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    layers = report["layers"]
    height = 1.6 + ROW_INCHES * len(layers)
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(11, height), width_ratios=(2, 3), layout="constrained")
    places = range(len(layers))
    colours = ["tab:gray" if layer["always_kept"] else "tab:blue" for layer in layers]
    left.barh(places, [layer["parameters"] for layer in layers], color=colours)
    left.set_xscale("log")
    left.set_yticks(places, [f"{layer['name']}  {'x'.join(map(str, layer['shape']))}" for layer in layers], fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("parameters (grey: in every sub-model)")
    right.imshow([layer["kept"] for layer in layers], aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    if len(densities) <= 10:
        for row, layer in enumerate(layers):
            for column, share in enumerate(layer["kept"]):
                right.text(column, row, f"{share:.2g}", ha="center", va="center", fontsize=6, color="black" if share > 0.6 else "white")
    step = -(-len(densities) // 10)
    right.set_xticks(range(0, len(densities), step), [f"{density:g}" for density in densities[::step]])
    right.set_xlabel("density of the level; colour: share of the layer that it keeps")
    figure.suptitle(f"{report['model']}: {report['parameters']} parameters", fontsize=10)
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:
        raise UsageError(f"--picture {path}: {error}; name a file that ends in .png") from error
    finally:
        plt.close(figure)
