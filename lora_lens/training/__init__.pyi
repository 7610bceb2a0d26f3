from .finetuning import finetune as finetune
from .forgetting_callback import ForgettingCallback as ForgettingCallback
from .forgetting_monitor import ForgettingMonitor as ForgettingMonitor
from .record import Before as Before
from .regularizers.base import Regularized as Regularized, Regularizer as Regularizer
from .regularizers.ewc import EWC as EWC
from .regularizers.kl_anchor import KLAnchor as KLAnchor
from .regularizers.l2_to_initial import L2ToInitial as L2ToInitial
from .regularizers.orthogonal import Orthogonal as Orthogonal
from .regularizers.replay import Replay as Replay
from .run import Progress as Progress, Run as Run
from .settings import Training as Training, fastest_precision as fastest_precision
