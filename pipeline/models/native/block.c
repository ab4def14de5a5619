/* A PoolFormer block's memory-bound parts for inference on CPUs, channels last (B, H, W, C):
   the residual stream is float32, what goes into and comes out of the channel MLP is bfloat16.

   mix_tokens: y = x + scale * (pool(norm1(x)) - norm1(x)), then norm2(y), in one visit of the memory. Both norms are
   GroupNorms of one group. The pooling averages over the pixels inside the image, so a constant is pooled to itself:
   norm1's mean and bias cancel, and what is left of it is one factor for each image and channel. A thread has whole
   images, each of which stays in its core's cache from the first visit to the last.

   add_scaled: y += scale * x.

   The values do not depend on the number of threads: sums are made row by row. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORISED
#endif
enum { THREADS_MAX = 256, LANES = 64 };

typedef void Items(const void *job, int64_t first, int64_t end, float *buffer);
typedef struct {
    const void *job;
    Items *items;
    int64_t first, end;
    float *buffer;
} Part;

static void *run_part(void *argument) {
    Part *part = argument;
    part->items(part->job, part->first, part->end, part->buffer);
    return NULL;
}

/* Calls `items` over [0, count), shared out over threads; each has `floats` of `buffers` to itself. */
static void in_parallel(Items *items, const void *job, int64_t count, int threads, float *buffers, int64_t floats) {
    Part parts[THREADS_MAX];
    pthread_t ids[THREADS_MAX];
    int started[THREADS_MAX];
    for (int i = threads - 1; i >= 0; i--) {
        parts[i] = (Part){job, items, count * i / threads, count * (i + 1) / threads, floats ? buffers + i * floats : NULL};
        started[i] = i > 0 && !pthread_create(&ids[i], NULL, run_part, &parts[i]);
        if (!started[i]) run_part(&parts[i]);
    }
    for (int i = 1; i < threads; i++)
        if (started[i]) pthread_join(ids[i], NULL);
}

typedef struct {
    double sum, squares;
} Moments;

typedef struct {
    const float *x, *mix_scale, *weight, *bias;
    float *y;
    uint16_t *normed;
    float eps;
    int64_t height, width, channels;
} Mix;

/* In LANES float sums, which the compiler keeps in registers: the order of additions does not depend on the machine. */
VECTORISED static void add_moments(Moments *total, const float *row, int64_t size) {
    float sum[LANES] = {0}, squares[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int k = 0; k < LANES; k++) {
            sum[k] += row[i + k];
            squares[k] += row[i + k] * row[i + k];
        }
    for (; i < size; i++) {
        sum[i % LANES] += row[i];
        squares[i % LANES] += row[i] * row[i];
    }
    for (int k = 0; k < LANES; k++) {
        total->sum += sum[k];
        total->squares += squares[k];
    }
}

/* Mean and 1 / sqrt(variance + eps) of an image. */
static void normaliser(const Mix *job, Moments of, float *mean, float *factor) {
    double count = (double)job->height * job->width * job->channels;
    double variance = of.squares / count - of.sum / count * (of.sum / count);
    *mean = (float)(of.sum / count);
    *factor = (float)(1 / sqrt((variance > 0 ? variance : 0) + job->eps));
}

VECTORISED static void add_rows(const float *a, const float *b, int64_t size, float *out) {
    for (int64_t i = 0; i < size; i++) out[i] = a[i] + b[i];
}

/* One pixel: y = x + scale * (sum / count - x), where `sum` is over up to three columns of `vertical`. */
VECTORISED static void mix_pixel(const float *x, const float *left, const float *middle, const float *right,
                                 const float *restrict scale, float per_count, int64_t channels, float *restrict y) {
    if (left && right)
        for (int64_t c = 0; c < channels; c++)
            y[c] = x[c] + scale[c] * ((left[c] + middle[c] + right[c]) * per_count - x[c]);
    else if (left || right) {
        const float *side = left ? left : right;
        for (int64_t c = 0; c < channels; c++) y[c] = x[c] + scale[c] * ((side[c] + middle[c]) * per_count - x[c]);
    } else
        for (int64_t c = 0; c < channels; c++) y[c] = x[c] + scale[c] * (middle[c] * per_count - x[c]);
}

