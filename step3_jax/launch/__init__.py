"""Starts one command as many processes: on this machine, over ssh, or under Slurm, Open MPI and Kubernetes."""
