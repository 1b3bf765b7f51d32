// Work divided over XLA's own threads.
//
// A job is a few phases of units. The calling thread and helpers on XLA's pool take units by a counter until none is left,
// then wait until the others have finished theirs. A helper that starts late finds nothing to do: the caller never waits
// for a thread that is busy elsewhere, so that calls cannot block each other.

#ifndef STEP3_WORK_H_
#define STEP3_WORK_H_

#include <limits.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "xla/ffi/api/c_api.h"

// A few tens of microseconds of spinning, which is about what another thread needs to finish its unit.
enum { MAX_PHASES = 2, MAX_SPINS = 1000, FUTEX_WAIT = 128, FUTEX_WAKE = 129 };

typedef void RunUnit(const void* job, int phase, int64_t unit);

typedef struct {
  atomic_int_fast64_t next;
  atomic_int done, num_waiting;
  int64_t num_units;
} Phase;

typedef struct {
  atomic_int references;
  int num_phases;
  Phase phases[MAX_PHASES];
  RunUnit* run;
  const void* job;  // the caller's: valid until all units are done
} Work;

// Waits until all units of a phase are done. A thread that spins for long sleeps: where other programs want the
// processor, one that gives it up again and again is let in last.
static void wait_for(Phase* phase) {
  for (int spins = 0; spins < MAX_SPINS; spins++) {
    if (atomic_load(&phase->done) >= phase->num_units) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  atomic_fetch_add(&phase->num_waiting, 1);
  for (;;) {
    const int done = atomic_load(&phase->done);
    if (done >= phase->num_units) return;
    syscall(SYS_futex, &phase->done, FUTEX_WAIT, done, NULL, NULL, 0);
  }
}

static void take_units(Work* work, int is_caller) {
  for (int index = 0; index < work->num_phases; index++) {
    Phase* phase = &work->phases[index];
    for (;;) {
      const int64_t unit = atomic_fetch_add(&phase->next, 1);
      if (unit >= phase->num_units) break;
      work->run(work->job, index, unit);
      const int done = atomic_fetch_add(&phase->done, 1) + 1;
      if (done >= phase->num_units && atomic_load(&phase->num_waiting)) {
        syscall(SYS_futex, &phase->done, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
      }
    }
    // A helper has nothing to wait for after the last phase.
    if (is_caller || index + 1 < work->num_phases) wait_for(phase);
  }
}

static void release(Work* work) {
  if (atomic_fetch_sub(&work->references, 1) == 1) free(work);
}

static void help(void* data) {
  take_units(data, 0);
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
    atomic_init(&work->phases[i].num_waiting, 0);
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
  take_units(work, 1);
  release(work);
  return 1;
}

#endif
