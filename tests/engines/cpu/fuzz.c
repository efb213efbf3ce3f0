/* Random operations on every set of kernels that runs here, against the definition in double precision. Memory is just
 * as large as the operation may touch, so that a sanitizer sees every number read or written beside it.
 *
 * Each result may stray by what its arithmetic can lose at most: a sum by a share of its terms' sizes, not of itself,
 * for large terms may cancel. So there is no false alarm, however many rounds are run.
 *
 * All kernels do the same random operations, and a line says of each kind: its name, whether all was right, a digest of
 * the bits of results in float32 and with integers, one of those with bfloat16 weights or attention, and whether it
 * multiplies bfloat16 numbers as such. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

extern const Kernels *modernbert_kernels(const char *, const char **);
extern int64_t modernbert_packed_bytes(const Kernels *, const Weight *);
extern void modernbert_pack(const Kernels *, const Weight *);
extern void modernbert_unpack(const Kernels *, const Weight *);
extern void modernbert_move(const Kernels *, const Weight *, int64_t, int64_t, int);
extern int modernbert_run(const Kernels *, const Operation *, int64_t, int64_t);

#define SINGLE 6e-8 /* of a number is lost at most where it is rounded to float32, */
#define HALF 4e-3   /* and to bfloat16 */

static uint64_t state = 1;
static int64_t below(int64_t n) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (int64_t)((state >> 33) % (uint64_t)n);
}
static double number(void) { return below(2000001) / 1e6 - 1; }

static double get(const Rows *x, int64_t row, int64_t column) {
  int64_t at = row * x->stride + column;
  if (x->dtype == F32) return ((float *)x->data)[at];
  uint32_t bits = (uint32_t)((uint16_t *)x->data)[at] << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
static void put(const Rows *x, int64_t row, int64_t column, double value) {
  int64_t at = row * x->stride + column;
  float narrow = (float)value;
  uint32_t bits;
  memcpy(&bits, &narrow, 4);
  if (x->dtype == F32) ((float *)x->data)[at] = narrow;
  else ((uint16_t *)x->data)[at] = (uint16_t)(bits >> 16);
}
static Rows rows_of(int64_t rows, int64_t width, int64_t gap, int64_t dtype) {
  int64_t stride = width + gap, size = dtype == F32 ? 4 : 2, count = rows ? (rows - 1) * stride + width : 0;
  Rows x = {malloc((size_t)(count * size)), stride, dtype};
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < width; c++) put(&x, r, c, number());
  return x;
}
static float *floats(int64_t count) {
  float *x = malloc((size_t)count * 4);
  for (int64_t i = 0; i < count; i++) x[i] = (float)number();
  return x;
}
/* Compilers take the arguments of a call in orders of their own, and numbers have to be the same everywhere. */
static Rows any_rows(int64_t rows, int64_t width) {
  int64_t gap = below(3);
  return rows_of(rows, width, gap, below(2));
}
static Norm any_norm(int64_t width) {
  Norm norm = {floats(width), 0, 1e-5f};
  if (below(2)) norm.bias = floats(width);
  return norm;
}
static Rows copy_of(const Rows *x, int64_t rows, int64_t width) {
  Rows y = rows_of(rows, width, 0, F32);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < width; c++) put(&y, r, c, get(x, r, c));
  return y;
}

static int wrong = 0;
/* `lost` is what `wanted` may stray by before it is rounded to the dtype that it is stored in. */
static void expect(const char *what, double got, double wanted, double lost, int64_t dtype) {
  double limit = lost + (fabs(wanted) + lost) * (dtype == BF16 ? HALF : SINGLE) + 1e-7;
  if (fabs(got - wanted) <= limit) return;
  if (wrong++ < 10) printf("%s: %g where %g is right, within %g\n", what, got, wanted, limit);
}

/* Of what every kind has to give the same bits of, and of what those that do not multiply bfloat16 have to. */
static uint64_t digests[2];
static void digest(const Rows *x, int64_t rows, int64_t width, int of_bfloat16) {
  uint64_t *at = &digests[of_bfloat16];
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < width; c++) {
      int64_t place = r * x->stride + c;
      uint32_t bits = x->dtype == F32 ? ((uint32_t *)x->data)[place] : ((uint16_t *)x->data)[place];
      *at = (*at ^ bits) * 1099511628211u;
      *at ^= *at >> 29;
    }
}

