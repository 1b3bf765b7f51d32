// Experts: y[n] = sum over the chosen experts, in the order of their numbers, of factor * down(silu(gate x) * up x), then
// the shared expert. Each chosen expert is read once.
//
// Tokens are grouped by expert. One phase computes the inner activations of all groups, the next their outputs: a unit of
// the second has some columns of y for itself, and adds the groups to them one after the other. So no two threads write
// to one place, and the sum of a token is the same whatever the other tokens chose.

#ifndef STEP3_EXPERTS_H_
#define STEP3_EXPERTS_H_

#include "frame.h"
#include "watch.h"
#include "work.h"

enum {
  MAX_GROUP_ROWS = 1024,
  MAX_UNIT_COLUMNS = 64,            // see choose_unit_rows
  MAX_INNER_FLOATS = 16 * 1024 * 1024,  // of one pass; more groups are computed in several passes
  MAX_READ_AHEAD_BYTES = 512 * 1024 * 1024,  // of one pass; what few tokens choose, and no more than memory may hold
};

typedef struct {
  Matrix gate, up, down;
} Swiglu;

typedef struct {
  Swiglu weights;
  int64_t first, stop;  // its pairs of a token and an expert
  int64_t inner;        // where its inner activations start
  int64_t first_unit;   // in the first phase
} Group;

typedef struct {
  int64_t num_x, width;
  Activations x;
  float* y;
  int64_t* tokens;  // of each pair
  float* factors;
  const void** rows[2];     // of x, for each pair: in float32, and rounded
  const void** inner_rows;  // of `inner`, as the group's down projection takes them
  float* inner;
  Group* groups;
  int64_t first_group, stop_group;  // of this pass
  int64_t unit_inner, unit_outer;   // rows of weights in a unit of each phase
} Experts;

static void combine(float* gate, const float* up, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) apply_swiglu(gate + i, up + i);
  if (i < count) {
    // The same arithmetic as elsewhere, in vectors filled up with zeros.
    float rest[2][LANES] = {{0}};
    memcpy(rest[0], gate + i, (size_t)(count - i) * sizeof(float));
    memcpy(rest[1], up + i, (size_t)(count - i) * sizeof(float));
    apply_swiglu(rest[0], rest[1]);
    memcpy(gate + i, rest[0], (size_t)(count - i) * sizeof(float));
  }
}

static const void* const* find_rows(const Experts* all, const Matrix* matrix, int64_t pair) {
  return all->rows[is_paired(matrix->form)] + pair;
}

static void run_inner(const Experts* all, int64_t unit) {
  float gate[ROW_BLOCK * MAX_UNIT_COLUMNS], up[ROW_BLOCK * MAX_UNIT_COLUMNS];
  int64_t index = all->first_group;
  while (index + 1 < all->stop_group && unit >= all->groups[index + 1].first_unit) index++;
  const Group* group = &all->groups[index];
  const Swiglu* weights = &group->weights;
  const int64_t size = weights->gate.num_rows;
  const int64_t first = (unit - group->first_unit) * all->unit_inner, stop = least(first + all->unit_inner, size);
  const int64_t width = stop - first;
  for (int64_t pair = group->first; pair < group->stop; pair += ROW_BLOCK) {
    const int64_t count = least(ROW_BLOCK, group->stop - pair);
    multiply_rows(&weights->gate, first, stop, find_rows(all, &weights->gate, pair), count, gate, width);
    multiply_rows(&weights->up, first, stop, find_rows(all, &weights->up, pair), count, up, width);
    for (int64_t n = 0; n < count; n++) {
      combine(gate + n * width, up + n * width, width);
      void* row = (void*)all->inner_rows[pair + n];
      if (is_paired(weights->down.form)) {
        round_row(gate + n * width, width, (uint16_t*)row + first);
      } else {
        memcpy((float*)row + first, gate + n * width, (size_t)width * sizeof(float));
      }
    }
  }
}

