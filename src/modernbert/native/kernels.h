/* What the kernels take and give: plain pointers and sizes, so that one build serves every PyTorch and Python.
 *
 * Rows lie one after another, `stride` numbers apart; a row's own numbers are contiguous. Numbers are float32 or
 * bfloat16, those of weights also integers. Every row of every result depends on its own inputs alone: neither on how many rows there are, nor on the
 * number of threads.
 */
#ifndef MODERNBERT_KERNELS_H
#define MODERNBERT_KERNELS_H

#include <stdint.h>

/* Whether all processors that this is compiled for multiply and add with one rounding. */
#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__aarch64__)
#define FUSES 1
#else
#define FUSES 0
#endif

enum { LAYOUT = 9 }; /* counts changes of what is below; library.py knows it */
enum { F32 = 0, BF16 = 1, S8 = 2, S4 = 3 }; /* the last two: weights of 8 and 4 bits */
enum { WRITE = 0, ADD = 1, GATE = 2, LARGEST = 3, UNGATE = 4 };
enum { GELU = 0, GELU_TANH = 1, RELU = 2, SILU = 3 };

typedef struct {
  void *data;
  int64_t stride;
  int64_t dtype;
} Rows;

/* LayerNorm over a row; weight 0 means none is wanted, bias 0 that there is none. */
typedef struct {
  const float *weight;
  const float *bias;
  float epsilon;
} Norm;

/* A weight of shape (outputs, inputs), laid out in panels of a few outputs with their biases.
 * gated: the first half of its outputs lies beside the second half, to be multiplied by it. */
typedef struct {
  int64_t outputs, inputs;
  int64_t gated;
  int64_t dtype; /* of the packed numbers */
  void *packed;
  const void *plain; /* what is packed, or unpacked into; contiguous, of the packed dtype */
  const float *bias; /* 0 where there is none */
  /* Of S8 and S4, whose plain numbers are bytes of -127 to 127, or half-bytes 8 too large, the even ones low: */
  int64_t group;             /* inputs that share a scale, a multiple of 4 */
  const float *scales;       /* (outputs, groups); bfloat16 numbers where there is more than one group */
  int64_t kept;              /* columns that are floats; their integers are zeros */
  const int32_t *columns;    /* (kept,) */
  const float *kept_weights; /* (outputs, kept) */
  int64_t float_rows;        /* whether rows stay floats; else they become bytes, a scale for each group */
} Weight;

/* out = norm(x) @ weight.T + bias, or out += it, or out = activation(first half of it) * second half; or the first row
 * of out, which is float32, becomes the largest of itself and of all rows. */
typedef struct {
  int64_t rows;
  Rows x;
  Norm norm;
  Weight weight;
  int64_t epilogue;
  int64_t activation;
  Rows out;
} Product;

/* out = norm(table[ids]), or norm(table) where ids is 0; written as float32 or bfloat16. */
typedef struct {
  int64_t rows, width;
  const int64_t *ids;
  Rows table;
  Norm norm;
  Rows out;
} Normalize;

/* Softmax attention of each query over the keys of its own text within reach. `out` may be `q`. */
typedef struct {
  int64_t texts, heads, head_dim;
  const int64_t *starts;    /* (texts + 1,) first token of each text, and the end */
  const int64_t *positions; /* of the queries, rising within a text; 0: every query sees all keys of its text */
  const int64_t *key_positions;
  int64_t left, right;         /* inclusive, in positions; -1 is endless */
  const float *cos, *sin;      /* (queries, head_dim), the sines with their sign; 0: rotated already */
  const float *key_cos, *key_sin;
  float scale;
  Rows q, k, v, out;
} Attention;

/* One new token of each text: its key and value are rotated and stored, and it attends to stored rows within reach. */
typedef struct {
  int64_t texts, heads, head_dim;
  const int64_t *rows;          /* (texts,) where the new keys and values go */
  const int64_t *first;         /* (texts,) first stored row of each text */
  const int64_t *length;        /* (texts,) how many there are, the new one, which is the last, among them */
  const int64_t *skip;          /* (texts,) where a ring begins: its row i is first + (skip + i) % ring; 0 without one */
  int64_t ring;                 /* rows of a ring, or 0 */
  int64_t in_order;             /* several of these are tokens of one text, each of which sees those before it */
  int64_t most;                 /* the largest length */
  const int64_t *positions;     /* (texts,) of the new tokens; 0: they see all of these rows */
  const int64_t *key_positions; /* of all stored rows */
  int64_t left;                 /* how far back a token sees, inclusive */
  const float *cos, *sin;       /* (texts, head_dim) */
  float scale;
  Rows q, k, v, out; /* of the new tokens; `out` may be `q` */
  Rows keys, values; /* stored */
} Step;

/* Of each output of the weight the largest product with the rows of each text: out is (texts, outputs) float32. */
typedef struct {
  int64_t texts;
  const int64_t *starts; /* (texts + 1,) first row of each text, and the end; no text is empty */
  Product product;       /* of all rows; its epilogue is LARGEST */
} Maxima;

/* Cosines and sines of positions times frequencies, as attention takes them: both halves of a row have the same angles,
 * and the sines of the first half are negated. */
typedef struct {
  int64_t rows, half;
  const int64_t *positions; /* (rows,) */
  const float *frequencies; /* (half,) */
  float scale;              /* of both */
  float *cos, *sin;         /* (rows, 2 half) */
} Tables;

/* out = activation(x) */
typedef struct {
  int64_t rows, width;
  int64_t activation;
  Rows x, out;
} Activate;

