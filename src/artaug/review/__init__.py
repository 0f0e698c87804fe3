"""A person decides which pairs are kept: a review page, its server, and the decisions on disk."""

from artaug.review.decisions import pair_digest
from artaug.review.filter import HumanVerdicts, ManualReview, ReviewProgress

__all__ = ["HumanVerdicts", "ManualReview", "ReviewProgress", "pair_digest"]
