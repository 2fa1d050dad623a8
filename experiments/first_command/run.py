"""What the first command promises, over ten seeds: ten learned images against every other ten.

    python experiments/first_command/run.py --seed 20 --json

Runs `python -m hypergrad` on the split of this seed. The weight decay and the outer step size were chosen
on seeds 0 and 1, the rest of the setting on seeds 10 to 19; seeds 20 to 29 were run once, after that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments._common import experiment
from hypergrad._demo import images

RIVALS = ("mean_draw", "best_draw", "medoids", "class_means", "discriminant", "weights")


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    if options.smoke:
        images.DRAWS, images.RETRAINING = 10, 100
    outcome = images.run("implicit", options.seed, 3 if options.smoke else None)
    numbers |= {name: outcome.numbers[name] for name in (*RIVALS, "tuned", "all_real")}
    numbers["lead"] = numbers["tuned"] - max(numbers[name] for name in RIVALS)
    numbers["behind_all"] = numbers["all_real"] - numbers["tuned"]
    if not options.smoke:
        outcome.draw(str(options.out / "figure.png"))


if __name__ == "__main__":
    experiment(__file__, __doc__, measure)