static void run(const Kernels *k, Operation *op) {
  if (modernbert_run(k, op, 1, 1 + below(3))) printf("no memory\n"), exit(2);
}

/* A row, normed if it is to be; what each of its numbers may have lost. */
static double normed(const Norm *norm, const Rows *x, int64_t row, int64_t width, double *out) {
  double mean = 0, square = 0;
  for (int64_t i = 0; i < width; i++) mean += (out[i] = get(x, row, i)) / (double)width;
  if (!norm->weight) return 0;
  for (int64_t i = 0; i < width; i++) square += pow(out[i] - mean, 2) / (double)width;
  double share = 1 / sqrt(square + norm->epsilon);
  for (int64_t i = 0; i < width; i++) out[i] = (out[i] - mean) * share * norm->weight[i] + (norm->bias ? norm->bias[i] : 0);
  /* The mean of numbers up to 1, and so each difference to it; and the sum of their squares. */
  return (double)(width + 4) * SINGLE * share * 2 + 1e-6;
}

/* An activated sum u and what it and its partner v may have lost, to the product of both and what this may have lost. */
static double gated_by(int64_t activation, double u, double v, double *lost_u, double lost_v) {
  double tanh_gelu = u / 2 * (1 + tanh(0.7978845608 * (u + 0.044715 * u * u * u)));
  double all[] = {u / 2 * (1 + erf(u / sqrt(2))), tanh_gelu, u > 0 ? u : 0, u / (1 + exp(-u))};
  double active = all[activation], lost = *lost_u * 1.2 + 4e-6 * (1 + fabs(u)); /* no slope is above 1.2 */
  *lost_u = lost * fabs(v) + fabs(active) * lost_v + lost * lost_v;
  return active * v;
}

static void fuzz_product(const Kernels *k) {
  int64_t dtype = below(2), gated = below(3) == 0, inputs = 1 + below(90), outputs = (1 + below(100)) * (gated ? 2 : 1);
  int64_t rows = below(4) ? below(70) : below(600), width = gated ? outputs / 2 : outputs;
  Rows plain = rows_of(outputs, inputs, 0, dtype);
  Operation op = {.kind = PRODUCT};
  Product *p = &op.product;
  p->rows = rows;
  p->weight = (Weight){outputs, inputs, gated, dtype, 0, plain.data, below(2) ? floats(outputs) : 0};
  size_t bytes = (size_t)modernbert_packed_bytes(k, &p->weight);
  p->weight.packed = aligned_alloc(64, (bytes + 63) / 64 * 64);
  modernbert_pack(k, &p->weight);
  Weight back = p->weight;
  back.plain = malloc((size_t)(outputs * inputs * (dtype == F32 ? 4 : 2)));
  modernbert_unpack(k, &back);
  if (memcmp(back.plain, plain.data, (size_t)(outputs * inputs * (dtype == F32 ? 4 : 2)))) wrong++, printf("unpack\n");
  p->x = any_rows(rows, inputs);
  if (below(2)) p->norm = any_norm(inputs);
  p->epilogue = gated ? GATE : below(2) ? ADD : WRITE;
  p->activation = below(4);
  p->out = any_rows(rows, width);
  Rows before = copy_of(&p->out, rows, width);
  run(k, &op);
  digest(&p->out, rows, width, dtype == BF16);
  double rounding = (double)(inputs + 8) * SINGLE + (dtype == BF16 && k->multiplies ? HALF : 0);
  double *sums = malloc((size_t)outputs * 8), *lost = malloc((size_t)outputs * 8), *x = malloc((size_t)inputs * 8);
  for (int64_t r = 0; r < rows; r++) {
    double of_x = normed(&p->norm, &p->x, r, inputs, x);
    for (int64_t o = 0; o < outputs; o++) {
      sums[o] = p->weight.bias ? p->weight.bias[o] : 0, lost[o] = fabs(sums[o]) * rounding;
      for (int64_t i = 0; i < inputs; i++) {
        double weight = get(&plain, o, i);
        sums[o] += x[i] * weight, lost[o] += fabs(weight) * (fabs(x[i]) * rounding + of_x);
      }
    }
    for (int64_t o = 0; o < width; o++) {
      double added = p->epilogue == ADD ? get(&before, r, o) : 0, wanted = sums[o] + added;
      if (gated) wanted = gated_by(p->activation, sums[o], sums[width + o], &lost[o], lost[width + o]);
      expect("product", get(&p->out, r, o), wanted, lost[o] + fabs(added) * SINGLE, p->out.dtype);
    }
  }
  free(lost);
  free(sums), free(x), free(plain.data), free((void *)p->weight.bias), free(p->weight.packed), free((void *)back.plain);
  free(p->x.data), free((void *)p->norm.weight), free((void *)p->norm.bias), free(p->out.data), free(before.data);
}

