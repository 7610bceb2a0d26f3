from . import continual as continual
from .advisor import Advice as Advice, advise_from as advise_from
from .continual import ContinualSweep as ContinualSweep, continual_sweep as continual_sweep
from .results import Sweep as Sweep
from .store import experiment as experiment, pack as pack
from .stored_advice import advise as advise
from .sweeps import Grid as Grid, sweep as sweep
