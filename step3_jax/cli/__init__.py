"""The command `step3`: `main` finds the sub-command, one file each."""
