"""Critics: what looks at a picture and says what to improve, and where."""

from artaug.critics.photometric import PhotometricCritic, Words

__all__ = ["PhotometricCritic", "Words"]
