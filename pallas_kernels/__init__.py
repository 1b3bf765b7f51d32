"""GPU kernels of Step3's hot paths, in Pallas (Mosaic GPU, Hopper), with a plain JAX reference for each."""