/* The largest product of each output with the rows of each text. */
static void fuzz_maxima(const Kernels *k) {
  int64_t starts[6] = {0}, dtype = below(2), inputs = 1 + below(90), outputs = 1 + below(100);
  Operation op = {.kind = MAXIMA};
  Maxima *m = &op.maxima;
  m->texts = 1 + below(5), m->starts = starts;
  for (int64_t t = 0; t < m->texts; t++) starts[t + 1] = starts[t] + 1 + below(40);
  int64_t rows = starts[m->texts];
  Rows plain = rows_of(outputs, inputs, 0, dtype);
  Product *p = &m->product;
  p->rows = rows, p->epilogue = LARGEST;
  p->weight = (Weight){outputs, inputs, 0, dtype, 0, plain.data};
  p->weight.packed = aligned_alloc(64, (size_t)(modernbert_packed_bytes(k, &p->weight) + 63) / 64 * 64);
  modernbert_pack(k, &p->weight);
  p->x = rows_of(rows, inputs, below(3), dtype), p->out = rows_of(m->texts, outputs, below(3), F32);
  run(k, &op);
  digest(&p->out, m->texts, outputs, dtype == BF16);
  for (int64_t t = 0; t < m->texts; t++)
    for (int64_t o = 0; o < outputs; o++) {
      double top = -INFINITY, lost = 0;
      for (int64_t r = starts[t]; r < starts[t + 1]; r++) {
        double sum = 0, size = 0;
        for (int64_t i = 0; i < inputs; i++) {
          double term = get(&p->x, r, i) * get(&plain, o, i);
          sum += term, size += fabs(term);
        }
        top = fmax(top, sum), lost = fmax(lost, size * (double)(inputs + 8) * SINGLE);
      }
      expect("maxima", get(&p->out, t, o), top, lost, F32);
    }
  free(plain.data), free(p->weight.packed), free(p->x.data), free(p->out.data);
}

/* Squares of words, by several threads, give the bytes of the definition, and the plain numbers again. */
static void fuzz_move(const Kernels *k) {
  int64_t dtype = below(4), gated = below(3) == 0, whole = dtype == S8 || dtype == S4, parts = 1 + below(3);
  int64_t inputs = below(2) ? 8 * (1 + below(60)) : (1 + below(200)) * (dtype == S4 ? 2 : 1);
  int64_t outputs = (1 + below(90)) * (gated ? 2 : 1), group = whole ? (below(2) ? 4 * (1 + below(20)) : 32) : 0;
  if (group > inputs) group = (inputs + 3) / 4 * 4;
  int64_t groups = whole ? (inputs + group - 1) / group : 0, kept = whole ? below(3) : 0;
  size_t plain_bytes = (size_t)(outputs * inputs * (dtype == F32 ? 8 : dtype == BF16 ? 4 : dtype == S8 ? 2 : 1) / 2);
  char *plain = malloc(plain_bytes), *back = malloc(plain_bytes);
  for (size_t i = 0; i < plain_bytes; i++) plain[i] = (char)below(256);
  float *bias = below(2) ? floats(outputs) : 0, *scales = floats(outputs * groups), *of_kept = floats(outputs * kept);
  int32_t columns[2] = {0, 1};
  Weight w = {outputs, inputs, gated, dtype, 0, plain, bias, group, scales, kept, columns, of_kept, 0};
  size_t bytes = (size_t)modernbert_packed_bytes(k, &w), room = (bytes + 63) / 64 * 64;
  void *slow = aligned_alloc(64, room), *fast = aligned_alloc(64, room);
  w.packed = slow;
  modernbert_pack(k, &w);
  w.packed = fast;
  for (int64_t part = 0; part < parts; part++) modernbert_move(k, &w, part, parts, 1);
  if (memcmp(slow, fast, bytes)) wrong++, printf("move: packed bytes of dtype %d\n", (int)dtype);
  w.plain = back;
  for (int64_t part = 0; part < parts; part++) modernbert_move(k, &w, part, parts, 0);
  if (memcmp(plain, back, plain_bytes)) wrong++, printf("move: plain numbers of dtype %d\n", (int)dtype);
  free(plain), free(back), free(bias), free(scales), free(of_kept), free(slow), free(fast);
}