/* y of an image, and its moments. */
static Moments mix_image(const Mix *job, const float *x, float *y, float *buffer) {
    int64_t channels = job->channels, width = job->width, row = width * channels;
    float *vertical = buffer, *scale = buffer + row, mean, factor;
    Moments of_x = {0, 0}, of_y = {0, 0};
    for (int64_t h = 0; h < job->height; h++) add_moments(&of_x, x + h * row, row);
    normaliser(job, of_x, &mean, &factor);
    for (int64_t c = 0; c < channels; c++) scale[c] = job->mix_scale[c] * factor;
    for (int64_t h = 0; h < job->height; h++, x += row, y += row) {
        int above = h > 0, below = h < job->height - 1;
        if (above && below) {
            add_rows(x - row, x, row, vertical);
            add_rows(vertical, x + row, row, vertical);
        } else if (above || below)
            add_rows(x, above ? x - row : x + row, row, vertical);
        else
            memcpy(vertical, x, row * sizeof(float));
        for (int64_t w = 0; w < width; w++) {
            const float *middle = vertical + w * channels;
            const float *left = w ? middle - channels : NULL, *right = w < width - 1 ? middle + channels : NULL;
            float count = (float)((1 + above + below) * (1 + (left != NULL) + (right != NULL)));
            mix_pixel(x + w * channels, left, middle, right, scale, 1 / count, channels, y + w * channels);
        }
        add_moments(&of_y, y, row);
    }
    return of_y;
}

VECTORISED static void affine(const float *x, const float *restrict factor, const float *restrict offset, int64_t width,
                              int64_t channels, float *restrict out) {
    for (int64_t w = 0; w < width; w++, x += channels, out += channels)
        for (int64_t c = 0; c < channels; c++) out[c] = x[c] * factor[c] + offset[c];
}

VECTORISED static void to_bf16(const float *x, int64_t size, uint16_t *restrict out) {
    for (int64_t i = 0; i < size; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to nearest, ties to even */
        out[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

static void normalise_image(const Mix *job, Moments of_y, const float *y, uint16_t *normed, float *buffer) {
    int64_t channels = job->channels, row = job->width * channels;
    float *factors = buffer + row, *offsets = factors + channels, mean, factor;
    normaliser(job, of_y, &mean, &factor);
    for (int64_t c = 0; c < channels; c++) {
        factors[c] = job->weight[c] * factor;
        offsets[c] = job->bias[c] - mean * factors[c];
    }
    for (int64_t h = 0; h < job->height; h++) {
        affine(y + h * row, factors, offsets, job->width, channels, buffer);
        to_bf16(buffer, row, normed + h * row);
    }
}

static void mix_images(const void *argument, int64_t first, int64_t end, float *buffer) {
    const Mix *job = argument;
    int64_t image = job->height * job->width * job->channels;
    for (int64_t i = first * image; i < end * image; i += image) {
        Moments of_y = mix_image(job, job->x + i, job->y + i, buffer);
        normalise_image(job, of_y, job->y + i, job->normed + i, buffer);
    }
}

/* Returns 0, or 1 where there is no memory. The images are shared out over the threads. */
EXPORT int mix_tokens(const float *x, const float *mix_scale, const float *weight, const float *bias, float *y,
                      uint16_t *normed, float eps, int64_t batch, int64_t height, int64_t width, int64_t channels,
                      int threads) {
    int64_t floats = (width + 2) * channels;
    if (threads > THREADS_MAX) threads = THREADS_MAX;
    if (threads > batch) threads = (int)batch;
    float *buffers = malloc(threads * floats * sizeof(float));
    if (!buffers) return 1;
    Mix job = {x, mix_scale, weight, bias, y, normed, eps, height, width, channels};
    in_parallel(mix_images, &job, batch, threads, buffers, floats);
    free(buffers);
    return 0;
}

typedef struct {
    float *y;
    const uint16_t *x;
    const float *scale;
    int64_t channels;
} Add;

VECTORISED static void add_pixel(float *restrict y, const uint16_t *restrict x, const float *restrict scale, int64_t n) {
    for (int64_t c = 0; c < n; c++) {
        uint32_t bits = (uint32_t)x[c] << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        y[c] += scale[c] * value;
    }
}

static void add_pixels(const void *argument, int64_t first, int64_t end, float *unused) {
    const Add *job = argument;
    (void)unused;
    for (int64_t i = first * job->channels; i < end * job->channels; i += job->channels)
        add_pixel(job->y + i, job->x + i, job->scale, job->channels);
}

EXPORT void add_scaled(float *y, const uint16_t *x, const float *scale, int64_t pixels, int64_t channels,
                       int threads) {
    Add job = {y, x, scale, channels};
    in_parallel(add_pixels, &job, pixels, threads > THREADS_MAX ? THREADS_MAX : threads, NULL, 0);
}
