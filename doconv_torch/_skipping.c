/* A dynamic group convolution in evaluation that multiplies only the channels it keeps.

   For each image: its norm and ReLU, the mean of each channel, the saliencies of each head, and the
   convolution of what is above the head's threshold. x is (B, C, H, W), y (B, O, H', W'), weight
   (C, taps, O), squeeze (h, q, C), rate (h, C, q), bias (h, C); all float32, contiguous. A map
   lies in memory with its zeros around it, and where the stride is s, as s · s maps of every s-th
   row and column, so that each tap is the same map from another place on. Kernels are gathered
   with the saliencies in them, BLOCK taps of OUTPUTS channels at a time, which the nearest cache
   holds. Every number is computed in the same order however many threads there are. The module is
   optional; doconv_torch/skipping.py computes the same with PyTorch's own operations. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define LANES 8
#define OUTPUTS 16   /* two registers of LANES output channels */
#define PLACES 6     /* of the output, whose sums are in registers together */
#define ROWS 4       /* output channels, and LANES places as often as that says, in their stead */
#define WIDTH 3
#define BLOCK 256    /* taps of kept channels, whose kernels are together in the nearest cache */
#define CHUNK 768    /* places that are summed before the next channels, a multiple of PLACES */
#define AHEAD 8      /* channels whose kernels begin to be read before they are gathered */
#define LINE 16      /* numbers that come into the cache at once */
#define STRETCH 512  /* numbers of a row, at most, that are summed in single precision */
#define TOGETHER 16  /* and rows */

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef int truths __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#define LOAD(address) (*(const anywhere *)(address))
#define STORE(address) (*(anywhere *)(address))

typedef struct {
    const float *x, *gamma, *beta, *mean, *variance, *weight, *squeeze, *rate, *bias;
    float *y;
    double epsilon;
    long batch, channels, height, width, outputs, out_height, out_width; /* outputs: of a head */
    long heads, squeezed, inactive;
    long kernel[2], stride[2], padding[2], dilation[2];
    long taps, rows, columns, map, plane; /* of a map of every s-th; of all maps of a channel */
    int flat;                             /* whether an output's place is its one tap's */
} problem;

/* What the threads share of one image, and each has of its own. */
typedef struct {
    float *planes, *pooled, *features, *saliency, *sorted; /* sorted: (h, C), to find the least */
    int *kept, *count;                                     /* (h, C), and how many of each head */
    long *offsets;                                         /* from a place to each of its taps */
    long *places;                                          /* where each output's place begins */
} shared;

typedef struct {
    float *kernels, *sums; /* (BLOCK, OUTPUTS) and (CHUNK, OUTPUTS) */
    float *row;
    const float **maps;
} own;

