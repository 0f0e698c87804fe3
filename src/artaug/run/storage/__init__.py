"""What a run keeps: in its folder, or in memory."""
