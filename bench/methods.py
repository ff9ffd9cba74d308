"""Which method wins where links are very uneven and data is not shared alike? Every method of the papers by name, and the main ablations.

    python bench/methods.py

Ten clients, Dirichlet(0.3), FedGMR's classes of high heterogeneity, reduced CNN on Fashion-MNIST, five local steps of batch 20, float32
both ways, three seeds; before that every method is run once with each of three learning rates on another seed, judged by the devices'
validation data. Ablations and restored methods take the learning rate of their base. It goes on where it was interrupted: what is finished
lies in the folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from cli.main import main as regrow

BENCH = Path(__file__).parent
METHODS = (
    "fedgmr,prfl,fedavg,fedasync,fedfix,fedbuff,asyncfeded,heterofl,fjord,fedrolex,fiarse,subfedavg,fedmr,"
    "heterofl+restore,fjord+restore,fedrolex+restore,fiarse+restore,"
    "fedgmr-sync,fedgmr-no-buffer,fedgmr-no-restore,fedgmr-ga,fedgmr-fa,fedgmr-fixed"
)
OPTIONS = {
    "--seeds": "3",
    "--seconds": "3000",
    "--points": "100",
    "--validation": "0.05",
    "--journal-gb": "0",
    "--tune": "training.learning_rate=0.05,0.1,0.2",
    "--tune-seconds": "900",
}
SETTINGS = ("training.local_steps=5", 'wire.up="float32"', 'wire.down="float32"')


def main() -> int:
    """Compare, then put summary and report where they are committed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"), help="of the task and of finished runs (default: %(default)s)")
    folder = parser.parse_args().folder
    task, out = folder / "fashion", folder / "compared"
    if not (task / "task.toml").exists():
        regrow(["task", "new", str(task), "--model", "reduced_cnn"])
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    options = [word for option in OPTIONS.items() for word in option]
    status = regrow(["compare", str(task), "--methods", METHODS, *options, "--tune-base", *settings, "--out", str(out)])
    if status:
        return status
    summary = json.loads((out / "summary.json").read_text())
    summary["command"] = "python bench/methods.py"
    (BENCH / "results" / "methods-fashion.json").write_text(json.dumps(summary, indent=1) + "\n")
    for name in ("report.html", "report.md", "curves.png"):
        shutil.copyfile(out / name, BENCH / "results" / f"methods-fashion-{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
