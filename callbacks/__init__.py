"""What is attached to a run: the regulariser, files, pictures, progress."""

import equireg  # noqa: F401  its guard must run before lightning is imported
from callbacks.best_of import BestOf
from callbacks.equireg import EquiReg
from callbacks.prediction_writer import PredictionWriter
from callbacks.progress import StepProgressBar
from callbacks.state_grad import StateGrad
from callbacks.tensorboard import TensorBoardInspector

__all__ = ["BestOf", "EquiReg", "PredictionWriter", "StateGrad", "StepProgressBar", "TensorBoardInspector"]
