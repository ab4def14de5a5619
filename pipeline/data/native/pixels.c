/* The entry points that pixels.py calls through ctypes, which lets go of the GIL meanwhile. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "native.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What one thread works with. Workers are kept for the next batch, for their memory is large enough
   by then; what one huge image needed is not. */
typedef struct Worker {
    Decoder *decoder;
    Buffer pixels, ops;
    ResizeScratch resize;
    struct Worker *next_idle;
} Worker;

#define KEPT_BYTES ((size_t)64 << 20)

static pthread_mutex_t idle_lock = PTHREAD_MUTEX_INITIALIZER;
static Worker *idle;

void *buffer_reserve(Buffer *buffer, size_t size_bytes) {
    if (size_bytes > buffer->size_bytes || !buffer->data) {
        free(buffer->data);
        buffer->data = malloc(size_bytes ? size_bytes : 1);
        buffer->size_bytes = buffer->data ? size_bytes : 0;
    }
    return buffer->data;
}

void buffer_free(Buffer *buffer) {
    free(buffer->data);
    *buffer = (Buffer){0};
}

static Worker *worker_take(void) {
    pthread_mutex_lock(&idle_lock);
    Worker *worker = idle;
    if (worker) idle = worker->next_idle;
    pthread_mutex_unlock(&idle_lock);
    if (worker) return worker;
    worker = calloc(1, sizeof(Worker));
    if (worker && !(worker->decoder = decoder_create())) {
        free(worker);
        return NULL;
    }
    return worker;
}

static void worker_give_back(Worker *worker) {
    if (worker->pixels.size_bytes > KEPT_BYTES) buffer_free(&worker->pixels);
    pthread_mutex_lock(&idle_lock);
    worker->next_idle = idle;
    idle = worker;
    pthread_mutex_unlock(&idle_lock);
}

static int read_box(
    Worker *worker, const Source *source, const int32_t box[4], View *view, char *message
) {
    if (box[0] < 0 || box[1] < 0 || box[2] < 1 || box[3] < 1 ||
        box[2] > source->width - box[0] || box[3] > source->height - box[1]) {
        snprintf(message, MESSAGE_BYTES, "the crop lies outside of the image");
        return -1;
    }
    if (!source->raw) return decode_jpeg(worker->decoder, source, box, &worker->pixels, view, message);
    if (source->size_bytes != (uint64_t)source->width * source->height * 3) {
        snprintf(message, MESSAGE_BYTES, "the pixels are not width x height x 3 bytes");
        return -1;
    }
    view->stride = (ptrdiff_t)source->width * 3;
    view->pixels = source->data + box[1] * view->stride + (ptrdiff_t)box[0] * 3;
    return 0;
}

static int make_sample(
    Worker *worker, const Source *source, const Plan *plan, int size_px, uint8_t *out, char *message
) {
    View view;
    if (read_box(worker, source, plan->box, &view, message)) return -1;
    int failed = resize_crop(view, plan, size_px, size_px, out, &worker->resize);
    for (int i = 0; i < OPS_PER_SAMPLE && !failed; i++)
        failed = augment(out, size_px, size_px, &plan->ops[i], &worker->ops);
    if (failed) snprintf(message, MESSAGE_BYTES, "out of memory");
    return failed;
}

typedef struct {
    const Source *sources;
    const Plan *plans;
    int64_t count;
    int32_t size_px;
    uint8_t *out;
    atomic_llong next;
    pthread_mutex_t lock; /* of the two below */
    int64_t first_failed;
    char *message;
} Batch;

static void fail(Batch *batch, int64_t sample, const char *reason) {
    pthread_mutex_lock(&batch->lock);
    if (batch->first_failed < 0 || sample < batch->first_failed) {
        batch->first_failed = sample;
        snprintf(batch->message, MESSAGE_BYTES, "%s", reason);
    }
    pthread_mutex_unlock(&batch->lock);
}

static void *work(void *argument) {
    Batch *batch = argument;
    char reason[MESSAGE_BYTES];
    Worker *worker = worker_take();
    if (!worker) {
        fail(batch, 0, "out of memory");
        return NULL;
    }
    size_t image_bytes = (size_t)batch->size_px * batch->size_px * 3;
    for (;;) {
        int64_t i = atomic_fetch_add(&batch->next, 1);
        if (i >= batch->count) break;
        if (make_sample(
                worker, &batch->sources[i], &batch->plans[i], batch->size_px,
                batch->out + i * image_bytes, reason
            ))
            fail(batch, i, reason);
    }
    worker_give_back(worker);
    return NULL;
}

/* Makes `count` images (size_px, size_px, 3) at `out`. Answers -1, or the first sample that failed
   with the reason in `message`. Threads live for one call: starting them takes microseconds, and
   none is left to spin or to be lost in a fork. */
EXPORT int64_t make_batch(
    const Source *sources, const Plan *plans, int64_t count, int32_t size_px, uint8_t *out,
    int32_t workers, char *message
) {
    Batch batch = {
        sources, plans, count, size_px, out, 0, PTHREAD_MUTEX_INITIALIZER, -1, message
    };
    if (workers > count) workers = (int32_t)count;
    pthread_t *threads = calloc(workers > 1 ? workers : 1, sizeof(pthread_t));
    int started = 0;
    while (threads && started < workers - 1 &&
           !pthread_create(&threads[started], NULL, work, &batch))
        started++;
    work(&batch);
    for (int i = 0; i < started; i++) pthread_join(threads[i], NULL);
    free(threads);
    return batch.first_failed;
}

/* The box of one image as packed rows. */
EXPORT int32_t decode(const Source *source, const int32_t box[4], uint8_t *out, char *message) {
    Worker *worker = worker_take();
    if (!worker) return -1;
    View view;
    int failed = read_box(worker, source, box, &view, message);
    for (int y = 0; y < box[3] && !failed; y++)
        memcpy(out + (size_t)y * box[2] * 3, view.pixels + y * view.stride, (size_t)box[2] * 3);
    worker_give_back(worker);
    return failed;
}

/* 1 for a JPEG whose every bit is in order, 0 for a damaged one, -1 without memory. */
EXPORT int32_t is_whole(const Source *source) {
    Worker *worker = worker_take();
    if (!worker) return -1;
    int answer = jpeg_is_whole(worker->decoder, source, &worker->pixels);
    worker_give_back(worker);
    return answer;
}

/* One operation in place on an image (height, width, 3). */
EXPORT int32_t apply_operation(uint8_t *image, int32_t width, int32_t height, const Op *op) {
    Worker *worker = worker_take();
    if (!worker) return -1;
    int failed = augment(image, width, height, op, &worker->ops);
    worker_give_back(worker);
    return failed;
}

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_pixels", "C functions for pipeline.data.pixels, through ctypes.", -1,
    NULL, NULL, NULL, NULL, NULL
};

PyMODINIT_FUNC PyInit__pixels(void) { return PyModule_Create(&module); }
