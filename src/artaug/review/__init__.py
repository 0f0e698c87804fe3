"""A person decides which pairs are kept: a review page, its server, and the decisions on disk."""

from artaug.pairs import pair_digest
from artaug.review.filter import ManualReview, RecordedDecisions, ReviewProgress

__all__ = ["ManualReview", "RecordedDecisions", "ReviewProgress", "pair_digest"]