/* Weights of 8 and 4 bits. Rows that become bytes stray from floats by half a step. */
static void fuzz_integers(const Kernels *k) {
  int64_t halves = below(2), gated = below(3) == 0, inputs = 2 * (1 + below(45)), outputs = (1 + below(70)) * (gated ? 2 : 1);
  int64_t rows = below(4) ? below(40) : below(300), width = gated ? outputs / 2 : outputs, group = 4 * (1 + below(24));
  if (group > inputs) group = (inputs + 3) / 4 * 4;
  int64_t groups = (inputs + group - 1) / group, kept = below(3) ? 0 : 1 + below(inputs / 2), most = halves ? 8 : 128;
  size_t bytes = (size_t)(halves ? outputs * inputs / 2 : outputs * inputs);
  int8_t *plain = malloc(bytes), *numbers = malloc((size_t)(outputs * inputs));
  int32_t *columns = malloc((size_t)kept * 4);
  for (int64_t i = 0; i < kept; i++) columns[i] = (int32_t)(i * (inputs / kept));
  for (int64_t i = 0; i < outputs * inputs; i++) {
    numbers[i] = (int8_t)(below(2 * most - 1) - most + 1);
    for (int64_t j = 0; j < kept; j++) numbers[i] = columns[j] == i % inputs ? 0 : numbers[i];
    if (!halves) plain[i] = numbers[i];
    else if (i % 2) plain[i / 2] |= (int8_t)((numbers[i] + 8) << 4);
    else plain[i / 2] = (int8_t)(numbers[i] + 8);
  }
  Operation op = {.kind = PRODUCT};
  Product *p = &op.product;
  p->rows = rows;
  Rows kept_rows = rows_of(outputs, kept, 0, BF16), scale_rows = rows_of(outputs, groups, 0, BF16); /* such numbers */
  Rows kept_floats = copy_of(&kept_rows, outputs, kept), scale_floats = copy_of(&scale_rows, outputs, groups);
  float *scales = scale_floats.data, *kept_weights = kept_floats.data;
  p->weight = (Weight){outputs, inputs, gated, halves ? S4 : S8, 0, plain, below(2) ? floats(outputs) : 0,
                       group, scales, kept, columns, kept_weights, 0};
  p->weight.float_rows = below(3) == 0;
  size_t packed = (size_t)modernbert_packed_bytes(k, &p->weight);
  p->weight.packed = aligned_alloc(64, (packed + 63) / 64 * 64);
  modernbert_pack(k, &p->weight);
  Weight back = p->weight;
  back.plain = malloc(bytes);
  modernbert_unpack(k, &back);
  if (memcmp(back.plain, plain, bytes)) wrong++, printf("unpack integers\n");
  p->x = any_rows(rows, inputs);
  if (below(2)) p->norm = any_norm(inputs);
  p->epilogue = gated ? GATE : below(2) ? ADD : WRITE;
  p->activation = below(4);
  p->out = rows_of(rows, width, below(3), F32);
  Rows before = copy_of(&p->out, rows, width);
  run(k, &op);
  digest(&p->out, rows, width, 0);
  double *sums = malloc((size_t)outputs * 8), *lost = malloc((size_t)outputs * 8), *x = malloc((size_t)inputs * 8);
  double rounding = (double)(inputs + 8) * 2 * SINGLE;
  for (int64_t r = 0; r < rows; r++) {
    double of_x = normed(&p->norm, &p->x, r, inputs, x);
    for (int64_t o = 0; o < outputs; o++) {
      sums[o] = p->weight.bias ? p->weight.bias[o] : 0, lost[o] = fabs(sums[o]) * rounding;
      for (int64_t g = 0; g < groups; g++) {
        double top = 0;
        for (int64_t i = g * group; i < inputs && i < (g + 1) * group; i++) {
          int64_t of = 0;
          while (of < kept && columns[of] != i) of++;
          double weight = of < kept ? kept_weights[o * kept + of] : 0;
          sums[o] += x[i] * weight, lost[o] += fabs(weight) * (fabs(x[i]) * rounding + of_x);
          if (of == kept && fabs(x[i]) > top) top = fabs(x[i]);
        }
        double step = p->weight.float_rows ? 0 : (top + of_x) / 127 * 0.501;
        for (int64_t i = g * group; i < inputs && i < (g + 1) * group; i++) {
          double weight = (double)scales[o * groups + g] * numbers[o * inputs + i];
          sums[o] += x[i] * weight, lost[o] += fabs(weight) * (fabs(x[i]) * rounding + of_x + step);
        }
      }
    }
    for (int64_t o = 0; o < width; o++) {
      double added = p->epilogue == ADD ? get(&before, r, o) : 0, wanted = sums[o] + added;
      if (gated) wanted = gated_by(p->activation, sums[o], sums[width + o], &lost[o], lost[width + o]);
      expect("integers", get(&p->out, r, o), wanted, lost[o] + fabs(added) * SINGLE, F32);
    }
  }
  free(sums), free(lost), free(x), free(plain), free(numbers), free(columns), free(scales), free(kept_weights);
  free(kept_rows.data), free(scale_rows.data);
  free((void *)p->weight.bias), free(p->weight.packed), free((void *)back.plain), free(p->x.data), free(before.data);
  free((void *)p->norm.weight), free((void *)p->norm.bias), free(p->out.data);
}

