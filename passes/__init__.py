"""Graph passes: find attention, prove what its mask says, rewrite it, and record each decision."""

from .masks import Mask, NotProven, Prover
from .report import Decision, Report
from .rewrite import Refused, rewrite
from .site import AttentionSite

__all__ = ["AttentionSite", "Decision", "Mask", "NotProven", "Prover", "Refused", "Report", "rewrite"]