INLINE float total(lanes v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* z of one channel, laid out in maps; its mean. */
INLINE void prepare(const problem *p, const shared *s, const own *k, const float *x, long c) {
    const double deviation = p->variance ? sqrt((double)p->variance[c] + p->epsilon) : 1;
    const float factor = (float)((p->gamma ? p->gamma[c] : 1) / deviation);
    const float shift = (p->beta ? p->beta[c] : 0) - (p->mean ? p->mean[c] * factor : 0);
    const long sy = p->stride[0], sx = p->stride[1], ahead = p->padding[1];
    float *const plane = s->planes + c * p->plane;
    const int whole = sx == 1 && sy == 1 && !p->padding[0] && !ahead;
    const long width = whole ? p->height * p->width : p->width, height = whole ? 1 : p->height;
    lanes sums = {0};
    float rest = 0;
    double before = 0;
    if (p->padding[0] || ahead) memset(plane, 0, sizeof(float) * p->plane);
    x += c * p->height * p->width;
    for (long y = 0; y < height; y++, x += width) {
        const long at = y + p->padding[0];
        float *const base = plane + (at % sy * sx) * p->map + at / sy * p->columns;
        float *const row = sx == 1 ? base + ahead : k->row;
        long n = 0;
        for (; n + LANES <= width; n += LANES) {
            lanes z = LOAD(x + n) * factor + shift;
            z = (lanes)((truths)z & ~(z < 0));
            sums += z;
            STORE(row + n) = z;
            if (n % STRETCH == STRETCH - LANES) {
                before += total(sums);
                sums = (lanes){0};
            }
        }
        for (; n < width; n++) {
            const float z = x[n] * factor + shift;
            row[n] = z < 0 ? 0 : z;
            rest += row[n];
        }
        if (sx > 1 && at / sy < p->rows)
            for (long q = 0; q < width; q++)
                if ((q + ahead) / sx < p->columns)
                    base[(q + ahead) % sx * p->map + (q + ahead) / sx] = row[q];
        if (y % TOGETHER == TOGETHER - 1) {
            before += total(sums) + rest;
            sums = (lanes){0}, rest = 0;
        }
    }
    s->pooled[c] = (float)(before + (total(sums) + rest)) / (float)(p->height * p->width);
}

INLINE float product(const float *a, const float *b, long count) {
    lanes sums[4] = {{0}, {0}, {0}, {0}};
    float rest = 0;
    long n = 0;
    for (; n + 4 * LANES <= count; n += 4 * LANES)
        for (int i = 0; i < 4; i++) sums[i] += LOAD(a + n + i * LANES) * LOAD(b + n + i * LANES);
    for (; n + LANES <= count; n += LANES) sums[0] += LOAD(a + n) * LOAD(b + n);
    for (; n < count; n++) rest += a[n] * b[n];
    return total((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

/* The n-th smallest of some numbers, n from 1, which are put in another order. */
static float smallest(float *v, long count, long n) {
    long first = 0, last = count - 1;
    n--;
    while (first < last) {
        const float pivot = v[(first + last) / 2];
        long i = first, j = last;
        while (i <= j) {
            while (v[i] < pivot) i++;
            while (v[j] > pivot) j--;
            if (i > j) break;
            const float kept = v[i];
            v[i++] = v[j];
            v[j--] = kept;
        }
        if (n <= j)
            last = j;
        else if (n >= i)
            first = i;
        else
            break;
    }
    return v[n];
}

INLINE void choose(const problem *p, const shared *s, long head) {
    const float *saliency = s->saliency + head * p->channels;
    float *sorted = s->sorted + head * p->channels, least = -1;
    int *kept = s->kept + head * p->channels, count = 0;
    memcpy(sorted, saliency, sizeof(float) * p->channels);
    if (p->inactive) least = smallest(sorted, p->channels, p->inactive);
    for (int c = 0; c < p->channels; c++)
        if (!(saliency[c] <= least)) kept[count++] = c; /* what is no number becomes the output */
    s->count[head] = count;
}

/* Kernels of some kept channels for OUTPUTS outputs, or as many as there are, in one piece. */
INLINE void gather(const problem *p, const shared *s, const own *k, long head, long output,
                   long from, long to) {
    const long all = p->heads * p->outputs, left = p->outputs - output;
    const int *kept = s->kept + head * p->channels;
    const float *saliency = s->saliency + head * p->channels;
    float *into = k->kernels;
    for (long n = from; n < to; n++) {
        const float *w = p->weight + kept[n] * p->taps * all + head * p->outputs + output;
        if (n + AHEAD < s->count[head]) { /* no processor foresees which channels are kept */
            const float *next = w + (kept[n + AHEAD] - kept[n]) * p->taps * all;
            for (long tap = 0; tap < p->taps; tap++) __builtin_prefetch(next + tap * all);
        }
        const float factor = saliency[kept[n]];
        k->maps[n - from] = s->planes + kept[n] * p->plane;
        for (long tap = 0; tap < p->taps; tap++, w += all, into += OUTPUTS)
            if (left >= OUTPUTS) {
                STORE(into) = LOAD(w) * factor;
                STORE(into + LANES) = LOAD(w + LANES) * factor;
            } else
                for (long o = 0; o < OUTPUTS; o++) into[o] = o < left ? w[o] * factor : 0;
    }
}

/* Sums of `count` places, which the compiler knows, and so is `registers`, of LANES outputs. */
INLINE void tile(const problem *p, const shared *s, const own *k, long channels, const long *places,
                 float *sums, long taps, int count, int registers, int begins) {
    lanes r[PLACES][2];
    for (int n = 0; n < count; n++)
        for (int v = 0; v < registers; v++) {
            r[n][v] = (lanes){0};
            if (!begins) r[n][v] = LOAD(sums + n * OUTPUTS + v * LANES);
        }
    const float *w = k->kernels;
    for (long c = 0; c < channels; c++) {
        const float *map = k->maps[c];
        for (long tap = 0; tap < taps; tap++, w += OUTPUTS) {
            const float *from = map + s->offsets[tap];
            const lanes w0 = LOAD(w), w1 = LOAD(w + LANES);
            for (int n = 0; n < count; n++) {
                const float z = from[places[n]];
                r[n][0] += w0 * z;
                if (registers > 1) r[n][1] += w1 * z;
            }
        }
    }
    for (int n = 0; n < count; n++)
        for (int v = 0; v < registers; v++) STORE(sums + n * OUTPUTS + v * LANES) = r[n][v];
}

INLINE void tiles_of(const problem *p, const shared *s, const own *k, long channels, long first,
                     long count, long taps, int registers, int begins) {
    float *sums = k->sums;
    const long *places = s->places + first;
    long n = 0;
    for (; n + PLACES <= count; n += PLACES)
        tile(p, s, k, channels, places + n, sums + n * OUTPUTS, taps, PLACES, registers, begins);
    places += n, sums += n * OUTPUTS;
    switch (count - n) {
        case 5: tile(p, s, k, channels, places, sums, taps, 5, registers, begins); break;
        case 4: tile(p, s, k, channels, places, sums, taps, 4, registers, begins); break;
        case 3: tile(p, s, k, channels, places, sums, taps, 3, registers, begins); break;
        case 2: tile(p, s, k, channels, places, sums, taps, 2, registers, begins); break;
        case 1: tile(p, s, k, channels, places, sums, taps, 1, registers, begins); break;
    }
}

INLINE void tiles(const problem *p, const shared *s, const own *k, long channels, long first,
                  long count, int registers, int begins) {
    if (p->taps == 1 && registers == 2)
        tiles_of(p, s, k, channels, first, count, 1, 2, begins);
    else if (p->taps == 9 && registers == 2)
        tiles_of(p, s, k, channels, first, count, 9, 2, begins);
    else if (registers == 2)
        tiles_of(p, s, k, channels, first, count, p->taps, 2, begins);
    else
        tiles_of(p, s, k, channels, first, count, p->taps, 1, begins);
}

INLINE void transpose(lanes r[LANES]) {
    lanes a[LANES], b[LANES];
    for (int n = 0; n < LANES; n += 2) {
        a[n] = __builtin_shufflevector(r[n], r[n + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        a[n + 1] = __builtin_shufflevector(r[n], r[n + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int n = 0; n < LANES; n += 4)
        for (int k = n; k < n + 2; k++) {
            b[k] = __builtin_shufflevector(a[k], a[k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[k + 2] = __builtin_shufflevector(a[k], a[k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int n = 0; n < LANES / 2; n++) {
        r[n] = __builtin_shufflevector(b[n], b[n + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[n + 4] = __builtin_shufflevector(b[n], b[n + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* Rows of outputs become maps of places. Output j of head i is channel j · h + i. */
INLINE void scatter(const problem *p, const own *k, float *y, long head, long output, long first,
                    long count) {
    const long size = p->out_height * p->out_width;
    const int outputs = p->outputs - output < OUTPUTS ? (int)(p->outputs - output) : OUTPUTS;
    for (int o = 0; o < outputs; o += LANES) {
        const int some = outputs - o < LANES ? outputs - o : LANES;
        float *to = y + ((output + o) * p->heads + head) * size + first;
        long n = 0;
        for (; n + LANES <= count; n += LANES) {
            lanes r[LANES];
            for (int i = 0; i < LANES; i++) r[i] = LOAD(k->sums + (n + i) * OUTPUTS + o);
            transpose(r);
            for (int i = 0; i < some; i++) STORE(to + i * p->heads * size + n) = r[i];
        }
        for (; n < count; n++)
            for (int i = 0; i < some; i++)
                to[i * p->heads * size + n] = k->sums[n * OUTPUTS + o + i];
    }
}

/* Maps of ROWS outputs, `width` · LANES places of each, where one tap meets whole maps. */
INLINE void row(const shared *s, const own *k, long channels, long place, int output, float **to,
                int rows, int width) {
    lanes r[ROWS][WIDTH];
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < width; v++) r[i][v] = (lanes){0};
    const float *w = k->kernels + output;
    for (long c = 0; c < channels; c++, w += OUTPUTS)
        for (int v = 0; v < width; v++) {
            const lanes z = LOAD(k->maps[c] + place + v * LANES);
            for (int i = 0; i < ROWS; i++) r[i][v] += z * w[i];
        }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < width; v++) STORE(to[i] + place + v * LANES) = r[i][v];
}

INLINE void rows(const problem *p, const shared *s, const own *k, float *y, long head, long output,
                 long first, long count) {
    const long size = p->out_height * p->out_width, last = first + count;
    const int outputs = p->outputs - output < OUTPUTS ? (int)(p->outputs - output) : OUTPUTS;
    for (int o = 0; o < outputs; o += ROWS) {
        const int some = outputs - o < ROWS ? outputs - o : ROWS;
        float *to[ROWS];
        for (int i = 0; i < some; i++) to[i] = y + ((output + o + i) * p->heads + head) * size;
        long n = first;
        for (; n + WIDTH * LANES <= last; n += WIDTH * LANES)
            row(s, k, s->count[head], n, o, to, some, WIDTH);
        for (; n < last; n += LANES) /* the last ones once more, where LANES divides no count */
            row(s, k, s->count[head], n + LANES < last ? n : last - LANES, o, to, some, 1);
    }
}

INLINE void convolve(const problem *p, const shared *s, const own *k, float *y, long head,
                     long output, long first, long count) {
    const long kept = s->count[head], most = BLOCK / p->taps > 1 ? BLOCK / p->taps : 1;
    if (p->flat && p->outputs <= LANES && kept <= most && count >= LANES) {
        gather(p, s, k, head, output, 0, kept);
        rows(p, s, k, y, head, output, first, count);
        return;
    }
    const int registers = p->outputs - output > LANES ? 2 : 1;
    for (long from = 0; from < kept || from == 0; from += most) {
        const long to = from + most < kept ? from + most : kept;
        gather(p, s, k, head, output, from, to);
        tiles(p, s, k, to - from, first, count, registers, from == 0);
    }
    scatter(p, k, y, head, output, first, count);
}

#define WAIT()                     \
    do {                           \
        if (threads > 1) {         \
            _Pragma("omp barrier") \
        }                          \
    } while (0)

/* One image, by `threads` threads that are all here, of which this is number `thread`. */
INLINE void image_of(const problem *p, const shared *s, const own *k, long image, long thread,
                     long threads) {
    const long size = p->out_height * p->out_width;
    const float *x = p->x + image * p->channels * p->height * p->width;
    float *y = p->y + image * p->heads * p->outputs * size;
    for (long c = p->channels * thread / threads; c < p->channels * (thread + 1) / threads; c++)
        prepare(p, s, k, x, c);
    WAIT();
    const long features = p->heads * p->squeezed, rated = p->heads * p->channels;
    for (long n = features * thread / threads; n < features * (thread + 1) / threads; n++) {
        const float sum = product(p->squeeze + n * p->channels, s->pooled, p->channels);
        s->features[n] = sum < 0 ? 0 : sum;
    }
    WAIT();
    for (long n = rated * thread / threads; n < rated * (thread + 1) / threads; n++) {
        const float *feature = s->features + n / p->channels * p->squeezed;
        const float sum = product(p->rate + n * p->squeezed, feature, p->squeezed) + p->bias[n];
        s->saliency[n] = sum < 0 ? 0 : sum;
    }
    WAIT();
    for (long head = thread; head < p->heads; head += threads) choose(p, s, head);
    WAIT();
    const long blocks = (p->outputs + OUTPUTS - 1) / OUTPUTS, pieces = p->heads * blocks;
    long parts = (4 * threads + pieces - 1) / pieces, least = (size + CHUNK - 1) / CHUNK;
    if (threads == 1) parts = 1;
    if (parts < least) parts = least;
    long each = (size + parts - 1) / parts;
    each = (each + WIDTH * LANES - 1) / (WIDTH * LANES) * (WIDTH * LANES);
    parts = (size + each - 1) / each;
    const long all = pieces * parts;
    for (long n = all * thread / threads; n < all * (thread + 1) / threads; n++) {
        const long first = n % parts * each, piece = n / parts;
        const long count = size - first < each ? size - first : each;
        convolve(p, s, k, y, piece / blocks, piece % blocks * OUTPUTS, first, count);
    }
    WAIT();
}

typedef void image_function(const problem *, const shared *, const own *, long, long, long);

static void image_plain(const problem *p, const shared *s, const own *k, long image, long thread,
                        long threads) {
    image_of(p, s, k, image, thread, threads);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) static void image_avx2(const problem *p, const shared *s,
                                                           const own *k, long image, long thread,
                                                           long threads) {
    image_of(p, s, k, image, thread, threads);
}

static image_function *best(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? image_avx2
                                                                           : image_plain;
}
#else
static image_function *best(void) { return image_plain; }
#endif

static size_t lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Take so many bytes of what is at *at. */
static void *take(char **at, size_t bytes) {
    void *const here = *at;
    *at += lines(bytes);
    return here;
}

static char *share(const problem *p, char *at, shared *s) {
    const size_t of_heads = p->heads * p->channels;
    s->planes = take(&at, sizeof(float) * p->channels * p->plane);
    s->pooled = take(&at, sizeof(float) * p->channels);
    s->features = take(&at, sizeof(float) * p->heads * p->squeezed);
    s->saliency = take(&at, sizeof(float) * of_heads);
    s->sorted = take(&at, sizeof(float) * of_heads);
    s->kept = take(&at, sizeof(int) * of_heads);
    s->count = take(&at, sizeof(int) * p->heads);
    return at;
}

static char *keep(const problem *p, char *at, own *k) {
    const long most = p->taps > BLOCK ? p->taps : BLOCK;
    k->kernels = take(&at, sizeof(float) * most * OUTPUTS);
    k->sums = take(&at, sizeof(float) * (CHUNK + PLACES) * OUTPUTS);
    k->row = take(&at, sizeof(float) * p->width);
    k->maps = take(&at, sizeof(float *) * BLOCK);
    return at;
}

/* Memory of the last call, for the next one: new memory comes in pages that are slow to begin with.
   A call takes it away, so that no two have it at a time. */
static struct memory {
    size_t bytes;
} *spare;

static struct memory *borrow(size_t bytes) {
    struct memory *found = __atomic_exchange_n(&spare, NULL, __ATOMIC_ACQ_REL);
    if (found != NULL && found->bytes >= bytes) return found;
    free(found);
    void *made;
    if (posix_memalign(&made, 64, bytes + 64)) return NULL;
    found = made;
    found->bytes = bytes;
    return found;
}

static void give_back(struct memory *memory) {
    free(__atomic_exchange_n(&spare, memory, __ATOMIC_ACQ_REL));
}

/* Return 0, or -1 where there is no memory. */
static int solve(problem *p, int threads) {
    const long size = p->out_height * p->out_width;
    const int by_image = p->batch >= threads;
    const long crews = by_image ? threads : 1;
    shared each;
    own one;
    const size_t of_crew = (size_t)share(p, NULL, &each), of_thread = (size_t)keep(p, NULL, &one);
    const size_t tables = lines(sizeof(long) * p->taps) + lines(sizeof(long) * size);
    struct memory *const memory = borrow(tables + crews * of_crew + threads * of_thread);
    if (memory == NULL) return -1;
    char *at = (char *)memory + 64;
    long *const offsets = take(&at, sizeof(long) * p->taps);
    long *const places = take(&at, sizeof(long) * size);
    for (long y = 0, tap = 0; y < p->kernel[0]; y++)
        for (long x = 0; x < p->kernel[1]; x++, tap++) {
            const long down = y * p->dilation[0], right = x * p->dilation[1];
            offsets[tap] = (down % p->stride[0] * p->stride[1] + right % p->stride[1]) * p->map +
                           down / p->stride[0] * p->columns + right / p->stride[1];
        }
    for (long n = 0; n < size; n++)
        places[n] = n / p->out_width * p->columns + n % p->out_width;
    char *const own_memory = at + crews * of_crew;
    image_function *const image = best();
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const long thread = omp_get_thread_num(), team = omp_get_num_threads();
#else
        const long thread = 0, team = 1;
#endif
        shared mine;
        own k;
        share(p, at + (by_image ? thread : 0) * of_crew, &mine);
        mine.offsets = offsets, mine.places = places;
        keep(p, own_memory + thread * of_thread, &k);
        if (by_image)
            for (long n = p->batch * thread / team; n < p->batch * (thread + 1) / team; n++)
                image(p, &mine, &k, n, 0, 1);
        else
            for (long n = 0; n < p->batch; n++) image(p, &mine, &k, n, thread, team);
    }
    give_back(memory);
    return 0;
}

static PyObject *skip(PyObject *self, PyObject *args) {
    unsigned long long a[10];
    problem p = {0};
    int threads;
    if (!PyArg_ParseTuple(args, "(KKKKKKKKKK)d(llll)(llll)(ll)(ll)(ll)(ll)i", a, a + 1, a + 2, a + 3,
                          a + 4, a + 5, a + 6, a + 7, a + 8, a + 9, &p.epsilon, &p.batch,
                          &p.channels, &p.height, &p.width, &p.outputs, &p.heads, &p.squeezed,
                          &p.inactive, p.kernel, p.kernel + 1, p.stride, p.stride + 1, p.padding,
                          p.padding + 1, p.dilation, p.dilation + 1, &threads))
        return NULL;
    const float **inputs[] = {&p.x,      &p.gamma,   &p.beta, &p.mean, &p.variance,
                              &p.weight, &p.squeeze, &p.rate, &p.bias};
    for (int n = 0; n < 9; n++) *inputs[n] = (const float *)(uintptr_t)a[n];
    p.y = (float *)(uintptr_t)a[9];
    const long padded[2] = {p.height + 2 * p.padding[0], p.width + 2 * p.padding[1]};
    long out[2];
    int wrong = p.batch < 0 || p.channels < 1 || p.height < 1 || p.width < 1 || p.outputs < 1 ||
                p.heads < 1 || p.squeezed < 1 || p.inactive < 0 || p.inactive > p.channels ||
                threads < 1;
    for (int n = 0; n < 2; n++) {
        wrong |= p.kernel[n] < 1 || p.stride[n] < 1 || p.dilation[n] < 1 || p.padding[n] < 0;
        if (wrong) break;
        out[n] = (padded[n] - p.dilation[n] * (p.kernel[n] - 1) - 1) / p.stride[n] + 1;
        wrong |= padded[n] <= p.dilation[n] * (p.kernel[n] - 1);
    }
    if (wrong) {
        PyErr_SetString(PyExc_ValueError, "sizes of no convolution.");
        return NULL;
    }
    p.out_height = out[0], p.out_width = out[1];
    p.taps = p.kernel[0] * p.kernel[1];
    p.rows = (padded[0] + p.stride[0] - 1) / p.stride[0];
    p.columns = (padded[1] + p.stride[1] - 1) / p.stride[1];
    p.map = p.rows * p.columns;
    p.flat = p.taps == 1 && p.map == out[0] * out[1] && p.stride[0] == 1 && p.stride[1] == 1;
    /* An odd number of lines: maps in which a place is at the same place of the cache displace
       each other. */
    p.plane = ((p.stride[0] * p.stride[1] * p.map + LINE - 1) / LINE | 1) * LINE;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = solve(&p, threads);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"skip", skip, METH_VARARGS,
     "skip((x, gamma, beta, mean, variance, weight, squeeze, rate, bias, y), epsilon, (batch, "
     "channels, height, width), (outputs of a head, heads, squeezed, inactive), kernel, stride, "
     "padding, dilation, threads)\n\nCompute y, from addresses of float32 arrays; those "
     "of the norm may be 0."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_skipping", "Dynamic group convolutions that skip, compiled.", 0,
    methods,
};

PyMODINIT_FUNC PyInit__skipping(void) { return PyModule_Create(&definition); }
