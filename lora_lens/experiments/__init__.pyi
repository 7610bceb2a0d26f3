from . import continual as continual
from .advisor import Advice as Advice, advise_from as advise_from
from .continual import (
    continual_drifts as continual_drifts,
    continual_runs as continual_runs,
    continual_sweep as continual_sweep,
)
from .pilot import advise as advise
from .store import (
    answers as answers,
    curves as curves,
    drifts as drifts,
    experiment as experiment,
    pack as pack,
    runs as runs,
    watched as watched,
)
from .sweeps import Grid as Grid, sweep as sweep