/* Of training. Matrices may be bfloat16 where products are of such numbers.
 *
 * out (rows, columns) = a (rows, depth) @ b (depth, columns), by the epilogue:
 *   WRITE   + plus, where there is any
 *   GATE    that goes to `gates`, and gelu(its first half) * its second half to `out` (rows, columns / 2)
 *   UNGATE  that is the gradient of what GATE gave: `out` (rows, 2 * columns) gets the gradient of `gates`, and `plus`
 *           (rows, columns) once more what GATE gave */
typedef struct {
  int64_t rows, columns, depth;
  int64_t a_turned, b_turned; /* whether they lie as (depth, rows) and (columns, depth) */
  int64_t narrowed;           /* whether their numbers become bfloat16; only where these are multiplied */
  int64_t epilogue;
  float *packed_a; /* room for rows of depth + 32 numbers */
  float *packed_b; /* and for columns, two panels more than there are */
  Rows a, b, plus, gates, out;
} Matmul;

/* out = plus + the gradient of x, where `grad` is that of norm(x) without bias; and the gradient of its weight. */
typedef struct {
  int64_t rows, width;
  const float *weight;
  float *weight_grad;
  float *shares; /* room for a row of floats for every 64 rows */
  float epsilon;
  Rows x, grad, plus, out;
} NormBack;

/* The gradients of q, k and v, none of them rotated, where `grad` is that of `out`, which Attention gave with the same
 * angles and positions. */
typedef struct {
  int64_t texts, heads, head_dim;
  int64_t narrowed; /* as of Matmul */
  const int64_t *starts, *positions;
  int64_t left, right;
  const float *cos, *sin;
  float scale;
  Rows q, k, v, out, grad, q_grad, k_grad, v_grad;
} AttentionBack;

/* A tensor of weights, and what Adam knows of it. */
typedef struct {
  float *weight;
  const float *grad;
  float *mean, *square; /* running ones of gradients and of their squares */
  int64_t count;
  int64_t first; /* the number of its first chunk among those of all tensors */
  float lr, decay, of_mean, of_square; /* of this step; the last two are 1 - beta ** steps */
} Slice;

enum { CHUNK = 1 << 14 }; /* numbers of a tensor, the last chunk of which may be shorter */

/* A step of AdamW, of StableAdamW, or the sums of squares of all gradients alone, which go to `sums`. */
typedef struct {
  int64_t chunks;
  int64_t kind;
  const Slice *slices;
  const int64_t *owners; /* (chunks,) the slice of each */
  double *sums;          /* (chunks,) */
  float of_grad, of_square, of_new, eps; /* 1 - beta1, beta2 and 1 - beta2 */
  float shrink;                          /* what gradients are multiplied by */
} Adam;

enum { SQUARES = 0, ADAMW = 1, STABLE_ADAMW = 2 };

enum { MATMUL = 0, NORM_BACK = 1, ATTENTION_BACK = 2, ADAM = 3 };

typedef struct {
  int64_t kind;
  union {
    Matmul matmul;
    NormBack norm;
    AttentionBack attention;
    Adam adam;
  };
} Training;

enum {
  PRODUCT = 0,
  NORMALIZE = 1,
  ATTENTION = 2,
  STEP = 3,
  MAXIMA = 4,
  TABLES = 5,
  ACTIVATE = 6,
  TRAINING = 7,
};

/* One operation of several that run one after another. */
typedef struct {
  int64_t kind;
  union {
    Product product;
    Normalize normalize;
    Attention attention;
    Step step;
    Maxima maxima;
    Tables tables;
    Activate activate;
    Training training;
  };
} Operation;

/* What one operation does as many independent tasks, and the memory that a thread needs at a time. */
typedef struct {
  int64_t tasks;
  int64_t bytes;
  int64_t block, blocks, groups; /* rows a block; blocks of rows; groups of panels */
} Plan;

/* Where a thread works. `serial` and `block` say which rows `rows` holds. */
typedef struct {
  char *memory;
  int64_t bytes;
  int64_t serial, block;
} Scratch;

/* The kernels of one kind of processor. */
typedef struct {
  int64_t multiplies; /* whether bfloat16 numbers are multiplied as such */
  int64_t panel;      /* a task of attention takes so many queries of one text, or several times as many; */
  int64_t queries;    /* at most these. Results do not depend on it. */
  int64_t (*packed_bytes)(const Weight *);
  void (*pack)(const Weight *); /* number by number, the definition of the packed layout; `move` does the same */
  void (*unpack)(const Weight *);
  Plan (*plan_product)(const Product *, int64_t threads);
  /* Where the weights begin that a task reads first; of the task after the last one, where they end. */
  const char *(*weights_of)(const Product *, const Plan *, int64_t task);
  int64_t (*prepared_bytes)(const Product *);
  void (*prepare)(const Product *, int64_t first, int64_t last, void *prepared, Scratch *);
  /* `after` is what the thread reads when the task is done, or 0. `prepared`: all rows, from their first one on; or 0. */
  void (*product)(const Product *, const Plan *, int64_t serial, int64_t task, const char *after, const void *prepared,
                  Scratch *);
  int64_t (*attention_bytes)(const Attention *);
  void (*attention)(const Attention *, int64_t text, int64_t query, int64_t most, int64_t head, Scratch *);
  int64_t (*step_bytes)(const Step *);
  void (*step)(const Step *, int64_t text, int64_t head, float *scratch);
  void (*normalize)(const Normalize *, int64_t first, int64_t last, float *scratch);
  void (*tables)(const Tables *, int64_t first, int64_t last);
  void (*activate)(const Activate *, int64_t first, int64_t last);
  int64_t (*training_tasks)(const Training *, int64_t phase, int64_t *bytes); /* -1 after the last phase */
  void (*train)(const Training *, int64_t phase, int64_t task, Scratch *);
  void (*move)(const Weight *, int64_t part, int64_t parts, int to_packed); /* a part of the panels, for one thread */
} Kernels;

#endif
