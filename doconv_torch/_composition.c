/* Composing kernels on a processor: K = W + W·Dᵀ, its gradients, and nothing else in memory.

   W, K and their gradients are (O, I/g, M) float32, D and its gradient (I, M, M), all contiguous.
   LANES input channels are treated side by side: their D lies in the cache, transposed once, while
   the rows of W stream past it. Every number is computed in the same order however many threads
   there are. The module is optional; doconv_torch/products.py computes the same with PyTorch's own
   matrix products. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define MOST_TAPS 64

typedef float lanes __attribute__((vector_size(4 * LANES)));

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_PROCESSOR __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define EVERY_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *gradient, *weight, *depthwise;
    float *result, *by_depthwise; /* NULL where it is not needed */
    long outputs, inputs;         /* of a group */
    int taps;
} problem;

/* Channels by rows of taps become rows of channels; missing channels are zero. */
INLINE void gather(lanes *to, const float *from, int channels, int taps) {
    float *p = (float *)to;
    if (channels < LANES) memset(to, 0, sizeof(lanes) * taps);
    if (channels == LANES)
        for (int m = 0; m < taps; m++)
            for (int c = 0; c < LANES; c++) p[m * LANES + c] = from[c * taps + m];
    else
        for (int m = 0; m < taps; m++)
            for (int c = 0; c < channels; c++) p[m * LANES + c] = from[c * taps + m];
}

INLINE void scatter(float *to, const lanes *from, int channels, int taps) {
    const float *p = (const float *)from;
    for (int c = 0; c < channels; c++)
        for (int m = 0; m < taps; m++) to[c * taps + m] = p[m * LANES + c];
}

/* Blocks of channels `from` to `to`, of all groups' blocks, one after the other. */
INLINE void blocks_of(const problem *p, long from, long to, lanes *memory, int taps) {
    const long per_group = (p->inputs + LANES - 1) / LANES;
    lanes *w = memory, *g = w + taps, *r = g + taps, *d = r + taps, *sum = d + taps * taps;
    for (long block = from; block < to; block++) {
        const long group = block / per_group, first = block % per_group * LANES;
        const long left = p->inputs - first;
        const int channels = left < LANES ? (int)left : LANES;
        const long depthwise = (group * p->inputs + first) * taps * taps;
        gather(d, p->depthwise + depthwise, channels, taps * taps);
        memset(sum, 0, sizeof(lanes) * taps * taps);
        for (long o = 0; o < p->outputs; o++) {
            const long at = ((group * p->outputs + o) * p->inputs + first) * taps;
            if (p->gradient == NULL) {
                gather(w, p->weight + at, channels, taps);
                for (int m = 0; m < taps; m++) {
                    lanes product = d[m * taps] * w[0];
                    for (int s = 1; s < taps; s++) product += d[m * taps + s] * w[s];
                    r[m] = w[m] + product;
                }
                scatter(p->result + at, r, channels, taps);
                continue;
            }
            gather(g, p->gradient + at, channels, taps);
            if (p->result != NULL) {
                for (int s = 0; s < taps; s++) {
                    lanes product = d[s] * g[0];
                    for (int m = 1; m < taps; m++) product += d[m * taps + s] * g[m];
                    r[s] = g[s] + product;
                }
                scatter(p->result + at, r, channels, taps);
            }
            if (p->by_depthwise != NULL) {
                gather(w, p->weight + at, channels, taps);
                for (int m = 0; m < taps; m++)
                    for (int s = 0; s < taps; s++) sum[m * taps + s] += g[m] * w[s];
            }
        }
        if (p->by_depthwise != NULL)
            scatter(p->by_depthwise + depthwise, sum, channels, taps * taps);
    }
}

/* The usual numbers of taps are known to the compiler, which then keeps more in registers. */
EVERY_PROCESSOR static void blocks(const problem *p, long from, long to, lanes *memory) {
    switch (p->taps) {
        case 3: blocks_of(p, from, to, memory, 3); break;
        case 9: blocks_of(p, from, to, memory, 9); break;
        case 25: blocks_of(p, from, to, memory, 25); break;
        case 27: blocks_of(p, from, to, memory, 27); break;
        default: blocks_of(p, from, to, memory, p->taps);
    }
}

/* Return 0, or -1 where there is no memory. */
static int solve(const problem *p, long groups, int threads) {
    const long count = groups * ((p->inputs + LANES - 1) / LANES);
    const size_t each = sizeof(lanes) * (3 * p->taps + 2 * p->taps * p->taps);
    if (threads > count) threads = (int)count;
    char *memory = NULL;
    if (posix_memalign((void **)&memory, sizeof(lanes), each * threads)) return -1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int n = 0; n < threads; n++)
        blocks(p, count * n / threads, count * (n + 1) / threads, (lanes *)(memory + each * n));
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
