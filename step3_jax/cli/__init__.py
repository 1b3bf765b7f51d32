"""The command `step3`: `main` finds the sub-command; each has its own file."""