static void fuzz_normalize(const Kernels *k) {
  Operation op = {.kind = NORMALIZE};
  Normalize *n = &op.normalize;
  int64_t table = 1 + below(50);
  n->rows = below(150), n->width = 1 + below(100);
  int64_t *ids = malloc((size_t)n->rows * 8);
  for (int64_t i = 0; i < n->rows; i++) ids[i] = below(table);
  n->table = any_rows(table, n->width);
  if (n->rows > table || below(2)) n->ids = ids;
  n->norm = any_norm(n->width);
  n->out = any_rows(n->rows, n->width);
  run(k, &op);
  digest(&n->out, n->rows, n->width, 0);
  double *x = malloc((size_t)n->width * 8);
  for (int64_t r = 0; r < n->rows; r++) {
    double lost = normed(&n->norm, &n->table, n->ids ? ids[r] : r, n->width, x);
    for (int64_t i = 0; i < n->width; i++) expect("normalize", get(&n->out, r, i), x[i], lost, n->out.dtype);
  }
  free(x);
  free(ids), free(n->table.data), free((void *)n->norm.weight), free((void *)n->norm.bias), free(n->out.data);
}

static void fuzz_tables(const Kernels *k) {
  Operation op = {.kind = TABLES};
  Tables *t = &op.tables;
  t->rows = below(150), t->half = 1 + below(50), t->scale = below(3) ? 1 : 1.25f;
  int64_t *positions = malloc((size_t)t->rows * 8), width = 2 * t->half;
  for (int64_t i = 0; i < t->rows; i++) positions[i] = below(below(2) ? 100 : 100000);
  float *frequencies = floats(t->half);
  Rows cosines = rows_of(t->rows, width, 0, F32), sines = rows_of(t->rows, width, 0, F32);
  t->positions = positions, t->frequencies = frequencies, t->cos = cosines.data, t->sin = sines.data;
  run(k, &op);
  digest(&cosines, t->rows, width, 0), digest(&sines, t->rows, width, 0);
  for (int64_t r = 0; r < t->rows; r++)
    for (int64_t i = 0; i < width; i++) {
      float angle = (float)positions[r] * frequencies[i % t->half];
      expect("cosine", get(&cosines, r, i), cos(angle) * t->scale, 1e-10, F32);
      expect("sine", get(&sines, r, i), (i < t->half ? -1 : 1) * sin(angle) * t->scale, 1e-10, F32);
    }
  free(positions), free(frequencies), free(cosines.data), free(sines.data);
}

