// Weights as they are stored: what a matrix is, and columns of it widened to float32.
//
// A weight is value * scale rounded to float32, as the reference has it; see pairs.h for products in bfloat16.

#ifndef STEP3_WEIGHTS_H_
#define STEP3_WEIGHTS_H_

#include "lanes.h"

// FORM_PANEL is what other forms are widened to: TILE_COLUMNS rows of float32, interleaved vector by vector. Those named
// PAIRS are multiplied with activations in bfloat16, the others with float32.
typedef enum {
  FORM_F32,
  FORM_BF16,
  FORM_FP8,
  FORM_INT8,
  FORM_INT4,
  FORM_PANEL,
  FORM_BF16_PAIRS,
  FORM_FP8_PAIRS,
  FORM_PANEL_PAIRS,
} Form;

enum {
  STEP = 2 * LANES,     // columns that are widened at once
  GROUP = 128,          // columns that share a scale
  INT4_UNIT = 32,       // columns of 16 packed bytes
  COLUMN_BLOCK = 1024,  // widened weights of a tile stay in the first cache
  STREAM_AHEAD = 2048,  // bytes that are fetched ahead of each of a tile's rows
  ROW_BLOCK = 96,       // activations of so many rows and COLUMN_BLOCK columns stay in the second cache
};

typedef struct {
  Form form;
  int64_t num_rows, num_columns;
  int64_t row_bytes;
  const uint8_t* values;
  const float* scales;  // NULL for forms without
  int64_t scale_columns;
  int64_t rows_per_scale;
} Matrix;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int is_paired(Form form) {
  return form == FORM_BF16_PAIRS || form == FORM_FP8_PAIRS || form == FORM_PANEL_PAIRS;
}

INLINE int has_scales(Form form) {
  return form == FORM_FP8 || form == FORM_INT8 || form == FORM_INT4 || form == FORM_FP8_PAIRS || form == FORM_PANEL_PAIRS;
}

// Bytes of `columns` stored columns.
INLINE int64_t stored_bytes(Form form, int64_t columns) {
  switch (form) {
    case FORM_F32: return 4 * columns;
    case FORM_BF16:
    case FORM_BF16_PAIRS: return 2 * columns;
    case FORM_INT4: return (columns + INT4_UNIT - 1) / INT4_UNIT * (INT4_UNIT / 2);
    default: return columns;
  }
}

// STEP columns of one row from `column` on, a multiple of STEP; without the scale.
INLINE void widen(Form form, const uint8_t* row, int64_t column, Lanes out[2]) {
  switch (form) {
    case FORM_F32:
      out[0] = load((const float*)row + column);
      out[1] = load((const float*)row + column + LANES);
      break;
    case FORM_BF16: widen_bf16(row + 2 * column, out); break;
    case FORM_FP8: widen_fp8(row + column, out); break;
    case FORM_INT8: widen_int8(row + column, out); break;
    case FORM_INT4:
      widen_int4(row + column / INT4_UNIT * (INT4_UNIT / 2), column % INT4_UNIT != 0, out);
      break;
    default: break;  // panels, see add_step; and pairs
  }
}

// The factor of a stored value in the group of `column`. In float32 FP8 is widened to value / 256.
INLINE Lanes find_scale(Form form, const float* scales, int64_t column) {
  return fill(form == FORM_FP8 ? scales[column / GROUP] * (HAS_PAIRS ? 1.0f : 256.0f) : scales[column / GROUP]);
}

// Rows of weights that a tile multiplies with: where each one starts, and its scales.
typedef struct {
  const uint8_t* rows[TILE_COLUMNS];
  const float* scales[TILE_COLUMNS];
} TileWeights;

// The rows `first`, `first + apart`, and so on.
INLINE TileWeights pick_weights(const Matrix* matrix, int64_t first, int64_t stop, int64_t apart) {
  TileWeights picked;
  for (int i = 0; i < TILE_COLUMNS; i++) {
    // After the last row it is repeated, and the output dropped.
    const int64_t row = first + i * apart < stop ? first + i * apart : stop - 1;
    picked.rows[i] = matrix->values + row * matrix->row_bytes;
    picked.scales[i] = matrix->scales ? matrix->scales + row / matrix->rows_per_scale * matrix->scale_columns : NULL;
  }
  return picked;
}

// How many rows of a tile are before `stop`.
INLINE int count_valid(int64_t first, int64_t stop, int64_t apart) {
  const int64_t count = (stop - first + apart - 1) / apart;
  return count < TILE_COLUMNS ? (int)count : TILE_COLUMNS;
}

// The stored bytes of the columns from `column` on, fewer than STEP, and zeros after them. `widen` takes it as column 0.
INLINE void copy_rest(Form form, const uint8_t* row, int64_t column, int64_t num_columns, uint8_t out[STEP * 4]) {
  memset(out, 0, STEP * 4);
  const int64_t from = stored_bytes(form, column);
  memcpy(out, row + from, (size_t)(stored_bytes(form, num_columns) - from));
}

// Fetches ahead what lies `distance` bytes after some columns: the processor does not look far enough ahead for narrow
// weights, and for none while they are multiplied from a panel.
INLINE void prefetch(Form form, const uint8_t* row, int64_t column, int64_t stop, int64_t distance) {
  for (int64_t byte = stored_bytes(form, column); byte < stored_bytes(form, stop); byte += 64) {
    __builtin_prefetch(row + byte + distance, 0, 2);
  }
}

#endif
