/* The library's door: which kernels serve on this processor, and their tasks shared out among threads.
 *
 * Threads are PyTorch's own where it runs on an OpenMP whose `GOMP_parallel` could be found: two pools of threads would
 * wait for each other's cores. Elsewhere they are started for each call. They start once for all operations of a call,
 * and wait for each other in between without the system's help: a pass over a short text is a hundred operations of
 * some tens of microseconds.
 */
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "kernels.h"
#include "system.h" /* last: it renames functions of the others */

#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#if !defined(WITHOUT_BF16) /* compilers that do not know the instruction */
extern const Kernels kernels_avx512bf16, kernels_avx512vnni;
#endif
#if defined(IMITATE_BF16)
extern const Kernels kernels_imitated;
#endif
#endif
#if defined(__aarch64__)
extern const Kernels kernels_neon;
#if !defined(WITHOUT_BF16)
extern const Kernels kernels_neondot, kernels_neonbf16;
#endif
#endif
extern const Kernels kernels_portable;
#if !FUSES
extern const Kernels kernels_exact;
#endif

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
#if defined(__aarch64__)
#if !defined(WITHOUT_BF16)
    {"neonbf16", &kernels_neonbf16},
    {"neondot", &kernels_neondot},
#endif
    {"neon", &kernels_neon},
#endif
    {"portable", &kernels_portable},
#if !FUSES
    {"exact", &kernels_exact}, /* never the first */
#endif
};

#if defined(__aarch64__)
/* Whether the processor has an instruction: by Linux's bit of a word, or by Apple's name. */
static int has(unsigned long word, int bit, const char *name) {
#if defined(__linux__)
  (void)name;
  return getauxval(word) >> bit & 1;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  (void)word, (void)bit;
  return !sysctlbyname(name, &found, &size, 0, 0) && found;
#else
  (void)word, (void)bit, (void)name;
  return 0;
#endif
}
enum { HWCAP = 16, HWCAP2 = 26 }; /* of getauxval */
#endif
#if defined(__x86_64__)
/* What the processor has and the system saves where it changes threads. Asked of the processor itself: what compilers
 * offer for it is a part of their own libraries, which not every one of them brings. */
typedef struct {
  int avx2, avx512, vnni, bf16;
} Found;

