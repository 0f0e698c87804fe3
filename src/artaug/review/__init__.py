"""A person decides which pairs are kept: a review page, its server, and the decisions on disk."""

from artaug.review.decisions import pair_digest
from artaug.review.filter import HumanQueue, HumanVerdicts, Standing

__all__ = ["HumanQueue", "HumanVerdicts", "Standing", "pair_digest"]
