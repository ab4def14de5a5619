/* A PoolFormer block's memory-bound parts for inference on CPUs, channels last (B, H, W, C):
   the residual stream is float32, what goes into and comes out of the channel MLP is bfloat16.

   mix_tokens: y = x + scale * (pool(norm1(x)) - norm1(x)), then norm2(y), in one visit of the memory. Both norms are
   GroupNorms of one group. The pooling averages over the pixels inside the image, so a constant is pooled to itself:
   norm1's mean and bias cancel, and what is left of it is one factor for each image and channel.

   add_scaled: y += scale * x.

   The values do not depend on the number of threads: sums are made row by row. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#ifdef __x86_64__
#define VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORISED
#endif
enum { CACHE_BYTES = 1 << 20, THREADS_MAX = 256, LANES = 64 };

typedef void Rows(const void *job, int64_t first, int64_t end, float *buffer);
typedef struct {
    const void *job;
    Rows *rows;
    int64_t first, end;
    float *buffer;
} Part;

static void *run_part(void *argument) {
    Part *part = argument;
    part->rows(part->job, part->first, part->end, part->buffer);
    return NULL;
}

/* Calls `rows` over [0, count), shared out over threads; each has `floats` of `buffers` to itself. */
static void in_parallel(Rows *rows, const void *job, int64_t count, int threads, float *buffers, int64_t floats) {
    Part parts[THREADS_MAX];
    pthread_t ids[THREADS_MAX];
    int started[THREADS_MAX];
    for (int i = threads - 1; i >= 0; i--) {
        parts[i] = (Part){job, rows, count * i / threads, count * (i + 1) / threads, floats ? buffers + i * floats : NULL};
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
    Moments *of_x, *of_y; /* of each row (b, h) */
    float eps;
    int64_t height, width, channels;
} Mix;

/* In LANES float sums, which the compiler keeps in registers: the order of additions does not depend on the machine. */
VECTORISED static Moments row_moments(const float *row, int64_t size) {
    float sum[LANES] = {0}, squares[LANES] = {0};
    Moments total = {0, 0};
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
        total.sum += sum[k];
        total.squares += squares[k];
    }
    return total;
}

/* Mean and 1 / sqrt(variance + eps) of image b. */
static void normaliser(const Mix *job, const Moments *rows, int64_t b, float *mean, float *factor) {
    double sum = 0, squares = 0, count = (double)job->height * job->width * job->channels;
    for (int64_t h = 0; h < job->height; h++) {
        sum += rows[b * job->height + h].sum;
        squares += rows[b * job->height + h].squares;
    }
    double variance = squares / count - sum / count * (sum / count);
    *mean = (float)(sum / count);
    *factor = (float)(1 / sqrt((variance > 0 ? variance : 0) + job->eps));
}

static void measure(const void *argument, int64_t first, int64_t end, float *buffer) {
    const Mix *job = argument;
    int64_t row = job->width * job->channels;
    (void)buffer;
    for (int64_t r = first; r < end; r++) job->of_x[r] = row_moments(job->x + r * row, row);
}

VECTORISED static void add_rows(const float *a, const float *b, int64_t size, float *restrict out) {
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

/* The buffer holds a row, and `channels` more. */
static void mix_rows(const void *argument, int64_t first, int64_t end, float *buffer) {
    const Mix *job = argument;
    int64_t channels = job->channels, width = job->width, row = width * channels, scaled = -1;
    float *vertical = buffer, *scale = buffer + row;
    for (int64_t r = first; r < end; r++) {
        int64_t b = r / job->height, h = r % job->height;
        const float *x = job->x + r * row;
        if (b != scaled) {
            float mean, factor;
            normaliser(job, job->of_x, b, &mean, &factor);
            for (int64_t c = 0; c < channels; c++) scale[c] = job->mix_scale[c] * factor;
            scaled = b;
        }
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
            mix_pixel(x + w * channels, left, middle, right, scale, 1 / count, channels, job->y + r * row + w * channels);
        }
        job->of_y[r] = row_moments(job->y + r * row, row);
    }
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

static void normalise(const void *argument, int64_t first, int64_t end, float *buffer) {
    const Mix *job = argument;
    int64_t channels = job->channels, row = job->width * channels, known = -1;
    float *factors = buffer + row, *offsets = factors + channels;
    for (int64_t r = first; r < end; r++) {
        if (r / job->height != known) {
            float mean, factor;
            known = r / job->height;
            normaliser(job, job->of_y, known, &mean, &factor);
            for (int64_t c = 0; c < channels; c++) {
                factors[c] = job->weight[c] * factor;
                offsets[c] = job->bias[c] - mean * factors[c];
            }
        }
        affine(job->y + r * row, factors, offsets, job->width, channels, buffer);
        to_bf16(buffer, row, job->normed + r * row);
    }
}

/* Returns 0, or 1 where there is no memory. Images are taken in groups that stay in the cores' caches. */
EXPORT int mix_tokens(const float *x, const float *mix_scale, const float *weight, const float *bias, float *y,
                      uint16_t *normed, float eps, int64_t batch, int64_t height, int64_t width, int64_t channels,
                      int threads) {
    int64_t image = height * width * channels, floats = (width + 2) * channels;
    if (threads > THREADS_MAX) threads = THREADS_MAX;
    int64_t group = threads * (int64_t)CACHE_BYTES / (image * (int64_t)sizeof(float));
    group = group < 1 ? 1 : group > batch ? batch : group;
    float *buffers = malloc(threads * floats * sizeof(float));
    Moments *of_x = malloc(group * height * sizeof(Moments)), *of_y = malloc(group * height * sizeof(Moments));
    int failed = !buffers || !of_x || !of_y;
    for (int64_t b = 0; b < batch && !failed; b += group) {
        int64_t rows = (b + group < batch ? group : batch - b) * height, start = b * image;
        Mix job = {x + start, mix_scale, weight, bias,   y + start, normed + start,
                   of_x,      of_y,      eps,    height, width,     channels};
        in_parallel(measure, &job, rows, threads, buffers, floats);
        in_parallel(mix_rows, &job, rows, threads, buffers, floats);
        in_parallel(normalise, &job, rows, threads, buffers, floats);
    }
    free(buffers);
    free(of_x);
    free(of_y);
    return failed;
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