static Found look(void) {
  Found found = {0, 0, 0, 0};
  unsigned a, b, c, d, saved, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return found; /* whether it tells what is saved */
  int fma = c >> 12 & c >> 28 & 1;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!fma || (saved & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, all = f | dq | bw | vl;
  found.avx2 = b >> 5 & 1;
  found.avx512 = (saved & 0xe6) == 0xe6 && (b & all) == all;
  found.vnni = found.avx512 && (c >> 11 & 1);
  found.bf16 = found.vnni && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  return found;
}
#endif

static int runs_here(const char *name) {
#if defined(__x86_64__)
  Found found = look();
#if !defined(WITHOUT_BF16)
  if (!strcmp(name, "avx512bf16")) return found.bf16;
  if (!strcmp(name, "avx512vnni")) return found.vnni;
#endif
  if (!strcmp(name, "avx512") || !strcmp(name, "imitated")) return found.avx512;
  if (!strcmp(name, "avx2")) return found.avx2;
#endif
#if defined(__aarch64__)
  int sums_of_bytes = has(HWCAP, 20, "hw.optional.arm.FEAT_DotProd");
  if (!strcmp(name, "neonbf16")) return sums_of_bytes && has(HWCAP2, 14, "hw.optional.arm.FEAT_BF16");
  if (!strcmp(name, "neondot")) return sums_of_bytes;
  if (!strcmp(name, "neon")) return 1;
#endif
  return !strcmp(name, "portable") || !strcmp(name, "exact");
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
void modernbert_move(const Kernels *k, const Weight *w, int64_t part, int64_t parts, int to_packed) {
  k->move(w, part, parts, to_packed);
}

/* ---- threads ---- */

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
static Parallel openmp = 0;
void modernbert_share_threads(Parallel gomp_parallel) { openmp = gomp_parallel; }

/* A thread's share of an operation's tasks. Each thread takes its own share in order, then what others left of theirs. */
typedef struct {
  int64_t next, end;
  char apart[48]; /* each on a cache line of its own */
} Share;

/* One operation on its way. */
typedef struct Job Job;
struct Job {
  void (*run)(Job *, int64_t task, const char *after, Scratch *);
  const Kernels *kernels;
  const void *operation;
  Plan plan;
  int64_t serial;
  void *prepared;        /* of a product whose rows the job before it prepares, and of that job; or 0 */
  const int64_t *chunks; /* of attention: (text, first query of it) pairs */
  int64_t chunk;         /* queries of each; of training the phase */
  void *owned;           /* freed when all are done */
  Share *shares;
  const Job *after; /* the next product of one block of rows, whose weights are read ahead; or 0 */
  char apart[64];
  int64_t done; /* tasks */
};

/* Operations that threads run together, one after another: nobody begins one before all tasks of the one before are
 * done. No thread is waited for that has not begun a task, so there may be fewer of them than shares. */
typedef struct {
  Job *jobs;
  int64_t count, threads, bytes, joined;
} Team;

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

/* Where the weights of a product's task lie. */
static const char *weights_at(const Job *job, int64_t task) {
  return job->kernels->weights_of(job->operation, &job->plan, task);
}

/* Memory that a thread reads soon. It is asked for while the thread works on what needs no memory, or waits. */
enum { SOON = 256 * 1024, LINE = 64 };
typedef struct {
  const char *at, *end;
} Soon;

static Soon soon_of(const Job *job, int64_t share) {
  Soon soon = {0, 0};
  if (!job) return soon;
  const Share *own = &job->shares[share];
  int64_t next = __atomic_load_n(&own->next, __ATOMIC_RELAXED); /* others may be there already */
  if (next >= own->end) return soon;
  soon.at = weights_at(job, next);
  soon.end = weights_at(job, own->end);
  if (soon.end - soon.at > SOON) soon.end = soon.at + SOON;
  return soon;
}

static void ask_for(Soon *soon, int64_t lines) {
  for (; lines > 0 && soon->at < soon->end; lines--, soon->at += LINE) __builtin_prefetch(soon->at, 0, 2);
}

static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Until all tasks of an operation are done: at first awake, then leaving the core to others. */
static void wait_for(const Job *job, Soon *soon) {
  for (int64_t turn = 0; __atomic_load_n(&job->done, __ATOMIC_ACQUIRE) < job->plan.tasks; turn++) {
    if (soon->at < soon->end) ask_for(soon, 16);
    else if (turn < 4096) relax();
    else sched_yield();
  }
}

static void work(void *argument) {
  Team *team = argument;
  const int64_t threads = team->threads, me = __atomic_fetch_add(&team->joined, 1, __ATOMIC_RELAXED) % threads;
  Scratch *scratch = scratch_of(team->bytes);
  if (!scratch) return; /* the others do its share */
  for (int64_t i = 0; i < team->count; i++) {
    Job *job = team->jobs + i;
    Soon soon = soon_of(job->after, me);
    const char *next_weights = soon.at;
    const int64_t reads = job->plan.blocks; /* of a product: it asks for memory by itself */
    int64_t done = 0;
    for (int64_t share = 0; share < threads; share++) {
      Share *from = &job->shares[(me + share) % threads];
      while (__atomic_load_n(&from->next, __ATOMIC_RELAXED) < from->end) {
        int64_t task = __atomic_fetch_add(&from->next, 1, __ATOMIC_RELAXED);
        if (task >= from->end) break;
        if (!reads) ask_for(&soon, 512);
        const char *after = !reads ? 0 : task + 1 < from->end ? weights_at(job, task + 1) : next_weights;
        job->run(job, task, after, scratch);
        done++;
      }
    }
    if (done) __atomic_add_fetch(&job->done, done, __ATOMIC_RELEASE);
    wait_for(job, &soon);
  }
}

static void *work_alone(void *argument) {
  work(argument);
  return 0;
}

/* Run jobs one after another. */
static int run(Job *jobs, int64_t count, int64_t threads) {
  static int64_t serial = 0;
  Team team = {.jobs = jobs, .count = count, .threads = threads};
  int64_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    if (jobs[i].plan.tasks > most) most = jobs[i].plan.tasks;
    if (jobs[i].plan.bytes > team.bytes) team.bytes = jobs[i].plan.bytes;
  }
  if (!most) return OK;
  if (team.threads > most) team.threads = most;
  if (team.threads < 1) team.threads = 1;
  Share *shares = 0;
  if (posix_memalign((void **)&shares, LINE, (size_t)(count * team.threads) * sizeof *shares)) return NO_MEMORY;
  const Job *after = 0;
  for (int64_t i = count - 1; i >= 0; i--) {
    Job *job = jobs + i;
    job->serial = __atomic_add_fetch(&serial, 1, __ATOMIC_RELAXED);
    job->shares = shares + i * team.threads;
    job->after = after;
    for (int64_t t = 0; t < team.threads; t++) {
      job->shares[t].next = job->plan.tasks * t / team.threads;
      job->shares[t].end = job->plan.tasks * (t + 1) / team.threads;
    }
    if (job->plan.blocks == 1 && job->plan.tasks) after = job;
    else if (job->plan.blocks) after = 0;
  }
  if (team.threads == 1) {
    work(&team);
  } else if (openmp) {
    openmp(work, &team, (unsigned)team.threads, 0);
  } else {
    pthread_t others[256];
    int64_t started = 0;
    while (started < team.threads - 1 && started < 256 && !pthread_create(&others[started], 0, work_alone, &team))
      started++;
    work(&team);
    for (int64_t i = 0; i < started; i++) pthread_join(others[i], 0);
  }
  free(shares);
  for (int64_t i = 0; i < count; i++)
    if (jobs[i].done < jobs[i].plan.tasks) return NO_MEMORY; /* no thread had any */
  return OK;
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

static void run_product(Job *job, int64_t task, const char *after, Scratch *scratch) {
  job->kernels->product(job->operation, &job->plan, job->serial, task, after, job->prepared, scratch);
}

static void run_prepare(Job *job, int64_t task, const char *after, Scratch *scratch) {
  const Product *op = job->operation;
  (void)after;
  scratch->serial = 0;
  job->kernels->prepare(op, op->rows * task / job->plan.tasks, op->rows * (task + 1) / job->plan.tasks, job->prepared, scratch);
}

/* Where several threads compute with the same few rows, they prepare them together first, in a job of its own. */
static int plan_product(Job **next, const Product *op, int64_t threads) {
  Job *job = *next;
  if (op->rows <= 0 || op->weight.outputs <= 0) return OK;
  Plan plan = job->kernels->plan_product(op, threads);
  int64_t bytes = threads > 1 && op->rows > 1 && plan.blocks == 1 ? job->kernels->prepared_bytes(op) : 0;
  void *prepared = 0;
  if (bytes) {
    if (posix_memalign(&prepared, LINE, (size_t)bytes)) return NO_MEMORY;
    job->run = run_prepare;
    job->plan.tasks = op->rows < 4 * threads ? op->rows : 4 * threads;
    job->plan.bytes = plan.bytes;
    job->prepared = prepared;
    job[1].kernels = job->kernels;
    job[1].operation = job->operation;
    *next = ++job;
    job->owned = prepared;
  }
  job->run = run_product;
  job->plan = plan;
  job->prepared = prepared;
  return OK;
}

static void run_attention(Job *job, int64_t task, const char *after, Scratch *scratch) {
  const Attention *op = job->operation;
  const int64_t *chunk = job->chunks + task / op->heads * 2;
  (void)after;
  job->kernels->attention(op, chunk[0], chunk[1], job->chunk, task % op->heads, scratch);
}

static int64_t count_chunks(const Attention *op, int64_t chunk) {
  int64_t number = 0;
  for (int64_t i = 0; i < op->texts; i++) number += (op->starts[i + 1] - op->starts[i] + chunk - 1) / chunk;
  return number;
}

static int plan_attention(Job *job, const Attention *op, int64_t threads) {
  const Kernels *k = job->kernels;
  int64_t chunk = k->queries, number = count_chunks(op, chunk);
  if (!number) return OK;
  while (chunk > k->panel && number * op->heads < 4 * threads) chunk /= 2, number = count_chunks(op, chunk);
  int64_t *chunks = malloc((size_t)number * 2 * sizeof *chunks), *at = chunks;
  if (!chunks) return NO_MEMORY;
  for (int64_t i = 0; i < op->texts; i++)
    for (int64_t query = 0; query < op->starts[i + 1] - op->starts[i]; query += chunk) *at++ = i, *at++ = query;
  job->run = run_attention;
  job->chunks = job->owned = chunks;
  job->chunk = chunk;
  job->plan.tasks = number * op->heads;
  job->plan.bytes = k->attention_bytes(op);
  return OK;
}

enum { NORM_ROWS = 16 };

static void run_normalize(Job *job, int64_t task, const char *after, Scratch *scratch) {
  const Normalize *op = job->operation;
  int64_t first = task * NORM_ROWS, last = first + NORM_ROWS < op->rows ? first + NORM_ROWS : op->rows;
  (void)after;
  scratch->serial = 0;
  job->kernels->normalize(op, first, last, (float *)scratch->memory);
}

static void plan_normalize(Job *job, const Normalize *op) {
  job->run = run_normalize;
  job->plan.tasks = (op->rows + NORM_ROWS - 1) / NORM_ROWS;
  job->plan.bytes = op->width * 4 + 64;
}

static void run_tables(Job *job, int64_t task, const char *after, Scratch *scratch) {
  const Tables *op = job->operation;
  int64_t first = task * NORM_ROWS, last = first + NORM_ROWS < op->rows ? first + NORM_ROWS : op->rows;
  (void)after, (void)scratch;
  job->kernels->tables(op, first, last);
}

static void run_activate(Job *job, int64_t task, const char *after, Scratch *scratch) {
  const Activate *op = job->operation;
  int64_t first = task * NORM_ROWS, last = first + NORM_ROWS < op->rows ? first + NORM_ROWS : op->rows;
  (void)after, (void)scratch;
  job->kernels->activate(op, first, last);
}

/* Rows by which no memory is needed. */
static void plan_rows(Job *job, int64_t rows, void (*run)(Job *, int64_t, const char *, Scratch *)) {
  job->run = run;
  job->plan.tasks = (rows + NORM_ROWS - 1) / NORM_ROWS;
  job->plan.bytes = 64;
}

static void run_step(Job *job, int64_t task, const char *after, Scratch *scratch) {
  const Step *op = job->operation;
  (void)after;
  scratch->serial = 0;
  if (!op->in_order) job->kernels->step(op, task / op->heads, task % op->heads, (float *)scratch->memory);
  else
    for (int64_t text = 0; text < op->texts; text++) job->kernels->step(op, text, task, (float *)scratch->memory);
}

static void plan_step(Job *job, const Step *op) {
  job->run = run_step;
  job->plan.tasks = op->texts && op->in_order ? op->heads : op->texts * op->heads;
  job->plan.bytes = job->kernels->step_bytes(op);
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
static void run_maxima(Job *job, int64_t task, const char *after, Scratch *scratch) {
  Product part = of_text(job->operation, task);
  Plan plan = job->kernels->plan_product(&part, 1);
  float *out = part.out.data;
  (void)after;
  for (int64_t i = 0; i < part.weight.outputs; i++) out[i] = -__builtin_inff();
  for (int64_t i = 0; i < plan.tasks; i++) {
    scratch->serial = 0; /* what it holds are another text's rows */
    job->kernels->product(&part, &plan, job->serial, i, 0, 0, scratch);
  }
}

static void plan_maxima(Job *job, const Maxima *op) {
  job->run = run_maxima;
  job->plan.tasks = op->texts;
  for (int64_t i = 0; i < op->texts; i++) {
    Product part = of_text(op, i);
    int64_t bytes = job->kernels->plan_product(&part, 1).bytes;
    if (bytes > job->plan.bytes) job->plan.bytes = bytes;
  }
}

static void run_training(Job *job, int64_t task, const char *after, Scratch *scratch) {
  (void)after;
  scratch->serial = 0;
  job->kernels->train(job->operation, job->chunk, task, scratch);
}

/* An operation of training is one job, or two. */
static void plan_training(Job **next, const Training *op) {
  for (int64_t phase = 0; phase < 2; phase++) {
    Job *job = *next + phase;
    int64_t bytes = 0, tasks = (*next)->kernels->training_tasks(op, phase, &bytes);
    if (tasks < 0) {
      *next += phase - 1;
      return;
    }
    job->kernels = (*next)->kernels;
    job->operation = op;
    job->run = run_training;
    job->plan.tasks = tasks;
    job->plan.bytes = bytes;
    job->chunk = phase;
  }
  *next += 1;
}

/* Run operations one after another; 0, or what went wrong. */
int modernbert_run(const Kernels *k, const Operation *operations, int64_t count, int64_t threads) {
  Job *jobs = calloc((size_t)(2 * count + 1), sizeof *jobs), *job = jobs; /* some take two */
  int result = jobs ? OK : NO_MEMORY;
  for (int64_t i = 0; i < count && result == OK; i++, job++) {
    const Operation *op = operations + i;
    job->kernels = k;
    job->operation = &op->product; /* where each of them begins */
    if (op->kind == PRODUCT) result = plan_product(&job, &op->product, threads);
    else if (op->kind == NORMALIZE) plan_normalize(job, &op->normalize);
    else if (op->kind == STEP) plan_step(job, &op->step);
    else if (op->kind == MAXIMA) plan_maxima(job, &op->maxima);
    else if (op->kind == TABLES) plan_rows(job, op->tables.rows, run_tables);
    else if (op->kind == ACTIVATE) plan_rows(job, op->activate.rows, run_activate);
    else if (op->kind == TRAINING) plan_training(&job, &op->training);
    else result = plan_attention(job, &op->attention, threads);
  }
  if (result == OK && count) result = run(jobs, job - jobs, threads);
  if (jobs)
    for (int64_t i = 0; i <= 2 * count; i++) free(jobs[i].owned);
  free(jobs);
  return result;
}
