"""What a run will need and what a machine has: facts and byte arithmetic, without torch."""
