"""The program people write: improve, enhance, and what a run ends with."""
