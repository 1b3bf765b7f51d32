// Weights that lie in mapped files: who says that a file is gone, and what is read ahead of its use.
#pragma once

#include <stddef.h>

// Lets the system read a piece of a weight from the disk while others are computed, if it lies in a mapped file, and
// counts how much of it was in memory already. Any thread may call it; with other memory it does nothing.
void step3_read_ahead(const void* start, size_t num_bytes);
