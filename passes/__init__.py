"""Graph passes: find attention, prove what its mask says, rewrite it, and record each decision."""

from .mask.prover import Prover
from .mask.refused import Refused
from .mask.terms import Mask
from .match.site import AttentionSite
from .report import Decision, Report
from .rewrite import rewrite

__all__ = ["AttentionSite", "Decision", "Mask", "Prover", "Refused", "Report", "rewrite"]