static void fuzz_activate(const Kernels *k) {
  Operation op = {.kind = ACTIVATE};
  Activate *a = &op.activate;
  a->rows = below(150), a->width = 1 + below(100), a->activation = below(4);
  a->x = any_rows(a->rows, a->width), a->out = any_rows(a->rows, a->width);
  run(k, &op);
  digest(&a->out, a->rows, a->width, 0);
  for (int64_t r = 0; r < a->rows; r++)
    for (int64_t i = 0; i < a->width; i++) {
      double lost = 0, wanted = gated_by(a->activation, get(&a->x, r, i), 1, &lost, 0);
      expect("activate", get(&a->out, r, i), wanted, lost, a->out.dtype);
    }
  free(a->x.data), free(a->out.data);
}

static double rotated(const Rows *x, const float *cos, const float *sin, int64_t row, int64_t column, int64_t d, int64_t dim) {
  int64_t other = d < dim / 2 ? d + dim / 2 : d - dim / 2;
  if (!cos) return get(x, row, column + d);
  return get(x, row, column + d) * cos[row * dim + d] + get(x, row, column + other) * sin[row * dim + d];
}

/* The attention of one query over `count` keys, -inf being the score of those that are hidden: `weights` become their
 * shares. What an output of values up to 1 may have lost, where a score may have lost `of_score`. */
static double shares(double *weights, int64_t count, double of_score, int rounded) {
  double total = 0, top = -INFINITY;
  for (int64_t j = 0; j < count; j++) top = fmax(top, weights[j]);
  for (int64_t j = 0; j < count; j++) total += weights[j] = exp(weights[j] - top);
  for (int64_t j = 0; j < count; j++) weights[j] /= total;
  return exp(2 * of_score) - 1 + (double)(count + 8) * SINGLE + 1e-6 + (rounded ? 2 * HALF : 0);
}

