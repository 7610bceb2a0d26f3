from . import (
    adapters as adapters,
    course as course,
    experiments as experiments,
    forgetting as forgetting,
    plots as plots,
    reports as reports,
    spectrum as spectrum,
    tasks as tasks,
    training as training,
    widgets as widgets,
)
from ._base import errors as errors
from .adapters import (
    FullFineTuning as FullFineTuning,
    LinearProbe as LinearProbe,
    LoRA as LoRA,
    PeftMethod as PeftMethod,
    Variant as Variant,
    attach as attach,
    detach as detach,
    export as export,
    export_residual as export_residual,
    extract as extract,
    function_error as function_error,
    load as load,
    save as save,
    summary as summary,
)
from .experiments import Grid as Grid, Sweep as Sweep, advise as advise, sweep as sweep
from .forgetting import measure as measure, rewind as rewind
from .spectrum import (
    Spectrum as Spectrum,
    SpectrumSet as SpectrumSet,
    Window as Window,
    compare as compare,
    spectra as spectra,
    windows as windows,
)
from .tasks import Examples as Examples, Task as Task, evaluate as evaluate
from .training import Run as Run, Training as Training, finetune as finetune
