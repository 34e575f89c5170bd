from .record import Pass as Pass
from .record import Recording as Recording
from .record import record as record
