"""Pictures, measured and shown: similarity, photometry, HTML."""
