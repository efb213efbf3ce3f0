/* What the kernels take and give: plain pointers and sizes, so that one build serves every PyTorch and Python.
 *
 * Rows lie one after another, `stride` numbers apart; a row's own numbers are contiguous. Numbers are float32 or
 * bfloat16, those of weights also integers. Every row of every result depends on its own inputs alone: neither on how many rows there are, nor on the
 * number of threads.
 */
#ifndef MODERNBERT_KERNELS_H
#define MODERNBERT_KERNELS_H

#include <stdint.h>

enum { LAYOUT = 5 }; /* counts changes of what is below; library.py knows it */
enum { F32 = 0, BF16 = 1, S8 = 2, S4 = 3 }; /* the last two: weights of 8 and 4 bits */
enum { WRITE = 0, ADD = 1, GATE = 2, LARGEST = 3 };
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
  const int64_t *length;        /* (texts,) how many there are, the new one among them */
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

enum { PRODUCT = 0, NORMALIZE = 1, ATTENTION = 2, STEP = 3, MAXIMA = 4 };

/* One operation of several that run one after another. */
typedef struct {
  int64_t kind;
  union {
    Product product;
    Normalize normalize;
    Attention attention;
    Step step;
    Maxima maxima;
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
  void (*product)(const Product *, const Plan *, int64_t serial, int64_t task, Scratch *);
  int64_t (*attention_bytes)(const Attention *);
  void (*attention)(const Attention *, int64_t text, int64_t query, int64_t most, int64_t head, Scratch *);
  int64_t (*step_bytes)(const Step *);
  void (*step)(const Step *, int64_t text, int64_t head, float *scratch);
  void (*normalize)(const Normalize *, int64_t first, int64_t last, float *scratch);
  void (*move)(const Weight *, int64_t part, int64_t parts, int to_packed); /* a part of the panels, for one thread */
} Kernels;

#endif
