/* The library's door: which kernels serve on this processor, and their tasks shared out among threads.
 *
 * Threads are PyTorch's own where it runs on an OpenMP whose `GOMP_parallel` could be found: two pools of threads would
 * wait for each other's cores. Elsewhere they are started for each operation.
 */
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#if !defined(WITHOUT_BF16) /* compilers that do not know the instruction */
extern const Kernels kernels_avx512bf16, kernels_avx512vnni;
#endif
#if defined(IMITATE_BF16)
extern const Kernels kernels_imitated;
#endif
#endif
extern const Kernels kernels_portable;

enum { OK = 0, NO_MEMORY = 1 };

static const struct {
  const char *name;
  const Kernels *kernels;
} table[] = { /* best first */
#if defined(__x86_64__)
#if defined(IMITATE_BF16)
    {"imitated", &kernels_imitated},
#elif !defined(WITHOUT_BF16)
    {"avx512bf16", &kernels_avx512bf16},
#endif
#if !defined(WITHOUT_BF16)
    {"avx512vnni", &kernels_avx512vnni},
#endif
    {"avx512", &kernels_avx512},
    {"avx2", &kernels_avx2},
#endif
    {"portable", &kernels_portable},
};

static int runs_here(const char *name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
#if !defined(WITHOUT_BF16)
  int vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (!strcmp(name, "avx512bf16")) return vnni && __builtin_cpu_supports("avx512bf16");
  if (!strcmp(name, "avx512vnni")) return vnni;
#endif
  if (!strcmp(name, "avx512") || !strcmp(name, "imitated")) return avx512;
  if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !strcmp(name, "portable");
}

/* The kernels of a name, or the best that run here for an empty one; 0 where they do not run. `found` gets their name. */
const Kernels *modernbert_kernels(const char *wanted, const char **found) {
  for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
    if ((*wanted && strcmp(wanted, table[i].name)) || !runs_here(table[i].name)) continue;
    *found = table[i].name;
    return table[i].kernels;
  }
  return 0;
}

/* So that a library left from another build is not taken for this one. */
int64_t modernbert_layout(void) {
  return LAYOUT * 1000000 + (int64_t)(sizeof(Operation) * 1000 + sizeof(Weight) + sizeof(Normalize));
}

int64_t modernbert_multiplies(const Kernels *k) { return k->multiplies; }
int64_t modernbert_packed_bytes(const Kernels *k, const Weight *w) { return k->packed_bytes(w); }
void modernbert_pack(const Kernels *k, const Weight *w) { k->pack(w); }
void modernbert_unpack(const Kernels *k, const Weight *w) { k->unpack(w); }

/* ---- threads ---- */

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
static Parallel openmp = 0;
void modernbert_share_threads(Parallel gomp_parallel) { openmp = gomp_parallel; }

typedef struct Job Job;
struct Job {
  void (*run)(Job *, int64_t task, Scratch *);
  const Kernels *kernels;
  const void *operation;
  Plan plan;
  int64_t serial;
  const int64_t *chunks; /* of attention: (text, first query of it) pairs */
  int64_t chunk;         /* queries of each; of training the phase */
  int64_t next;
  int failed;
};

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void forget(void *scratch) {
  free(((Scratch *)scratch)->memory);
  free(scratch);
}
static void make_key(void) { pthread_key_create(&key, forget); }

/* This thread's memory, kept from one operation to the next and given back when the thread ends. */
static Scratch *scratch_of(int64_t bytes) {
  pthread_once(&once, make_key);
  Scratch *scratch = pthread_getspecific(key);
  if (!scratch) {
    scratch = calloc(1, sizeof *scratch);
    if (!scratch) return 0;
    pthread_setspecific(key, scratch);
  }
  if (scratch->bytes < bytes) {
    void *memory = 0;
    free(scratch->memory);
    *scratch = (Scratch){0};
    if (posix_memalign(&memory, 64, (size_t)bytes)) return 0;
    scratch->memory = memory;
    scratch->bytes = bytes;
  }
  return scratch;
}