static void run_outer(const Experts* all, int64_t unit) {
  float out[ROW_BLOCK * MAX_UNIT_COLUMNS];
  const int64_t first = unit * all->unit_outer, stop = least(first + all->unit_outer, all->width);
  if (all->first_group == 0) {
    for (int64_t n = 0; n < all->num_x; n++) {
      memset(all->y + n * all->width + first, 0, (size_t)(stop - first) * sizeof(float));
    }
  }
  for (int64_t index = all->first_group; index < all->stop_group; index++) {
    const Group* group = &all->groups[index];
    for (int64_t pair = group->first; pair < group->stop; pair += ROW_BLOCK) {
      const int64_t count = least(ROW_BLOCK, group->stop - pair);
      multiply_rows(&group->weights.down, first, stop, all->inner_rows + pair, count, out, stop - first);
      for (int64_t n = 0; n < count; n++) {
        float* y = all->y + all->tokens[pair + n] * all->width;
        const float factor = all->factors[pair + n];
        for (int64_t i = first; i < stop; i++) y[i] += factor * out[n * (stop - first) + i - first];
      }
    }
  }
}

static void run_expert_unit(const void* job, int phase, int64_t unit) {
  if (phase == 0) {
    run_inner(job, unit);
  } else {
    run_outer(job, unit);
  }
}

// Appends the pairs [first, stop) of one expert as groups. Returns the number of groups then.
static int64_t add_groups(Group* groups, int64_t num_groups, Swiglu weights, int64_t first, int64_t stop) {
  for (; first < stop; first += MAX_GROUP_ROWS) {
    groups[num_groups++] = (Group){.weights = weights, .first = first, .stop = least(first + MAX_GROUP_ROWS, stop)};
  }
  return num_groups;
}

// Where weights lie in mapped files: the experts of a pass are read from the disk before the first of them is multiplied.
static void read_groups_ahead(const Experts* all) {
  size_t asked = 0;
  for (int64_t index = all->first_group; index < all->stop_group; index++) {
    const Swiglu* weights = &all->groups[index].weights;
    const Matrix* matrices[] = {&weights->gate, &weights->up, &weights->down};
    for (int i = 0; i < 3 && asked < MAX_READ_AHEAD_BYTES; i++) {
      const size_t num_bytes = (size_t)(matrices[i]->num_rows * matrices[i]->row_bytes);
      read_ahead(matrices[i]->values, num_bytes);
      asked += num_bytes;
    }
  }
}

// All groups, in as many passes as the memory for inner activations asks for. Returns 0 without memory.
static int run_groups(const XLA_FFI_CallFrame* frame, Experts* all, int64_t num_groups, int64_t operations) {
  const int64_t num_threads = operations < MIN_SHARED_OPERATIONS ? 1 : count_threads(frame);
  all->unit_outer = choose_unit_rows(all->width, num_threads);
  if (num_groups == 0) memset(all->y, 0, (size_t)(all->num_x * all->width) * sizeof(float));
  for (all->first_group = 0; all->first_group < num_groups; all->first_group = all->stop_group) {
    int64_t floats = 0, inner_rows = 0, num_units = 0;
    all->stop_group = all->first_group;
    while (all->stop_group < num_groups) {
      Group* group = &all->groups[all->stop_group];
      const int64_t size = group->weights.gate.num_rows, needed = (group->stop - group->first) * size;
      if (floats > 0 && floats + needed > MAX_INNER_FLOATS) break;
      group->inner = floats;
      floats += needed;
      inner_rows += size;
      all->stop_group++;
    }
    read_groups_ahead(all);
    all->inner = malloc(sizeof(float) * (size_t)floats);
    if (!all->inner) return 0;
    all->unit_inner = choose_unit_rows(inner_rows, num_threads);
    for (int64_t index = all->first_group; index < all->stop_group; index++) {
      Group* group = &all->groups[index];
      const int64_t size = group->weights.gate.num_rows;
      group->first_unit = num_units;
      num_units += (size + all->unit_inner - 1) / all->unit_inner;
      for (int64_t pair = group->first; pair < group->stop; pair++) {
        const Activations inner = {all->inner + group->inner, all->inner + group->inner};
        all->inner_rows[pair] = activation_row(&inner, is_paired(group->weights.down.form), pair - group->first, size);
      }
    }
    const int64_t units[MAX_PHASES] = {num_units, (all->width + all->unit_outer - 1) / all->unit_outer};
    const int is_done = run_units(frame, num_threads, 2, units, run_expert_unit, all);
    free(all->inner);
    if (!is_done) return 0;
  }
  return 1;
}

