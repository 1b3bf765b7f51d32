"""GPU kernels of Step3's hot paths, in Pallas (Mosaic GPU, Hopper), with a plain JAX reference for each.

One folder per operation, which exports its public functions: `from pallas_kernels.mfa_decode import mfa_decode`.
"""