static void work(void *argument) {
  Job *job = argument;
  if (__atomic_load_n(&job->next, __ATOMIC_RELAXED) >= job->plan.tasks) return;
  Scratch *scratch = scratch_of(job->plan.bytes);
  if (!scratch) {
    __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (;;) {
    int64_t task = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
    if (task >= job->plan.tasks) return;
    job->run(job, task, scratch);
  }
}

static void *work_alone(void *argument) {
  work(argument);
  return 0;
}

static int run(Job *job, int64_t threads) {
  static int64_t serial = 0;
  job->serial = __atomic_add_fetch(&serial, 1, __ATOMIC_RELAXED);
  if (threads > job->plan.tasks) threads = job->plan.tasks;
  if (threads <= 1) {
    work(job);
  } else if (openmp) {
    openmp(work, job, (unsigned)threads, 0);
  } else {
    pthread_t others[256];
    int64_t started = 0;
    while (started < threads - 1 && started < 256 && !pthread_create(&others[started], 0, work_alone, job)) started++;
    work(job);
    for (int64_t i = 0; i < started; i++) pthread_join(others[i], 0);
  }
  /* A thread without memory leaves its tasks to the others. */
  return job->failed && job->next < job->plan.tasks ? NO_MEMORY : OK;
}

/* Numbers below the normal ones are taken as zero, or as what they are. They cost a hundred times a normal number, and
 * gradients of attention are full of them. Each thread has its own switch. */
static void set_flushing(void *on) {
#if defined(__x86_64__)
  unsigned both = 0x8040, now = __builtin_ia32_stmxcsr(); /* what comes out, and what goes in */
  __builtin_ia32_ldmxcsr(*(int *)on ? now | both : now & ~both);
#elif defined(__aarch64__)
  uint64_t flush = (uint64_t)1 << 24, now;
  __asm__ volatile("mrs %0, fpcr" : "=r"(now));
  __asm__ volatile("msr fpcr, %0" ::"r"(*(int *)on ? now | flush : now & ~flush));
#else
  (void)on;
#endif
}

/* Set the switch of all threads that share the work; of those that are not shared, the caller's alone. */
void modernbert_flush_denormals(int on, int64_t threads) {
  if (openmp && threads > 1) openmp(set_flushing, &on, (unsigned)threads, 0);
  else set_flushing(&on);
}

/* ---- operations ---- */

static void run_product(Job *job, int64_t task, Scratch *scratch) {
  job->kernels->product(job->operation, &job->plan, job->serial, task, scratch);
}

static int product(const Kernels *k, const Product *op, int64_t threads) {
  if (op->rows <= 0 || op->weight.outputs <= 0) return OK;
  Job job = {.run = run_product, .kernels = k, .operation = op, .plan = k->plan_product(op, threads)};
  return run(&job, threads);
}

static void run_attention(Job *job, int64_t task, Scratch *scratch) {
  const Attention *op = job->operation;
  const int64_t *chunk = job->chunks + task / op->heads * 2;
  job->kernels->attention(op, chunk[0], chunk[1], job->chunk, task % op->heads, scratch);
}

static int64_t count_chunks(const Attention *op, int64_t chunk) {
  int64_t number = 0;
  for (int64_t i = 0; i < op->texts; i++) number += (op->starts[i + 1] - op->starts[i] + chunk - 1) / chunk;
  return number;
}

static int plan_attention(const Kernels *k, const Attention *op, int64_t threads, Job *job) {
  int64_t chunk = k->queries, number = count_chunks(op, chunk);
  *job = (Job){.run = run_attention, .kernels = k, .operation = op};
  if (!number) return OK;
  while (chunk > k->panel && number * op->heads < 4 * threads) chunk /= 2, number = count_chunks(op, chunk);
  int64_t *chunks = malloc((size_t)number * 2 * sizeof *chunks), *at = chunks;
  if (!chunks) return NO_MEMORY;
  for (int64_t i = 0; i < op->texts; i++)
    for (int64_t query = 0; query < op->starts[i + 1] - op->starts[i]; query += chunk) *at++ = i, *at++ = query;
  job->chunks = chunks;
  job->chunk = chunk;
  job->plan.tasks = number * op->heads;
  job->plan.bytes = k->attention_bytes(op);
  return OK;
}

static int attention(const Kernels *k, const Attention *op, int64_t threads) {
  Job job;
  int result = plan_attention(k, op, threads, &job);
  if (result == OK) result = run(&job, threads);
  free((void *)job.chunks);
  return result;
}

enum { NORM_ROWS = 64 };

static void run_normalize(Job *job, int64_t task, Scratch *scratch) {
  const Normalize *op = job->operation;
  int64_t first = task * NORM_ROWS, last = first + NORM_ROWS < op->rows ? first + NORM_ROWS : op->rows;
  scratch->serial = 0;
  job->kernels->normalize(op, first, last, (float *)scratch->memory);
}

static void plan_normalize(const Kernels *k, const Normalize *op, Job *job) {
  *job = (Job){.run = run_normalize, .kernels = k, .operation = op};
  job->plan.tasks = (op->rows + NORM_ROWS - 1) / NORM_ROWS;
  job->plan.bytes = op->width * 4 + 64;
}

static int normalize(const Kernels *k, const Normalize *op, int64_t threads) {
  Job job;
  plan_normalize(k, op, &job);
  return run(&job, threads);
}

static void run_step(Job *job, int64_t task, Scratch *scratch) {
  const Step *op = job->operation;
  scratch->serial = 0;
  job->kernels->step(op, task / op->heads, task % op->heads, (float *)scratch->memory);
}

static int step(const Kernels *k, const Step *op, int64_t threads) {
  Job job = {.run = run_step, .kernels = k, .operation = op};
  job.plan.tasks = op->texts * op->heads;
  job.plan.bytes = k->step_bytes(op);
  return run(&job, threads);
}

/* The product of one text's rows alone. */
static Product of_text(const Maxima *op, int64_t text) {
  Product part = op->product;
  int64_t first = op->starts[text];
  part.rows = op->starts[text + 1] - first;
  part.x.data = (char *)part.x.data + first * part.x.stride * (part.x.dtype == F32 ? 4 : 2);
  part.out.data = (float *)part.out.data + text * part.out.stride;
  return part;
}

/* A text is one task, so that no two threads write its maxima. */
static void run_maxima(Job *job, int64_t task, Scratch *scratch) {
  Product part = of_text(job->operation, task);
  Plan plan = job->kernels->plan_product(&part, 1);
  float *out = part.out.data;
  for (int64_t i = 0; i < part.weight.outputs; i++) out[i] = -__builtin_inff();
  for (int64_t i = 0; i < plan.tasks; i++) {
    scratch->serial = 0; /* what it holds are another text's rows */
    job->kernels->product(&part, &plan, job->serial, i, scratch);
  }
}

static int maxima(const Kernels *k, const Maxima *op, int64_t threads) {
  Job job = {.run = run_maxima, .kernels = k, .operation = op, .plan = {.tasks = op->texts}};
  for (int64_t i = 0; i < op->texts; i++) {
    Product part = of_text(op, i);
    int64_t bytes = k->plan_product(&part, 1).bytes;
    if (bytes > job.plan.bytes) job.plan.bytes = bytes;
  }
  return run(&job, threads);
}

static void run_training(Job *job, int64_t task, Scratch *scratch) {
  job->kernels->train(job->operation, job->chunk, task, scratch);
}

/* Operations of training are many and short. Threads start once for all of them: each goes through the jobs in order,
 * takes what tasks are left, and waits until all of a job are done. A thread that comes late finds nothing to do. */
typedef struct {
  Job *jobs;
  int64_t *done; /* how many tasks of each */
  int64_t count, bytes, most; /* memory of a thread, and tasks of a job, at most */
} Team;

static void wait_for(const int64_t *done, int64_t tasks) {
  for (int64_t tries = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < tasks; tries++) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (tries > 8000) sched_yield(); /* somebody else may need the core, perhaps the thread that is waited for */
  }
}

