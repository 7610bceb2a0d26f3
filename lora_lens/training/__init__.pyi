from .loop import Progress as Progress, Run as Run, finetune as finetune
from .memories import EWC as EWC, Memory as Memory, Orthogonal as Orthogonal, Replay as Replay
from .penalties import KLAnchor as KLAnchor, L2ToInitial as L2ToInitial
from .settings import Training as Training, fastest_precision as fastest_precision
