// Work divided over XLA's own threads.
//
// A job is a few phases of units. The calling thread and helpers on XLA's pool take units by a counter until none is left,
// then wait until the others have finished theirs. A helper that starts late finds nothing to do: the caller never waits
// for a thread that is busy elsewhere, so that calls cannot block each other.

#ifndef STEP3_WORK_H_
#define STEP3_WORK_H_

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "xla/ffi/api/c_api.h"

enum { MAX_PHASES = 2, SPINS_BEFORE_YIELD = 2000 };

typedef void RunUnit(const void* job, int phase, int64_t unit);

typedef struct {
  atomic_int_fast64_t next, done;
  int64_t num_units;
} Phase;

typedef struct {
  atomic_int references;
  int num_phases;
  Phase phases[MAX_PHASES];
  RunUnit* run;
  const void* job;  // the caller's: valid until all units are done
} Work;

static inline void relax(int* spins) {
  if (++*spins < SPINS_BEFORE_YIELD) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  } else {
    sched_yield();
  }
}

static void take_units(Work* work) {
  for (int index = 0; index < work->num_phases; index++) {
    Phase* phase = &work->phases[index];
    for (;;) {
      const int64_t unit = atomic_fetch_add(&phase->next, 1);
      if (unit >= phase->num_units) break;
      work->run(work->job, index, unit);
      atomic_fetch_add(&phase->done, 1);
    }
    int spins = 0;
    while (atomic_load(&phase->done) < phase->num_units) relax(&spins);
  }
}

static void release(Work* work) {
  if (atomic_fetch_sub(&work->references, 1) == 1) free(work);
}

static void help(void* data) {
  take_units(data);
  release(data);
}

static void destroy_error(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
  api->XLA_FFI_Error_Destroy(&args);
}

// Threads of XLA's pool; 1 where there is none.
static int64_t count_threads(const XLA_FFI_CallFrame* frame) {
  int64_t count = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {
      XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, frame->ctx, &count};
  XLA_FFI_Error* error = frame->api->XLA_FFI_ThreadPool_NumThreads(&args);
  if (error) {
    destroy_error(frame->api, error);
    return 1;
  }
  return count < 1 ? 1 : count;
}

// Runs all units of all phases. Returns 0 if there is no memory.
static int run_units(
    const XLA_FFI_CallFrame* frame, int64_t num_threads, int num_phases, const int64_t* num_units, RunUnit* run,
    const void* job) {
  Work* work = malloc(sizeof *work);
  if (!work) return 0;
  int64_t most = 0;
  work->num_phases = num_phases;
  work->run = run;
  work->job = job;
  for (int i = 0; i < num_phases; i++) {
    atomic_init(&work->phases[i].next, 0);
    atomic_init(&work->phases[i].done, 0);
    work->phases[i].num_units = num_units[i];
    if (num_units[i] > most) most = num_units[i];
  }
  const int64_t helpers = (num_threads < most ? num_threads : most) - 1;
  atomic_init(&work->references, 1);
  for (int64_t i = 0; i < helpers; i++) {
    atomic_fetch_add(&work->references, 1);
    XLA_FFI_ThreadPool_Schedule_Args args = {
        XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx, help, work};
    XLA_FFI_Error* error = frame->api->XLA_FFI_ThreadPool_Schedule(&args);
    if (error) {
      destroy_error(frame->api, error);
      release(work);
      break;
    }
  }
  take_units(work);
  release(work);
  return 1;
}

#endif
