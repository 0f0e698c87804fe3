"""Manual review: a person keeps or drops pairs on a local page; the decisions are kept in a file."""

from artaug.pairs import pair_digest
from artaug.review.filter import ManualReview, RecordedDecisions, ReviewProgress

__all__ = ["ManualReview", "RecordedDecisions", "ReviewProgress", "pair_digest"]
