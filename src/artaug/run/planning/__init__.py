"""What a run will take: hours, memory, tokens and disk, measured on a few prompts."""