static void fuzz_attention(const Kernels *k) {
  static const int64_t lengths[] = {0, 1, 2, 17, 63, 64, 65, 129, 200};
  Operation op = {.kind = ATTENTION};
  Attention *a = &op.attention;
  int64_t starts[6] = {0}, dtype = below(2);
  a->texts = 1 + below(4), a->heads = 1 + below(3), a->head_dim = 2 * (1 + below(40)), a->scale = 0.3f;
  int64_t width = a->heads * a->head_dim, dim = a->head_dim;
  for (int64_t i = 0; i < a->texts; i++) starts[i + 1] = starts[i] + lengths[below(9)];
  int64_t tokens = starts[a->texts], *positions = malloc((size_t)tokens * 8);
  for (int64_t i = 0; i < a->texts; i++)
    for (int64_t r = starts[i]; r < starts[i + 1]; r++)
      positions[r] = r == starts[i] ? below(3) : positions[r - 1] + 1 + (below(9) == 0);
  a->starts = starts, a->left = a->right = -1;
  if (below(3)) {
    a->positions = a->key_positions = positions;
    a->left = below(3) ? below(80) : -1, a->right = below(3) ? below(80) : -1;
  }
  if (below(2)) a->key_cos = a->cos = floats(tokens * dim), a->key_sin = a->sin = floats(tokens * dim);
  a->q = rows_of(tokens, width, below(3), dtype);
  a->k = rows_of(tokens, width, below(3), dtype), a->v = rows_of(tokens, width, below(3), dtype);
  Rows before = copy_of(&a->q, tokens, width);
  a->out = below(2) ? a->q : rows_of(tokens, width, 0, dtype);
  run(k, &op);
  digest(&a->out, tokens, width, dtype == BF16);
  double *weights = malloc((size_t)(tokens + 1) * 8);
  int rounded = dtype == BF16 && k->multiplies;
  for (int64_t t = 0; t < a->texts; t++)
    for (int64_t r = starts[t]; r < starts[t + 1]; r++)
      for (int64_t h = 0; h < a->heads; h++) {
        int64_t from = starts[t], to = starts[t + 1];
        double of_score = 0;
        for (int64_t j = from; j < to; j++) {
          double score = 0, size = 0;
          int hidden = a->positions && ((a->left >= 0 && positions[j] < positions[r] - a->left) ||
                                        (a->right >= 0 && positions[j] > positions[r] + a->right));
          for (int64_t d = 0; d < dim && !hidden; d++) {
            double term = rotated(&before, a->cos, a->sin, r, h * dim, d, dim) *
                          rotated(&a->k, a->key_cos, a->key_sin, j, h * dim, d, dim);
            score += term, size += fabs(term);
          }
          weights[j - from] = hidden ? -INFINITY : score * a->scale;
          /* Rotated numbers are sums of two products up to 1 each. */
          double lost = ((size + 4 * (double)dim) * (double)(dim + 8) * SINGLE + (rounded ? size * HALF : 0)) * a->scale;
          of_score = hidden ? of_score : fmax(of_score, lost);
        }
        double lost = shares(weights, to - from, of_score, rounded);
        for (int64_t d = 0; d < dim; d++) {
          double wanted = 0;
          for (int64_t j = from; j < to; j++) wanted += weights[j - from] * get(&a->v, j, h * dim + d);
          expect("attention", get(&a->out, r, h * dim + d), wanted, lost, dtype);
        }
      }
  if (a->out.data != a->q.data) free(a->out.data);
  free(weights), free(positions), free((void *)a->cos), free((void *)a->sin);
  free(a->q.data), free(a->k.data), free(a->v.data), free(before.data);
}

