"""How processes come to be: local workers started by us, or the ones that torchrun or srun started."""
