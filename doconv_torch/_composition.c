/* Composing kernels on a processor: K = W + W·Dᵀ, its gradients, and nothing else in memory.

   W, K and their gradients are (O, I/g, M) float32, D and its gradient (I, M, M), all contiguous.
   LANES input channels are treated side by side: their D lies in the cache, transposed once, while
   the rows of W stream past it and are transposed in registers. The result may take the gradient's
   place in memory. Every number is computed in the same order however many threads there are. The
   module is optional; doconv_torch/products.py computes the same with PyTorch's own matrix
   products. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8 /* what transpose() is written for */
#define BLOCKS 4 /* of LANES channels, whose D is in the cache at a time */
#define ROWS 4 /* of the gradient of W, between reading and writing the gradient of D */
#define LINE 16 /* entries that come into the cache at once */
#define MOST_TAPS 64

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *gradient, *weight, *depthwise;
    float *result, *by_depthwise; /* NULL where it is not needed */
    long outputs, inputs;         /* of a group */
    int taps;
} problem;

/* What a thread works on, each entry LANES channels. */
typedef struct {
    lanes *d, *sums;                   /* BLOCKS of M × M */
    lanes *weights, *gradients, *rest; /* ROWS of M; and M, for what is not LANES channels */
} work;

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

#define LOAD(address) (*(const anywhere *)(address))

/* LANES channels by rows of taps become rows of channels. */
INLINE void gather(lanes *to, const float *from, int taps) {
    int m = 0;
    for (; m + LANES <= taps; m += LANES) {
        lanes r[LANES];
        for (int c = 0; c < LANES; c++) r[c] = LOAD(from + c * taps + m);
        transpose(r);
        for (int k = 0; k < LANES; k++) to[m + k] = r[k];
    }
    for (; m < taps; m++) { /* of each load, the one lane that has its tap in its place */
        const float *p = from + m;
        const int next = taps - 1;
        lanes r = LOAD(p);
        r = __builtin_shufflevector(r, LOAD(p + next), 0, 9, 2, 3, 4, 5, 6, 7);
        r = __builtin_shufflevector(r, LOAD(p + 2 * next), 0, 1, 10, 3, 4, 5, 6, 7);
        r = __builtin_shufflevector(r, LOAD(p + 3 * next), 0, 1, 2, 11, 4, 5, 6, 7);
        r = __builtin_shufflevector(r, LOAD(p + 4 * next), 0, 1, 2, 3, 12, 5, 6, 7);
        r = __builtin_shufflevector(r, LOAD(p + 5 * next), 0, 1, 2, 3, 4, 13, 6, 7);
        r = __builtin_shufflevector(r, LOAD(p + 6 * next), 0, 1, 2, 3, 4, 5, 14, 7);
        to[m] = __builtin_shufflevector(r, LOAD(p + 7 * next), 0, 1, 2, 3, 4, 5, 6, 15);
    }
}

INLINE void scatter(float *to, const lanes *from, int taps) {
    int m = 0;
    for (; m + LANES <= taps; m += LANES) {
        lanes r[LANES];
        for (int k = 0; k < LANES; k++) r[k] = from[m + k];
        transpose(r);
        for (int c = 0; c < LANES; c++) *(anywhere *)(to + c * taps + m) = r[c];
    }
    for (; m < taps; m++)
        for (int c = 0; c < LANES; c++) to[c * taps + m] = from[m][c];
}

/* The same for fewer channels than LANES; missing ones are zero. */
INLINE void gather_some(lanes *to, const float *from, int channels, int taps, lanes *rest) {
    if (channels < LANES) {
        memset(rest, 0, sizeof(lanes) * taps);
        from = memcpy(rest, from, sizeof(float) * channels * taps);
    }
    gather(to, from, taps);
}

INLINE void scatter_some(float *to, const lanes *from, int channels, int taps, lanes *rest) {
    scatter(channels < LANES ? (float *)rest : to, from, taps);
    if (channels < LANES) memcpy(to, rest, sizeof(float) * channels * taps);
}

