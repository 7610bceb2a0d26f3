from .adapted_share import coverage as coverage
from .adopting import adopt as adopt
from .attaching import attach as attach, detach as detach
from .exactness import function_error as function_error, summary as summary
from .exporting import export as export, export_residual as export_residual
from .extracting import extract as extract
from .methods import (
    FullFineTuning as FullFineTuning,
    LinearProbe as LinearProbe,
    LoRA as LoRA,
    Method as Method,
)
from .model_card import push_to_hub as push_to_hub
from .peft_methods import PeftMethod as PeftMethod
from .peft_starts import PEFT_STARTS as PEFT_STARTS
from .saving import load as load, save as save
from .variant import Variant as Variant