static void work_through(void *argument) {
  Team *team = argument;
  Scratch *scratch = scratch_of(team->bytes);
  if (!scratch) return; /* the others do its share */
  for (int64_t i = 0; i < team->count; i++) {
    Job *job = team->jobs + i;
    for (;;) {
      int64_t task = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
      if (task >= job->plan.tasks) break;
      job->run(job, task, scratch);
      __atomic_fetch_add(team->done + i, 1, __ATOMIC_RELEASE);
    }
    wait_for(team->done + i, job->plan.tasks);
  }
}

static void *work_through_alone(void *argument) {
  work_through(argument);
  return 0;
}

enum { PHASES = 2 }; /* of an operation, at most */

/* The jobs of operations, and how many there are; -1 without memory. */
static int64_t plan_team(const Kernels *k, const Operation *operations, int64_t count, int64_t threads, Team *team) {
  team->count = team->bytes = team->most = 0;
  for (int64_t i = 0; i < count; i++) {
    const Operation *op = operations + i;
    for (int64_t phase = 0; phase < PHASES; phase++) {
      Job *job = team->jobs + team->count;
      if (op->kind == TRAINING) {
        *job = (Job){.run = run_training, .kernels = k, .operation = &op->training, .chunk = phase};
        job->plan.tasks = k->training_tasks(&op->training, phase, &job->plan.bytes);
        if (job->plan.tasks < 0) break;
      } else if (phase) {
        break;
      } else if (op->kind == NORMALIZE) {
        plan_normalize(k, &op->normalize, job);
      } else if (plan_attention(k, &op->attention, threads, job) != OK) {
        return -1;
      }
      if (job->plan.bytes > team->bytes) team->bytes = job->plan.bytes;
      if (job->plan.tasks > team->most) team->most = job->plan.tasks;
      team->count++;
    }
  }
  return team->count;
}

