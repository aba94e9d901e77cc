from .architectures import Architecture as Architecture
from .architectures import describe as describe
from .errors import DataError as DataError
from .errors import GraftError as GraftError
from .errors import MissingExtra as MissingExtra
from .errors import ModelError as ModelError
from .errors import RecipeError as RecipeError
from .errors import SetupError as SetupError
from .evaluation.report import write_report as write_report
from .evaluation.result import Result as Result
from .folder import load as load
from .measure.fisher import FisherTrace as FisherTrace
from .measure.fisher import fisher_trace as fisher_trace
from .recipe import Recipe as Recipe
from .recipe import load_recipe as load_recipe
from .run import run_recipe as run_recipe
from .training.callback import ScheduledUnfreezing as ScheduledUnfreezing
from .training.dropout.guided import GuidedDropout as GuidedDropout
from .training.dropout.landscape import LossLandscape as LossLandscape
from .training.dropout.landscape import loss_landscape as loss_landscape
from .training.layers import TrainableLayers as TrainableLayers
from .training.layers import trainable_layers as trainable_layers
from .training.unfreezing import Unfreezer as Unfreezer

__version__: str