/* K's row of LANES channels, or with D's axes exchanged, that of the gradient of W. */
INLINE void add_product(lanes *r, const lanes *w, const lanes *d, int across, int along, int taps) {
    for (int m = 0; m < taps; m++) {
        lanes product = d[m * across] * w[0];
        for (int s = 1; s < taps; s++) product += d[m * across + s * along] * w[s];
        r[m] = w[m] + product;
    }
}

/* Begin to read what comes ROWS later: it is on another page, where no processor looks ahead. */
INLINE void fetch(const problem *p, long at, int taps) {
    for (long entry = at; entry < at + LANES * taps; entry += LINE) {
        if (p->weight != NULL) __builtin_prefetch(p->weight + entry);
        if (p->gradient != NULL) __builtin_prefetch(p->gradient + entry);
        if (p->result != NULL) __builtin_prefetch(p->result + entry, 1);
    }
}

/* `count` rows, from the entry `at` on, of one block of channels. */
INLINE void rows_of(const problem *p, const work *k, int block, int channels, long at, int count,
                    int taps) {
    const long row = p->inputs * p->taps;
    const lanes *d = k->d + block * taps * taps;
    lanes *sums = k->sums + block * taps * taps;
    for (int n = 0; n < count; n++) {
        lanes *w = k->weights + n * taps, *g = k->gradients + n * taps, r[MOST_TAPS];
        fetch(p, at + (n + ROWS) * row, taps);
        if (p->gradient == NULL || p->by_depthwise != NULL)
            gather_some(w, p->weight + at + n * row, channels, taps, k->rest);
        if (p->gradient != NULL)
            gather_some(g, p->gradient + at + n * row, channels, taps, k->rest);
        if (p->result == NULL) continue;
        if (p->gradient == NULL)
            add_product(r, w, d, taps, 1, taps);
        else
            add_product(r, g, d, 1, taps, taps);
        scatter_some(p->result + at + n * row, r, channels, taps, k->rest);
    }
    if (p->by_depthwise == NULL) return;
    for (int m = 0; m < taps; m++)
        for (int s = 0; s < taps; s++) {
            lanes sum = sums[m * taps + s];
            for (int n = 0; n < count; n++)
                sum += k->gradients[n * taps + m] * k->weights[n * taps + s];
            sums[m * taps + s] = sum;
        }
}

/* BLOCKS · LANES channels from `first` on, of a group, or as many as there are. */
INLINE void blocks_of(const problem *p, const work *k, long group, long first, int taps) {
    const long left = p->inputs - first, square = taps * taps;
    const long depthwise = (group * p->inputs + first) * square;
    const int all = left < BLOCKS * LANES ? (int)left : BLOCKS * LANES;
    for (int c = 0, block = 0; c < all; c += LANES, block++) {
        const int channels = all - c < LANES ? all - c : LANES;
        gather_some(k->d + block * square, p->depthwise + depthwise + c * square, channels,
                    (int)square, k->rest);
    }
    memset(k->sums, 0, sizeof(lanes) * BLOCKS * square);
    for (long o = 0; o < p->outputs; o += ROWS)
        for (int c = 0, block = 0; c < all; c += LANES, block++) {
            const int channels = all - c < LANES ? all - c : LANES;
            const long at = ((group * p->outputs + o) * p->inputs + first + c) * taps;
            if (channels == LANES && p->outputs - o >= ROWS)
                rows_of(p, k, block, LANES, at, ROWS, taps);
            else
                rows_of(p, k, block, channels, at,
                        p->outputs - o < ROWS ? (int)(p->outputs - o) : ROWS, taps);
        }
    if (p->by_depthwise == NULL) return;
    for (int c = 0, block = 0; c < all; c += LANES, block++) {
        const int channels = all - c < LANES ? all - c : LANES;
        scatter_some(p->by_depthwise + depthwise + c * square, k->sums + block * square, channels,
                     (int)square, k->rest);
    }
}

