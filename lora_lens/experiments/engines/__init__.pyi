from .attempts import by_itself as by_itself
from .choice import chosen_engine as chosen_engine
from .missing_runs import missing as missing, run_missing as run_missing
from .protocol import Engine as Engine
