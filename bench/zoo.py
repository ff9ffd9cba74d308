"""Do the training programs of the zoo do what torch does? Gradients against float64, and loss curves against five torch seeds.

    python bench/zoo.py                     # gradients of the real models, 20 steps each (bench/parity.py)
    python bench/zoo.py --curves            # 500 steps on real data (bench/loss_curves.py), with a picture
    python bench/zoo.py --models vgg11 lstm # only these; what is known of the others stays

One thread. Rows say how much a model was narrowed for the curves; gradients are those of the real models (export/zoo.py).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from loss_curves import OUR_SEED, SETTINGS, SMOOTHED_STEPS, TORCH_SEEDS, curves_of
from machine import write_result
from parity import compare

from export.zoo import ZOO
from testbed.machine import machine

RESULT = Path(__file__).resolve().parent / "results" / "zoo.json"
PICTURE = RESULT.with_name("zoo-curves.png")
EXAMPLES = 4
"""Of a step in the comparison of gradients."""
POINT_STEPS = 10
SERIES = ("ours", "twin", "low", "high", "least", "most")
NOTE = "inside: bench/loss_curves.py; width 1 is the real model, and its shape and blocks are in export/zoo.py"


def gradients_row(name: str, steps: int) -> dict[str, Any]:
    started = time.perf_counter()
    found = compare(ZOO[name], ZOO[name].real, batch=EXAMPLES, steps=steps)
    bound = 1e-4 if any("running_mean" in key for key in ZOO[name].module(ZOO[name].real, 0).state_dict()) else 1e-5
    row = {"model": name, "shape": list(ZOO[name].real.shape), "batch": EXAMPLES, **asdict(found), "bound": bound}
    return row | {"holds": found.worst <= bound, "seconds": round(time.perf_counter() - started), "commit": machine()["commit"]}


def curves_row(name: str, steps: int) -> dict[str, Any]:
    started = time.perf_counter()
    setting, found = SETTINGS[name], curves_of(name, steps)
    low, high = found.interval()
    points = {"ours": found.ours, "twin": found.twin, "low": low, "high": high, "least": found.torch.min(0), "most": found.torch.max(0)}
    return {
        "model": name,
        "data": setting.data,
        "width": setting.variant.width,
        "shape": list(setting.variant.shape),
        "optimizer": setting.training.optimizer,
        "learning_rate": setting.training.learning_rate,
        "batch": setting.batch,
        "steps": steps,
        "share_inside": round(found.share_inside(found.ours), 4),
        "inside": found.share_inside(found.ours) >= 0.95,
        "share_inside_of_twin": round(found.share_inside(found.twin), 4),
        "furthest_from_twin": float(f"{np.max(np.abs(found.ours / found.twin - 1)):.2g}"),
        "share_between_least_and_most": round(found.share_between(), 4),
        "seconds": round(time.perf_counter() - started),
        "commit": machine()["commit"],
        **{key: " ".join(f"{value:.4g}" for value in array[::POINT_STEPS]) for key, array in points.items()},
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each model: the five torch runs as a band, the interval of a sixth, ours as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 4
    figure, axes = pyplot.subplots(-(-len(rows) // columns), columns, figsize=(14, 8), squeeze=False, layout="constrained")
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    for axis, row in zip(axes.flat, rows, strict=False):
        lines = {key: np.array(row[key].split(), float) for key in SERIES}
        steps = SMOOTHED_STEPS + POINT_STEPS * np.arange(len(lines["ours"]))
        axis.fill_between(steps, lines["low"], lines["high"], color="0.9", label="a sixth torch run, 95 %")
        axis.fill_between(steps, lines["least"], lines["most"], color="0.7", label="five torch runs")
        axis.plot(steps, lines["twin"], color="C0", label="torch, onnxruntime's seed")
        axis.plot(steps, lines["ours"], color="C3", linestyle="--", label="onnxruntime")
        axis.set(title=f"{row['model']} (width {row['width']:g}), {row['data']}", yscale="log", xlabel="step", ylabel="training loss")
    axes.flat[0].legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(ZOO), choices=list(ZOO), metavar="NAME", help="default: all")
    parser.add_argument("--curves", action="store_true", help="loss curves instead of gradients")
    parser.add_argument("--steps", type=int, help="of each model (default: 20, and 500 with --curves)")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default: bench/results/zoo.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kind = "curves" if args.curves else "gradients"
    for name in args.models:
        row = curves_row(name, args.steps or 500) if args.curves else gradients_row(name, args.steps or 20)
        known = json.loads(args.out.read_text()) if args.out.exists() else {"gradients": [], "curves": []}
        rows = {old["model"]: old for old in known[kind]} | {name: row}
        known[kind] = [rows[model] for model in ZOO if model in rows]
        setting = {
            "note": NOTE,
            "torch": torch.__version__,
            "torch_seeds": TORCH_SEEDS,
            "our_seed": OUR_SEED,
            "smoothed_steps": SMOOTHED_STEPS,
        }
        setting |= {"torch_threads": 1, "onnxruntime_threads": 1}
        result = {"command": "python bench/zoo.py; python bench/zoo.py --curves", "setting": setting}
        write_result(args.out, result | {part: known[part] for part in ("gradients", "curves")})
        print({key: value for key, value in row.items() if key not in SERIES}, flush=True)
    if args.curves:
        plot(json.loads(args.out.read_text())["curves"], args.out.with_name(PICTURE.name))


if __name__ == "__main__":
    main()