/* One new token of each text, whose keys and values are stored with those before it. */
static void fuzz_step(const Kernels *k) {
  Operation op = {.kind = STEP};
  Step *s = &op.step;
  int64_t rows[5], first[5], length[5], positions[5], stored = 0, dtype = below(2);
  s->texts = 1 + below(5), s->heads = 1 + below(3), s->head_dim = 2 * (1 + below(40)), s->scale = 0.3f;
  int64_t dim = s->head_dim, width = s->heads * dim;
  for (int64_t t = 0; t < s->texts; t++) {
    first[t] = stored + below(3), length[t] = 1 + below(below(3) ? 40 : 200), stored = first[t] + length[t];
    rows[t] = first[t] + (below(2) ? length[t] - 1 : below(length[t])); /* at the end, or in the place of an old one */
    if (length[t] > s->most) s->most = length[t];
  }
  s->rows = rows, s->first = first, s->length = length;
  s->q = rows_of(s->texts, width, below(3), dtype);
  s->k = rows_of(s->texts, width, below(3), dtype), s->v = rows_of(s->texts, width, below(3), dtype);
  s->keys = rows_of(stored, width, below(3), dtype), s->values = rows_of(stored, width, below(3), dtype);
  if (below(2)) s->cos = floats(s->texts * dim), s->sin = floats(s->texts * dim);
  int64_t *key_positions = malloc((size_t)stored * 8);
  s->left = below(60);
  for (int64_t t = 0; t < s->texts; t++) {
    positions[t] = below(300);
    for (int64_t j = first[t]; j < first[t] + length[t]; j++) key_positions[j] = positions[t] + 5 - below(2 * s->left + 9);
    key_positions[rows[t]] = positions[t];
  }
  if (below(2)) {
    s->positions = positions, s->key_positions = key_positions;
    for (int64_t t = 0; t < s->texts; t++) /* what lies out of reach may be anything */
      for (int64_t j = first[t]; j < first[t] + length[t]; j++)
        if (key_positions[j] > positions[t] || key_positions[j] < positions[t] - s->left)
          for (int64_t d = 0; d < width; d++) put(&s->keys, j, d, NAN), put(&s->values, j, d, NAN);
  }
  Rows query = copy_of(&s->q, s->texts, width), keys = copy_of(&s->keys, stored, width);
  Rows values = copy_of(&s->values, stored, width);
  for (int64_t t = 0; t < s->texts; t++)
    for (int64_t d = 0; d < width; d++) {
      put(&keys, rows[t], d, rotated(&s->k, s->cos, s->sin, t, d / dim * dim, d % dim, dim));
      put(&values, rows[t], d, get(&s->v, t, d));
    }
  s->out = below(2) ? s->q : rows_of(s->texts, width, 0, dtype);
  run(k, &op);
  digest(&s->out, s->texts, width, 0);
  for (int64_t j = 0; j < stored; j++)
    for (int64_t d = 0; d < width; d++) {
      if (isnan(get(&keys, j, d)) && isnan(get(&s->keys, j, d))) continue;
      expect("stored key", get(&s->keys, j, d), get(&keys, j, d), 4 * SINGLE, dtype);
      expect("stored value", get(&s->values, j, d), get(&values, j, d), 0, dtype);
    }
  double *weights = malloc((size_t)s->most * 8);
  for (int64_t t = 0; t < s->texts; t++)
    for (int64_t h = 0; h < s->heads; h++) {
      double of_score = 0;
      for (int64_t j = 0; j < length[t]; j++) {
        int64_t row = first[t] + j, behind = positions[t] - key_positions[row];
        double score = 0, size = 0;
        int hidden = s->positions && (behind < 0 || behind > s->left);
        for (int64_t d = 0; d < dim && !hidden; d++) {
          double term = rotated(&query, s->cos, s->sin, t, h * dim, d, dim) * get(&s->keys, row, h * dim + d);
          score += term, size += fabs(term);
        }
        weights[j] = hidden ? -INFINITY : score * s->scale;
        of_score = hidden ? of_score : fmax(of_score, (size + 4 * (double)dim) * (double)(dim + 8) * SINGLE * s->scale);
      }
      double lost = shares(weights, length[t], of_score, 0);
      for (int64_t d = 0; d < dim; d++) {
        double wanted = 0;
        for (int64_t j = 0; j < length[t]; j++)
          if (weights[j] > 0) wanted += weights[j] * get(&s->values, first[t] + j, h * dim + d);
        expect("step", get(&s->out, t, h * dim + d), wanted, lost, dtype);
      }
    }
  if (s->out.data != s->q.data) free(s->out.data);
  free(weights), free(key_positions), free((void *)s->cos), free((void *)s->sin), free(query.data), free(keys.data);
  free(values.data), free(s->q.data), free(s->k.data), free(s->v.data), free(s->keys.data), free(s->values.data);
}

#include "fuzz_training.inc"

int main(int count, char **arguments) {
  static const char *names[] = {"avx512bf16", "imitated", "avx512vnni", "avx512",   "avx2",
                                "neonbf16",   "neondot",  "neon",       "portable", "exact"};
  int64_t rounds = count > 1 ? atol(arguments[1]) : 100;
  int all = 0;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    const char *name = 0;
    const Kernels *k = modernbert_kernels(names[i], &name);
    if (!k) continue;
    state = 1, wrong = 0, digests[0] = digests[1] = 0;
    for (int64_t r = 0; r < rounds; r++) {
      fuzz_product(k), fuzz_integers(k), fuzz_normalize(k), fuzz_attention(k), fuzz_step(k);
      fuzz_maxima(k), fuzz_tables(k), fuzz_activate(k);
      fuzz_move(k);
    }
    for (int64_t r = 0; r < rounds; r++) /* which draw what the processor multiplies */
      fuzz_matmul(k), fuzz_norm_back(k), fuzz_attention_back(k), fuzz_adam(k);
    printf("%s %s %016llx %016llx %d\n", name, wrong ? "wrong" : "right", (unsigned long long)digests[0],
           (unsigned long long)digests[1], (int)k->multiplies);
    all += wrong;
  }
  return all != 0;
}
