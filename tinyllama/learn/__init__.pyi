from .judge import STEPS as STEPS
from .judge import Verdict as Verdict
from .tutor import Report as Report
from .tutor import Whole as Whole
from .tutor import check as check