// The three matrices of a SwiGLU, or three stacks of them. Returns NULL, or what is wrong.
static const char* read_swiglu(Reader* reader, int64_t num_matrices, int64_t width, Swiglu* weights) {
  const char* problem = read_matrix(reader, num_matrices, width, &weights->gate);
  const int64_t up = reader->index;
  if (!problem) problem = read_matrix(reader, num_matrices, width, &weights->up);
  const int64_t down = reader->index;
  if (!problem) problem = read_matrix(reader, num_matrices, weights->gate.num_rows, &weights->down);
  if (problem) return problem;
  if (weights->up.num_rows != weights->gate.num_rows) {
    reader->index = up;
    return "has not as many rows as the gate";
  }
  if (weights->down.num_rows != width) {
    reader->index = down;
    return "has not as many rows as the activations have columns";
  }
  return NULL;
}

static int has_pairs(const Swiglu* weights) { return is_paired(weights->gate.form) || is_paired(weights->up.form); }

static Swiglu pick_expert(const Swiglu* stack, int64_t expert) {
  return (Swiglu){
      pick_matrix(stack->gate, expert), pick_matrix(stack->up, expert), pick_matrix(stack->down, expert)};
}

// What there is to compute: the routed experts (`num_experts` of them; 0: none) and a shared one.
typedef struct {
  const float* factors;    // [N, top_k]
  const int32_t* experts;  // [N, top_k]
  int64_t top_k, num_experts;
  Swiglu routed, shared;
  int has_shared;
} Mixture;

// The first num_x rows of x; the outputs of the others are 0.
static XLA_FFI_Error* run_mixture(
    const XLA_FFI_CallFrame* frame, const XLA_FFI_Buffer* x, int64_t num_x, const Mixture* mixture) {
  const int64_t width = x->dims[1], num_routed = num_x * mixture->top_k;
  const int64_t num_pairs = num_routed + (mixture->has_shared ? num_x : 0);
  const int64_t most_groups = mixture->num_experts + 2 + num_pairs / MAX_GROUP_ROWS;
  const int is_rounded =
      (mixture->num_experts && has_pairs(&mixture->routed)) || (mixture->has_shared && has_pairs(&mixture->shared));
  Experts all = {.num_x = num_x, .width = width, .y = result(frame, 0)->data};
  clear_rows(all.y, num_x, x->dims[0], width);
  int is_done = read_activations(x, num_x, is_rounded, &all.x);
  all.tokens = malloc(sizeof *all.tokens * (size_t)(num_pairs + 1));
  all.factors = malloc(sizeof *all.factors * (size_t)(num_pairs + 1));
  all.rows[0] = malloc(2 * sizeof *all.rows[0] * (size_t)(num_pairs + 1));
  all.rows[1] = all.rows[0] + num_pairs;
  all.inner_rows = malloc(sizeof *all.inner_rows * (size_t)(num_pairs + 1));
  all.groups = malloc(sizeof *all.groups * (size_t)most_groups);
  int64_t* starts = calloc((size_t)mixture->num_experts + 2, sizeof *starts);
  is_done = is_done && all.tokens && all.factors && all.rows[0] && all.inner_rows && all.groups && starts;
  if (is_done) {
    // A counting sort by expert; choices of an expert that is not here take no part.
    int64_t num_groups = 0, operations = 0, num_here = 0;
    for (int64_t pair = 0; pair < num_routed; pair++) {
      const int64_t expert = mixture->experts[pair];
      if (expert >= 0 && expert < mixture->num_experts) starts[expert + 1]++;
    }
    for (int64_t expert = 0; expert < mixture->num_experts; expert++) {
      const int64_t count = starts[expert + 1];
      starts[expert + 1] = num_here + count;
      if (count) {
        num_groups =
            add_groups(all.groups, num_groups, pick_expert(&mixture->routed, expert), num_here, num_here + count);
      }
      num_here += count;
    }
    operations += num_here * 3 * width * (mixture->num_experts ? mixture->routed.gate.num_rows : 0);
    for (int64_t pair = 0; pair < num_routed; pair++) {
      const int64_t expert = mixture->experts[pair];
      if (expert < 0 || expert >= mixture->num_experts) continue;
      const int64_t place = starts[expert]++;
      all.tokens[place] = pair / mixture->top_k;
      all.factors[place] = mixture->factors[pair];
    }
    if (mixture->has_shared) {
      num_groups = add_groups(all.groups, num_groups, mixture->shared, num_here, num_here + num_x);
      for (int64_t n = 0; n < num_x; n++) {
        all.tokens[num_here + n] = n;
        all.factors[num_here + n] = 1.0f;
      }
      num_here += num_x;
      operations += num_x * 3 * width * mixture->shared.gate.num_rows;
    }
    for (int64_t place = 0; place < num_here; place++) {
      for (int paired = 0; paired <= is_rounded; paired++) {
        all.rows[paired][place] = activation_row(&all.x, paired, all.tokens[place], width);
      }
    }
    is_done = run_groups(frame, &all, num_groups, operations);
  }
  free(all.tokens);
  free(all.factors);
  free(all.rows[0]);
  free(all.x.rounded);
  free(all.inner_rows);
  free(all.groups);
  free(starts);
  return is_done ? NULL : fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "no memory for the experts");
}