/* Parts `from` to `to`, of all groups' parts of BLOCKS · LANES channels, one after the other. The
   usual numbers of taps are known to the compiler, which then keeps more in registers. */
INLINE void parts_of(const problem *p, const work *k, long from, long to) {
    const long each = BLOCKS * LANES, per_group = (p->inputs + each - 1) / each;
    for (long part = from; part < to; part++) {
        const long group = part / per_group, first = part % per_group * each;
        switch (p->taps) {
            case 9: blocks_of(p, k, group, first, 9); break;
            case 25: blocks_of(p, k, group, first, 25); break;
            case 27: blocks_of(p, k, group, first, 27); break;
            default: blocks_of(p, k, group, first, p->taps);
        }
    }
}

typedef void parts_function(const problem *, const work *, long, long);

static void parts(const problem *p, const work *k, long from, long to) { parts_of(p, k, from, to); }

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) static void parts_avx2(
    const problem *p, const work *k, long from, long to) {
    parts_of(p, k, from, to);
}

/* Not by target_clones: of processors of another make it takes the plainest. */
static parts_function *best(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? parts_avx2 : parts;
}
#else
static parts_function *best(void) { return parts; }
#endif

/* Return 0, or -1 where there is no memory. */
static int solve(const problem *p, long groups, int threads) {
    const long each = BLOCKS * LANES, count = groups * ((p->inputs + each - 1) / each);
    const size_t square = p->taps * p->taps, rows = ROWS * p->taps;
    const size_t size = sizeof(lanes) * ((2 * BLOCKS + 1) * square + 2 * rows);
    if (threads > count) threads = (int)count;
    char *memory = NULL;
    if (posix_memalign((void **)&memory, 64, size * threads)) return -1;
    parts_function *const best_parts = best();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int n = 0; n < threads; n++) {
        lanes *d = (lanes *)(memory + size * n), *sums = d + BLOCKS * square;
        lanes *weights = sums + BLOCKS * square, *gradients = weights + rows;
        const work k = {d, sums, weights, gradients, gradients + rows};
        best_parts(p, &k, count * n / threads, count * (n + 1) / threads);
    }
    free(memory);
    return 0;
}

static PyObject *compose(PyObject *self, PyObject *args) {
    unsigned long long gradient, weight, depthwise, result, by_depthwise;
    long outputs, inputs, groups;
    int taps, threads;
    if (!PyArg_ParseTuple(args, "KKKKKllili", &gradient, &weight, &depthwise, &result,
                          &by_depthwise, &outputs, &inputs, &taps, &groups, &threads))
        return NULL;
    if (taps < 1 || taps > MOST_TAPS || outputs < 1 || inputs < 1 || groups < 1 || threads < 1) {
        PyErr_Format(PyExc_ValueError,
                     "received %d taps, %ld and %ld channels, %ld groups and %d threads; each must "
                     "be at least 1, and the taps at most %d.",
                     taps, outputs, inputs, groups, threads, MOST_TAPS);
        return NULL;
    }
    const problem p = {
        (const float *)(uintptr_t)gradient, (const float *)(uintptr_t)weight,
        (const float *)(uintptr_t)depthwise, (float *)(uintptr_t)result,
        (float *)(uintptr_t)by_depthwise, outputs, inputs, taps,
    };
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = solve(&p, groups, threads);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"compose", compose, METH_VARARGS,
     "compose(gradient, weight, depthwise, result, by_depthwise, outputs, inputs, taps, groups, "
     "threads)\n\nCompute from addresses of float32 arrays. With gradient 0: the kernel, into "
     "result. Else the gradients of W, into result, and of D, into by_depthwise, where these are "
     "not 0. outputs, inputs: channels of a group."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_composition", "Composition of kernels, compiled.", 0, methods,
};

PyMODINIT_FUNC PyInit__composition(void) {
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "MOST_TAPS", MOST_TAPS)) return NULL;
    return module;
}
