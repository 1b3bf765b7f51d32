// Reading a call of XLA's foreign function interface (the typed convention), and answering it.

#ifndef STEP3_FRAME_H_
#define STEP3_FRAME_H_

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

// A matrix, or a stack of them, from the arguments at *index: values, and scales where its form has them. *index moves
// after them. Returns 0 for what no kernel takes. `matrix` is the first of the stack.
static int read_matrix(const XLA_FFI_CallFrame* frame, int64_t* index, int64_t num_columns, Matrix* matrix) {
  const XLA_FFI_Buffer* values = argument(frame, *index);
  if (!values || values->rank < 2) return 0;
  switch (values->dtype) {
    case XLA_FFI_DataType_F32: matrix->form = FORM_F32; break;
    case XLA_FFI_DataType_BF16: matrix->form = FORM_BF16; break;
    case XLA_FFI_DataType_F8E4M3FN: matrix->form = FORM_FP8; break;
    case XLA_FFI_DataType_S8: matrix->form = FORM_INT8; break;
    case XLA_FFI_DataType_U8: matrix->form = FORM_INT4; break;
    default: return 0;
  }
  matrix->values = values->data;
  matrix->num_rows = dimension(values, 2);
  matrix->num_columns = num_columns;
  matrix->row_bytes = stored_bytes(matrix->form, num_columns);
  const int64_t stored_columns = matrix->form == FORM_INT4 ? matrix->row_bytes : num_columns;
  if (dimension(values, 1) != stored_columns) return 0;
  matrix->scales = NULL;
  matrix->scale_columns = 0;
  matrix->rows_per_scale = 1;
  *index += 1;
  if (!has_scales(matrix->form)) return 1;
  const XLA_FFI_Buffer* scales = argument(frame, *index);
  if (!scales || scales->rank < 2 || scales->dtype != XLA_FFI_DataType_F32) return 0;
  matrix->scales = scales->data;
  matrix->scale_columns = dimension(scales, 1);
  // One scale for each row, or for each GROUP rows.
  if (dimension(scales, 2) != matrix->num_rows) matrix->rows_per_scale = GROUP;
  if (dimension(scales, 2) != (matrix->num_rows + matrix->rows_per_scale - 1) / matrix->rows_per_scale) return 0;
  if (matrix->scale_columns != (num_columns + GROUP - 1) / GROUP) return 0;
  *index += 1;
  return 1;
}

// One matrix of a stack.
static Matrix pick_matrix(Matrix stack, int64_t index) {
  stack.values += index * stack.num_rows * stack.row_bytes;
  if (stack.scales) {
    stack.scales += index * ((stack.num_rows + stack.rows_per_scale - 1) / stack.rows_per_scale) * stack.scale_columns;
  }
  return stack;
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
