/* Pillow's resize of 8-bit images: weights rounded to 22 bits, a horizontal pass rounded to 8 bits,
   then a vertical pass. Since Pillow 13 the vertical pass goes first where the height shrinks by
   more than twice what the width does. (Pillow, libImaging/Resample.c, defines the arithmetic.) */
#include "native.h"

#include <math.h>
#include <string.h>

#define WEIGHT_BITS 22 /* 32 less 8 for the pixel and 2 for the overshoot of bicubic */

/* An output of one axis is the weighted sum of `count` inputs from `first` on. */
typedef struct {
    int32_t first, count;
    const int32_t *weights;
} Span;

typedef struct {
    int taps; /* room for the weights of an output */
    int outputs;
    Span *spans;
    int32_t *weights;
} Axis;

static double triangle(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double catmull_rom(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

/* The doubles are computed in Pillow's order, for the rounding to be Pillow's. */
static void fill_axis(
    Axis *axis, int in_size, int out_size, int first_output, int cubic, double *weights
) {
    double scale = (double)in_size / out_size;
    double filter_scale = scale < 1.0 ? 1.0 : scale;
    double support = (cubic ? 2.0 : 1.0) * filter_scale;
    double inverse = 1.0 / filter_scale;
    for (int i = 0; i < axis->outputs; i++) {
        double center = (i + first_output + 0.5) * scale;
        int first = (int)(center - support + 0.5);
        if (first < 0) first = 0;
        int end = (int)(center + support + 0.5);
        if (end > in_size) end = in_size;
        int count = end - first;
        double sum = 0.0;
        for (int t = 0; t < count; t++) {
            double x = (t + first - center + 0.5) * inverse;
            weights[t] = cubic ? catmull_rom(x) : triangle(x);
            sum += weights[t];
        }
        int32_t *rounded = axis->weights + (ptrdiff_t)i * axis->taps;
        for (int t = 0; t < count; t++) {
            double weight = sum != 0.0 ? weights[t] / sum : weights[t];
            double scaled = weight * (1 << WEIGHT_BITS);
            rounded[t] = (int)(weight < 0 ? scaled - 0.5 : scaled + 0.5);
        }
        /* The ends of a span often round to nothing. */
        while (count > 1 && rounded[count - 1] == 0) count--;
        int skipped = 0;
        while (skipped < count - 1 && rounded[skipped] == 0) skipped++;
        axis->spans[i] = (Span){first + skipped, count - skipped, rounded + skipped};
    }
}

static int count_taps(int in_size, int out_size, int cubic) {
    double scale = (double)in_size / out_size;
    double support = (cubic ? 2.0 : 1.0) * (scale < 1.0 ? 1.0 : scale);
    return (int)ceil(support) * 2 + 1;
}

static void covered_inputs(const Axis *axis, int *first, int *count) {
    int end = 0;
    *first = INT32_MAX;
    for (int i = 0; i < axis->outputs; i++) {
        Span span = axis->spans[i];
        if (span.first < *first) *first = span.first;
        if (span.first + span.count > end) end = span.first + span.count;
    }
    *count = end - *first;
}

/* `n` adjacent bytes of `count` lines that are `step` bytes apart: their weighted sums, rounded and
   clipped to 0..255. Loops over bytes are inside, and two lines are taken at once, for the compiler
   to make good vector code of it. */
static ALWAYS_INLINE void weighted_sums(
    const uint8_t *restrict from, ptrdiff_t step, const int32_t *restrict weights, int count, int n,
    int32_t *restrict sums, uint8_t *restrict out
) {
    int t = 1;
    for (int i = 0; i < n; i++) sums[i] = (1 << (WEIGHT_BITS - 1)) + from[i] * weights[0];
    for (; t + 1 < count; t += 2) {
        const uint8_t *a = from + t * step, *b = a + step;
        int32_t weight_a = weights[t], weight_b = weights[t + 1];
        for (int i = 0; i < n; i++) sums[i] += a[i] * weight_a + b[i] * weight_b;
    }
    if (t < count) {
        const uint8_t *a = from + t * step;
        int32_t weight_a = weights[t];
        for (int i = 0; i < n; i++) sums[i] += a[i] * weight_a;
    }
    for (int i = 0; i < n; i++) {
        int32_t sum = sums[i] >> WEIGHT_BITS;
        out[i] = sum < 0 ? 0 : sum > 255 ? 255 : sum;
    }
}

/* 16 rows of 16 bytes become 16 columns: four rounds, each of which interleaves the halves. */
#define BLOCK 16
typedef uint8_t Line __attribute__((vector_size(BLOCK)));

static ALWAYS_INLINE void transpose(Line lines[BLOCK]) {
    for (int round = 0; round < 4; round++) {
        Line mixed[BLOCK];
        for (int i = 0; i < BLOCK / 2; i++) {
            Line a = lines[i], b = lines[i + BLOCK / 2];
            mixed[2 * i] = __builtin_shuffle(
                a, b, (Line){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
            );
            mixed[2 * i + 1] = __builtin_shuffle(
                a, b, (Line){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
            );
        }
        memcpy(lines, mixed, sizeof(mixed));
    }
}

/* Transposes an image of bytes: out[x][y] = in[y][x]. */
static ALWAYS_INLINE void transpose_bytes(
    const uint8_t *in, ptrdiff_t in_stride, int rows, int columns, uint8_t *out,
    ptrdiff_t out_stride
) {
    for (int y = 0; y < rows; y += BLOCK) {
        int height = rows - y < BLOCK ? rows - y : BLOCK;
        for (int x = 0; x < columns; x += BLOCK) {
            int width = columns - x < BLOCK ? columns - x : BLOCK;
            const uint8_t *from = in + y * in_stride + x;
            uint8_t *to = out + x * out_stride + y;
            Line lines[BLOCK] = {0};
            if (width == BLOCK && height == BLOCK) {
                for (int i = 0; i < BLOCK; i++) memcpy(&lines[i], from + i * in_stride, BLOCK);
                transpose(lines);
                for (int i = 0; i < BLOCK; i++) memcpy(to + i * out_stride, &lines[i], BLOCK);
            } else {
                for (int i = 0; i < height; i++) memcpy(&lines[i], from + i * in_stride, width);
                transpose(lines);
                for (int i = 0; i < width; i++) memcpy(to + i * out_stride, &lines[i], height);
            }
        }
    }
}

/* Rows that the horizontal pass takes at once: transposed, they lie across the vectors. */
#define LANES 64

/* The horizontal pass over `rows` rows of `in`, which has `columns` of the axis from `first` on. */
FOR_EACH_CPU
static void resize_rows(
    View in, const Axis *axis, int first, int columns, int rows, int flip, uint8_t *out,
    ptrdiff_t stride, uint8_t *scratch
) {
    uint8_t *result = scratch + (ptrdiff_t)columns * 3 * LANES;
    int32_t sums[LANES];
    for (int y = 0; y < rows; y += LANES) {
        int count = rows - y < LANES ? rows - y : LANES;
        transpose_bytes(in.pixels + y * in.stride, in.stride, count, columns * 3, scratch, LANES);
        for (int x = 0; x < axis->outputs; x++) {
            Span span = axis->spans[x];
            const uint8_t *from = scratch + (ptrdiff_t)(span.first - first) * 3 * LANES;
            uint8_t *to = result + (ptrdiff_t)(flip ? axis->outputs - 1 - x : x) * 3 * LANES;
            for (int c = 0; c < 3; c++)
                weighted_sums(
                    from + c * LANES, 3 * LANES, span.weights, span.count, LANES, sums,
                    to + c * LANES
                );
        }
        transpose_bytes(result, LANES, axis->outputs * 3, count, out + y * stride, stride);
    }
}

/* The vertical pass over rows of `row_bytes`, the first of which is `first` of the axis. */
FOR_EACH_CPU
static void resize_columns(
    View in, const Axis *axis, int first, int row_bytes, uint8_t *out, ptrdiff_t stride,
    int32_t *sums
) {
    for (int y = 0; y < axis->outputs; y++) {
        Span span = axis->spans[y];
        const uint8_t *from = in.pixels + (span.first - first) * in.stride;
        weighted_sums(from, in.stride, span.weights, span.count, row_bytes, sums, out + y * stride);
    }
}

int resize_crop(
    View box_pixels, const Plan *plan, int width, int height, uint8_t *out, ResizeScratch *scratch
) {
    /* The part of the output that the resized image covers. */
    int left = plan->offset[0] < 0 ? -plan->offset[0] : 0;
    int top = plan->offset[1] < 0 ? -plan->offset[1] : 0;
    int right = plan->resized[0] - plan->offset[0], bottom = plan->resized[1] - plan->offset[1];
    if (right > width) right = width;
    if (bottom > height) bottom = height;

    Axis horizontal = {count_taps(plan->box[2], plan->resized[0], plan->cubic), right - left, 0, 0};
    Axis vertical = {count_taps(plan->box[3], plan->resized[1], plan->cubic), bottom - top, 0, 0};
    size_t h_weights = (size_t)horizontal.taps * horizontal.outputs;
    size_t v_weights = (size_t)vertical.taps * vertical.outputs;
    size_t spans = (size_t)horizontal.outputs + vertical.outputs;
    size_t most_taps = horizontal.taps > vertical.taps ? horizontal.taps : vertical.taps;
    double *unrounded = buffer_reserve(
        &scratch->weights, sizeof(double) * most_taps + sizeof(int32_t) * (h_weights + v_weights)
    );
    horizontal.spans = buffer_reserve(&scratch->spans, sizeof(Span) * spans);
    if (!unrounded || !horizontal.spans) return -1;
    horizontal.weights = (int32_t *)(unrounded + most_taps);
    vertical.weights = horizontal.weights + h_weights;
    vertical.spans = horizontal.spans + horizontal.outputs;
    fill_axis(
        &horizontal, plan->box[2], plan->resized[0], plan->offset[0] + left, plan->cubic, unrounded
    );
    fill_axis(
        &vertical, plan->box[3], plan->resized[1], plan->offset[1] + top, plan->cubic, unrounded
    );

    int first_row, rows, first_column, columns;
    covered_inputs(&vertical, &first_row, &rows);
    covered_inputs(&horizontal, &first_column, &columns);
    View needed = box_pixels;
    needed.pixels += first_row * needed.stride + (ptrdiff_t)first_column * 3;

    if (right - left < width || bottom - top < height) memset(out, 0, (size_t)width * height * 3);
    ptrdiff_t out_stride = (ptrdiff_t)width * 3;
    out += top * out_stride + (ptrdiff_t)(plan->flip ? width - right : left) * 3;

    int vertical_first = plan->box[3] > plan->resized[1] &&
                         plan->box[3] - plan->resized[1] > 2 * (plan->box[2] - plan->resized[0]);
    View middle = {NULL, (ptrdiff_t)(vertical_first ? columns : horizontal.outputs) * 3};
    uint8_t *between =
        buffer_reserve(&scratch->between, middle.stride * (vertical_first ? vertical.outputs : rows));
    size_t strip_bytes = ((size_t)columns + horizontal.outputs) * 3 * LANES;
    size_t sums_bytes = (size_t)columns * 3 * sizeof(int32_t);
    if (sums_bytes < middle.stride * sizeof(int32_t)) sums_bytes = middle.stride * sizeof(int32_t);
    void *lines = buffer_reserve(
        &scratch->lines, strip_bytes > sums_bytes ? strip_bytes : sums_bytes
    );
    if (!between || !lines) return -1;
    middle.pixels = between;
    if (vertical_first) {
        resize_columns(needed, &vertical, first_row, columns * 3, between, middle.stride, lines);
        resize_rows(
            middle, &horizontal, first_column, columns, vertical.outputs, plan->flip, out,
            out_stride, lines
        );
    } else {
        resize_rows(
            needed, &horizontal, first_column, columns, rows, plan->flip, between, middle.stride,
            lines
        );
        resize_columns(middle, &vertical, first_row, horizontal.outputs * 3, out, out_stride, lines);
    }
    return 0;
}
