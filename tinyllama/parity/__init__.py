"""Is it right? An independent float64 oracle, and measures against it relative to transformers' own error."""

from tinyllama.parity.measure import Difference, Verdict, difference, judge
from tinyllama.parity.oracle import oracle_logits

__all__ = ["Difference", "Verdict", "difference", "judge", "oracle_logits"]
