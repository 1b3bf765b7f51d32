"""RoPE on queries and keys, and the write of the new rows into the paged cache."""

from pallas_kernels.rope_cache_write.api import rope_cache_write as rope_cache_write
