"""What a run will cost, before anything of it is there; and whether this machine has it."""
