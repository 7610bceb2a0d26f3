from .attaching import attach as attach, detach as detach
from .exactness import function_error as function_error, summary as summary
from .exporting import export as export, export_residual as export_residual
from .methods import (
    PEFT_STARTS as PEFT_STARTS,
    FullFineTuning as FullFineTuning,
    LinearProbe as LinearProbe,
    LoRA as LoRA,
    Method as Method,
    PeftStart as PeftStart,
    Penalized as Penalized,
    Variant as Variant,
)
from .peft_starts import attach_start as attach_start
from .saving import load as load, save as save
