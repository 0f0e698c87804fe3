"""Did it get better, and how sure is that: comparisons, suites of prompts, statistics."""
