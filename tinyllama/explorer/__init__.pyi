from .recording import Pass as Pass
from .recording import Recording as Recording
from .recording import record as record