static int is_output_of(const XLA_FFI_CallFrame* frame, const XLA_FFI_Buffer* x) {
  const XLA_FFI_Buffer* y = result(frame, 0);
  return x && x->rank == 2 && x->dtype == XLA_FFI_DataType_F32 && y && y->dtype == x->dtype && y->rank == 2 &&
         y->dims[0] == x->dims[0] && y->dims[1] == x->dims[1];
}

// x [N, D], rows to compute [], factors [N, top_k], experts [N, top_k], three stacks, and three matrices of a shared expert
// if there is one.
static XLA_FFI_Error* run_experts(const XLA_FFI_CallFrame* frame, int rounds) {
  const char* name = "step3_experts";
  const XLA_FFI_Buffer *x = argument(frame, 0), *factors = argument(frame, 2), *experts = argument(frame, 3);
  const XLA_FFI_Buffer* gate = argument(frame, 4);
  int64_t num_rows;
  if (!is_output_of(frame, x)) return refuse(frame, name, 0, "is not float32 [N, D] as the output is");
  const char* problem = read_num_rows(argument(frame, 1), x, &num_rows);
  if (problem) return refuse(frame, name, 1, problem);
  if (!experts || experts->dtype != XLA_FFI_DataType_S32 || experts->rank != 2 || experts->dims[0] != x->dims[0]) {
    return refuse(frame, name, 3, "is not the experts' numbers, int32 [N, top_k]");
  }
  if (!factors || factors->dtype != XLA_FFI_DataType_F32 || factors->rank != 2 ||
      factors->dims[0] != x->dims[0] || factors->dims[1] != experts->dims[1]) {
    return refuse(frame, name, 2, "is not a factor for each number, float32 [N, top_k]");
  }
  if (!gate || gate->rank != 3 || gate->dims[0] == 0) return refuse(frame, name, 4, "is not a stack of matrices");
  Mixture mixture = {
      .factors = factors->data, .experts = experts->data, .top_k = experts->dims[1], .num_experts = gate->dims[0]};
  Reader reader = {.frame = frame, .rounds = rounds, .index = 4};
  problem = read_swiglu(&reader, mixture.num_experts, x->dims[1], &mixture.routed);
  mixture.has_shared = reader.index < frame->args.size;
  if (!problem && mixture.has_shared) problem = read_swiglu(&reader, 0, x->dims[1], &mixture.shared);
  return problem ? refuse(frame, name, reader.index, problem) : run_mixture(frame, x, num_rows, &mixture);
}

// x [N, D], rows to compute [], and the three matrices of one SwiGLU.
static XLA_FFI_Error* run_swiglu(const XLA_FFI_CallFrame* frame, int rounds) {
  const char* name = "step3_swiglu";
  const XLA_FFI_Buffer* x = argument(frame, 0);
  if (!is_output_of(frame, x)) return refuse(frame, name, 0, "is not float32 [N, D] as the output is");
  int64_t num_rows;
  const char* problem = read_num_rows(argument(frame, 1), x, &num_rows);
  if (problem) return refuse(frame, name, 1, problem);
  Mixture mixture = {.has_shared = 1};
  Reader reader = {.frame = frame, .rounds = rounds, .index = 2};
  problem = read_swiglu(&reader, 0, x->dims[1], &mixture.shared);
  return problem ? refuse(frame, name, reader.index, problem) : run_mixture(frame, x, num_rows, &mixture);
}

#endif
