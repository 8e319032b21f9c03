"""Three runs in one folder on two processes each, for test_prediction_writer.py; prints the counts of each.

A program of its own: forked processes must not inherit the threads of a test session.
"""

import json
import sys
from pathlib import Path

from callbacks import PredictionWriter, StepProgressBar, TensorBoardInspector
from tests.tiny_run import predict


def main(run: Path) -> None:
    for missing in (None, "00003_image-3.json", None):
        if missing:
            (run / "rows" / missing).unlink()
        callbacks = (TensorBoardInspector(), PredictionWriter(), StepProgressBar())
        predict(run, *callbacks, devices=2, strategy="ddp_fork", enable_progress_bar=True)
        print(json.dumps(json.loads((run / "summary.json").read_text())["counts"]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
