"""What the trainers have in common; only modules of the folder above import it."""
