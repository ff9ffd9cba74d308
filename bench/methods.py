"""Which method wins where links are very uneven and data is not shared alike? Every method of the papers by name, and the main ablations.

    python bench/methods.py

Ten clients, Dirichlet(0.3), FedGMR's classes of high heterogeneity, reduced CNN on Fashion-MNIST, five local steps of batch 20, float32
both ways, three seeds; before that every row, ablations too, is run once with each of four learning rates on another seed, judged by the
devices' validation data (0.4 was tried too: three rows chose it, and then diverged with one or two of the other seeds). It goes on where it
was interrupted: what is finished lies in the folder.

    python bench/methods.py --precision

The methods of the papers and fedgmr-pace with updates of float32, int8 and int4 (error feedback), models as float16, each at the learning
rate that was chosen above, 900 virtual seconds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path

from cli.main import main as regrow

RESULTS = Path(__file__).parent / "results"
PAPERS = "fedgmr,prfl,fedavg,fedasync,fedfix,fedbuff,asyncfeded,heterofl,fjord,fedrolex,fiarse,subfedavg,fedmr"
METHODS = (
    f"{PAPERS},heterofl+restore,fjord+restore,fedrolex+restore,fiarse+restore,"
    "fedgmr-sync,fedgmr-no-buffer,fedgmr-no-restore,fedgmr-ga,fedgmr-fa,fedgmr-fixed,fedgmr-pace"
)
OPTIONS = ["--points", "100", "--validation", "0.05", "--journal-gb", "0"]
TUNE = ["--tune", "training.learning_rate=0.025,0.05,0.1,0.2", "--tune-seconds", "900"]
FLOAT32 = ["--set", 'wire.up="float32"', "--set", 'wire.down="float32"']
PRECISIONS = ["--grid", 'wire.up="float32","int8","int4"', "--set", 'wire.down="float16"']


def main() -> int:
    """Compare, then put summary and report where they are committed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"), help="of the task and of finished runs (default: %(default)s)")
    parser.add_argument("--precision", action="store_true", help="compare precisions too, at the learning rates of the main comparison")
    parser.add_argument("--methods", help="names, with commas between (default: all of them)")
    parser.add_argument("--seconds", help="virtual seconds of every run")
    parser.add_argument("--seeds", default="3", help="how many (default: %(default)s)")
    options = parser.parse_args()
    methods = options.methods or (f"{PAPERS},fedgmr-pace" if options.precision else METHODS)
    name = "methods-precision" if options.precision else "methods-fashion"
    task, out = options.folder / "fashion", options.folder / name
    if not (task / "task.toml").exists():
        regrow(["task", "new", str(task), "--model", "reduced_cnn"])
    more = [*_rates(methods.split(",")), *PRECISIONS] if options.precision else [*TUNE, *FLOAT32]
    words = [
        "compare",
        str(task),
        "--methods",
        methods,
        "--seconds",
        options.seconds or ("900" if options.precision else "3000"),
        "--seeds",
        options.seeds,
        *OPTIONS,
        "--set",
        "training.local_steps=5",
        *more,
        "--out",
        str(out),
    ]
    status = regrow(words)
    if status:
        return status
    summary = json.loads((out / "summary.json").read_text())
    summary["command"] = shlex.join(["python", "bench/methods.py", *sys.argv[1:]])
    (RESULTS / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    for file in ("report.html", "report.md", "curves.png"):
        shutil.copyfile(out / file, RESULTS / f"{name}-{file}")
    return 0


def _rates(methods: list[str]) -> list[str]:
    """What the main comparison chose for each method."""
    found = json.loads((RESULTS / "methods-fashion.json").read_text())["methods"]
    key = "training.learning_rate"
    return [word for method in methods for word in ("--set-for", f"{method}:{key}={found[method]['tuned'][key]}")]


if __name__ == "__main__":
    sys.exit(main())
