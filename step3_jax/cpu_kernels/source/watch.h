// Weights that lie in mapped files: how a read that fails is reported, and what is read ahead of its use.
//
// A read of a mapped file that was cut short, or that the disk cannot answer, ends the process with SIGBUS, from whatever
// thread computes. The handler here says which file it was. It calls nothing but `fstat`, `sigaction`, `write` and `_exit`:
// all else may be in the middle of a change.

#ifndef STEP3_WATCH_H_
#define STEP3_WATCH_H_

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_MAPPINGS = 1024, MAX_PATH_BYTES = 4200, EXIT_CODE = 1 };

// An entry that nothing is mapped at has its end at its start; one that is in use does not change.
static struct {
  _Atomic uintptr_t start, end;
  int file;  // open for as long as the mapping is watched
  char path[MAX_PATH_BYTES];
} mappings[MAX_MAPPINGS];
// Entries that were ever in use.
static atomic_int num_mappings;
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER;
// What handled the signal before, and whether it does so again since a signal came that is not ours.
static struct sigaction former;
static atomic_int has_stepped_aside;
static _Atomic int64_t used_bytes, resident_bytes;

static int find(uintptr_t address) {
  const int count = atomic_load_explicit(&num_mappings, memory_order_acquire);
  for (int i = 0; i < count; ++i) {
    if (address >= mappings[i].start && address < mappings[i].end) return i;
  }
  return -1;
}

static void say(const char* text) {
  const ssize_t written = write(STDERR_FILENO, text, strlen(text));
  (void)written;
}

static void handle(int number, siginfo_t* info, void* context) {
  (void)number, (void)context;
  const int index = find((uintptr_t)info->si_addr);
  if (index < 0) {
    // Not ours: the instruction is tried again, and what handled the signal before gets it. If that hands it back to this
    // one, neither knows it.
    const struct sigaction none = {.sa_handler = SIG_DFL};
    sigaction(SIGBUS, atomic_exchange(&has_stepped_aside, 1) ? &none : &former, NULL);
    return;
  }
  struct stat now;
  const uintptr_t num_bytes = mappings[index].end - mappings[index].start;
  const int is_shorter = fstat(mappings[index].file, &now) == 0 && (uintptr_t)now.st_size < num_bytes;
  say("step3: error: ");
  say(mappings[index].path);
  say(is_shorter ? " was cut short while its weights were in use"
                 : " could not be read while its weights were in use: the disk, the file system or the memory failed");
  say(" (load_format mmap): the process ends\n");
  _exit(EXIT_CODE);
}

// Has the signal come to `handle`, also where another library took it since the last time. Returns 0, or -1 as sigaction.
static int take_signal(void) {
  const struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_ONSTACK};
  struct sigaction before;
  if (sigaction(SIGBUS, &action, &before) != 0) return -1;
  if (!(before.sa_flags & SA_SIGINFO) || before.sa_sigaction != handle) former = before;
  has_stepped_aside = 0;
  return 0;
}

static size_t page_bytes(void) { return (size_t)sysconf(_SC_PAGESIZE); }

// Pages of a range that are in memory; -1 where the system does not tell.
static int64_t count_resident(uintptr_t first, size_t num_bytes) {
  const size_t num_pages = (num_bytes + page_bytes() - 1) / page_bytes();
  unsigned char* pages = malloc(num_pages);
  int64_t count = -1;
  if (pages != NULL && mincore((void*)first, num_bytes, pages) == 0) {
    count = 0;
    for (size_t i = 0; i < num_pages; ++i) count += pages[i] & 1;
  }
  free(pages);
  return count;
}

// Lets the system read a piece of a weight from the disk while others are computed, if it lies in a mapped file, and
// counts how much of it was in memory already. Any thread may call it; with other memory it does nothing.
static void read_ahead(const void* start, size_t num_bytes) {
  if (num_bytes == 0 || find((uintptr_t)start) < 0) return;
  const size_t page = page_bytes();
  const uintptr_t first = (uintptr_t)start / page * page;
  const size_t length = (uintptr_t)start + num_bytes - first, num_pages = (length + page - 1) / page;
  const int64_t count = count_resident(first, length);
  if (count >= 0) {
    used_bytes += (int64_t)(num_pages * page);
    resident_bytes += count * (int64_t)page;
  }
  // Whatever the count says: of a file that the process may not write, the system calls every page resident.
  madvise((void*)first, length, MADV_WILLNEED);
}

// Adds a mapping of an open file, which may be closed then; 0 if there is room for it. `path` is what the process names
// when a read of it fails.
int step3_watch_mapping(uintptr_t start, size_t num_bytes, int file, const char* path) {
  pthread_mutex_lock(&changing);
  const int count = num_mappings;
  int index = 0, result = -1;
  while (index < count && mappings[index].start != mappings[index].end) ++index;
  const int own = index < MAX_MAPPINGS ? fcntl(file, F_DUPFD_CLOEXEC, 0) : -1;
  if (own >= 0 && take_signal() == 0) {
    strncpy(mappings[index].path, path, MAX_PATH_BYTES - 1);
    mappings[index].file = own;
    // A place that is used again: the old start with the new end would stand for memory of neither, for a moment.
    mappings[index].start = UINTPTR_MAX;
    atomic_store_explicit(&mappings[index].end, start + num_bytes, memory_order_release);
    mappings[index].start = start;
    if (index == count) atomic_store_explicit(&num_mappings, count + 1, memory_order_release);
    result = 0;
  } else if (own >= 0) {
    close(own);
  }
  pthread_mutex_unlock(&changing);
  return result;
}

// Takes a mapping out again: other memory may come to lie there.
void step3_forget_mapping(uintptr_t start) {
  pthread_mutex_lock(&changing);
  for (int i = 0; i < num_mappings; ++i) {
    if (mappings[i].start == start && mappings[i].end != start) {
      mappings[i].end = start;
      close(mappings[i].file);
    }
  }
  pthread_mutex_unlock(&changing);
}

// Bytes of mapped weights that `read_ahead` was told of, and how many of them were in memory then.
void step3_count_reads(int64_t* used, int64_t* resident) {
  *used = used_bytes;
  *resident = resident_bytes;
}

#endif  // STEP3_WATCH_H_