static int train(const Kernels *k, const Operation *operations, int64_t count, int64_t threads) {
  Team team = {.jobs = calloc((size_t)(count * PHASES), sizeof(Job)), .done = calloc((size_t)(count * PHASES), 8)};
  int result = NO_MEMORY;
  if (team.jobs && team.done && plan_team(k, operations, count, threads, &team) >= 0) {
    if (threads > team.most) threads = team.most;
    if (threads <= 1) {
      work_through(&team);
    } else if (openmp) {
      openmp(work_through, &team, (unsigned)threads, 0);
    } else {
      pthread_t others[256];
      int64_t started = 0;
      while (started < threads - 1 && started < 256 && !pthread_create(&others[started], 0, work_through_alone, &team))
        started++;
      work_through(&team);
      for (int64_t i = 0; i < started; i++) pthread_join(others[i], 0);
    }
    int64_t last = team.count - 1;
    result = last < 0 || team.done[last] >= team.jobs[last].plan.tasks ? OK : NO_MEMORY;
  }
  for (int64_t i = 0; team.jobs && i < count * PHASES; i++) free((void *)team.jobs[i].chunks);
  free(team.jobs);
  free(team.done);
  return result;
}

static int is_training(const Operation *operations, int64_t count) {
  int found = 0;
  for (int64_t i = 0; i < count; i++) {
    int64_t kind = operations[i].kind;
    if (kind != TRAINING && kind != NORMALIZE && kind != ATTENTION) return 0;
    found |= kind == TRAINING;
  }
  return found;
}

/* Run operations one after another; 0, or what went wrong. */
int modernbert_run(const Kernels *k, const Operation *operations, int64_t count, int64_t threads) {
  if (is_training(operations, count)) return train(k, operations, count, threads);
  for (int64_t i = 0; i < count; i++) {
    const Operation *op = operations + i;
    int result = op->kind == PRODUCT     ? product(k, &op->product, threads)
                 : op->kind == NORMALIZE ? normalize(k, &op->normalize, threads)
                 : op->kind == STEP      ? step(k, &op->step, threads)
                 : op->kind == MAXIMA    ? maxima(k, &op->maxima, threads)
                                         : attention(k, &op->attention, threads);
    if (result != OK) return result;
  }
  return OK;
}
