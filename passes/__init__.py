"""Graph passes: find attention, prove what its mask says, rewrite it, and record each decision."""

from .mask.prover import Mask, NotProven, Prover
from .match.site import AttentionSite
from .report import Decision, Report
from .rewrite import Refused, rewrite

__all__ = ["AttentionSite", "Decision", "Mask", "NotProven", "Prover", "Refused", "Report", "rewrite"]
