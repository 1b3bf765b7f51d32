// Reading a call of XLA's foreign function interface (the typed convention), and answering it.

#ifndef STEP3_FRAME_H_
#define STEP3_FRAME_H_

#include <stdio.h>
#include <stdlib.h>

#include "matrix.h"
#include "xla/ffi/api/c_api.h"

static XLA_FFI_Error* fail(const XLA_FFI_CallFrame* frame, XLA_FFI_Error_Code code, const char* message) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message, code};
  return frame->api->XLA_FFI_Error_Create(&args);
}

// Whether the call only asks for the version of the interface, which is then answered.
static int answer_metadata(XLA_FFI_CallFrame* frame) {
  if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata* metadata = ((XLA_FFI_Metadata_Extension*)frame->extension_start)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  return 1;
}

static const XLA_FFI_Buffer* argument(const XLA_FFI_CallFrame* frame, int64_t index) {
  return index < frame->args.size ? frame->args.args[index] : NULL;
}

static XLA_FFI_Buffer* result(const XLA_FFI_CallFrame* frame, int64_t index) {
  return index < frame->rets.size ? frame->rets.rets[index] : NULL;
}

static int64_t dimension(const XLA_FFI_Buffer* buffer, int64_t from_end) { return buffer->dims[buffer->rank - from_end]; }

// Refuses a call because of one of its arguments.
static XLA_FFI_Error* refuse(const XLA_FFI_CallFrame* frame, const char* operation, int64_t index, const char* problem) {
  char message[512], shape[160] = "";
  const XLA_FFI_Buffer* buffer = argument(frame, index);
  size_t used = 0;
  for (int64_t i = 0; buffer && i < buffer->rank && used < sizeof shape; i++) {
    used += (size_t)snprintf(shape + used, sizeof shape - used, i ? ", %lld" : "%lld", (long long)buffer->dims[i]);
  }
  snprintf(
      message, sizeof message, "%s: argument %lld, [%s], %s", operation, (long long)index, buffer ? shape : "missing",
      problem);
  return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, message);
}

// Whether an array is `num_matrices` matrices; 0: one, without an axis for their number.
static int is_stack(const XLA_FFI_Buffer* buffer, int64_t num_matrices) {
  return num_matrices ? buffer->rank == 3 && buffer->dims[0] == num_matrices : buffer->rank == 2;
}

// What weights are read for.
typedef struct {
  const XLA_FFI_CallFrame* frame;
  int rounds;     // activations to bfloat16 where it can
  int64_t index;  // of the next argument; of the one that is wrong, once something is
} Reader;

static int find_form(XLA_FFI_DataType dtype, int rounds, Form* form) {
  switch (dtype) {
    case XLA_FFI_DataType_F32: *form = FORM_F32; return 1;
    case XLA_FFI_DataType_BF16: *form = rounds ? FORM_BF16_PAIRS : FORM_BF16; return 1;
    case XLA_FFI_DataType_F8E4M3FN: *form = rounds ? FORM_FP8_PAIRS : FORM_FP8; return 1;
    case XLA_FFI_DataType_S8: *form = FORM_INT8; return 1;
    case XLA_FFI_DataType_U8: *form = FORM_INT4; return 1;
    default: return 0;
  }
}

// Bytes of a stored value; 0 for what no table has.
static int64_t count_value_bytes(XLA_FFI_DataType dtype) {
  switch (dtype) {
    case XLA_FFI_DataType_F32: return 4;
    case XLA_FFI_DataType_BF16: return 2;
    case XLA_FFI_DataType_F8E4M3FN:
    case XLA_FFI_DataType_S8:
    case XLA_FFI_DataType_U8: return 1;
    default: return 0;
  }
}

// A matrix, or a stack of them, from the next arguments: values, and scales where its form has them. `matrix` is the first
// of the stack. Returns NULL, or what is wrong.
static const char* read_matrix(Reader* reader, int64_t num_matrices, int64_t num_columns, Matrix* matrix) {
  const XLA_FFI_Buffer* values = argument(reader->frame, reader->index);
  if (!values || !find_form(values->dtype, reader->rounds, &matrix->form)) return "is of no form that is multiplied";
  if (!is_stack(values, num_matrices)) return "has not as many matrices as the other weights";
  matrix->values = values->data;
  matrix->num_rows = dimension(values, 2);
  matrix->num_columns = num_columns;
  matrix->row_bytes = stored_bytes(matrix->form, num_columns);
  const int64_t stored_columns = matrix->form == FORM_INT4 ? matrix->row_bytes : num_columns;
  if (dimension(values, 1) != stored_columns) return "has not as many columns as what it is multiplied with";
  matrix->scales = NULL;
  matrix->scale_columns = 0;
  matrix->rows_per_scale = 1;
  reader->index += 1;
  if (!has_scales(matrix->form)) return NULL;
  const XLA_FFI_Buffer* scales = argument(reader->frame, reader->index);
  if (!scales || scales->dtype != XLA_FFI_DataType_F32 || !is_stack(scales, num_matrices)) {
    return "is not the scales, in float32, of as many matrices as the values before it";
  }
  matrix->scales = scales->data;
  matrix->scale_columns = dimension(scales, 1);
  // One scale for each row, or for each GROUP rows.
  if (dimension(scales, 2) != matrix->num_rows) matrix->rows_per_scale = GROUP;
  if (dimension(scales, 2) != (matrix->num_rows + matrix->rows_per_scale - 1) / matrix->rows_per_scale ||
      matrix->scale_columns != (num_columns + GROUP - 1) / GROUP) {
    return "has not a scale for each block of the values before it";
  }
  reader->index += 1;
  return NULL;
}

// One matrix of a stack.
static Matrix pick_matrix(Matrix stack, int64_t index) {
  stack.values += index * stack.num_rows * stack.row_bytes;
  if (stack.scales) {
    stack.scales += index * ((stack.num_rows + stack.rows_per_scale - 1) / stack.rows_per_scale) * stack.scale_columns;
  }
  return stack;
}

// Rows of activations: the same in float32 and, for products in pairs, rounded to bfloat16.
typedef struct {
  const void* wide;
  void* rounded;  // NULL if nothing is multiplied so
} Activations;

INLINE const void* activation_row(const Activations* x, int paired, int64_t row, int64_t num_columns) {
  return paired ? (const void*)((const uint16_t*)x->rounded + row * num_columns)
                : (const void*)((const float*)x->wide + row * num_columns);
}

// Rounds a row, or a part of one.
INLINE void round_row(const float* from, int64_t count, uint16_t* to) {
#if HAS_PAIRS
  round_pairs(from, count, to);
#else
  (void)from, (void)count, (void)to;
#endif
}

// How many rows of x [N, K] are computed, from int32 []; those after them are padding, whose outputs are 0. Returns NULL, or
// what is wrong.
static const char* read_num_rows(const XLA_FFI_Buffer* given, const XLA_FFI_Buffer* x, int64_t* num_rows) {
  if (!given || given->rank != 0 || given->dtype != XLA_FFI_DataType_S32) return "is not a number of rows, int32 []";
  const int64_t wanted = *(const int32_t*)given->data;
  *num_rows = wanted < 0 ? 0 : least(wanted, x->dims[0]);
  return NULL;
}

static void clear_rows(float* out, int64_t first, int64_t stop, int64_t num_columns) {
  memset(out + first * num_columns, 0, (size_t)((stop - first) * num_columns) * sizeof(float));
}

// Rows of activations [N, K] for products of which some may be in pairs. Returns 0 without memory.
static int read_activations(const XLA_FFI_Buffer* x, int64_t num_rows, int has_pairs, Activations* read) {
  const int64_t count = num_rows * x->dims[1];
  *read = (Activations){.wide = x->data};
  if (!has_pairs) return 1;
  read->rounded = malloc(sizeof(uint16_t) * (size_t)(count + 1));
  if (!read->rounded) return 0;
  round_row(x->data, count, read->rounded);
  return 1;
}

// Rows of weights in a unit of work: enough bytes that taking it costs nothing, and units enough for all threads.
static int64_t choose_unit_rows(int64_t num_rows, int64_t num_threads) {
  enum { MAX_UNIT_ROWS = 64 };
  const int64_t share = (num_rows + 4 * num_threads - 1) / (4 * num_threads);
  const int64_t rows = (share + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
  if (rows < TILE_COLUMNS) return TILE_COLUMNS;
  return rows < MAX_UNIT_ROWS ? rows : MAX_UNIT_ROWS;
}

// Products of fewer multiplications than this are done by the calling thread alone: others take longer to wake up.
enum { MIN_SHARED_OPERATIONS = 1 << 17 };

#endif
