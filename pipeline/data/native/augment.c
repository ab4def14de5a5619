/* The fifteen operations of timm's RandAugment with Pillow's arithmetic: ImageOps, ImageEnhance and
   Image.transform. Floating-point expressions keep Pillow's order and types, for its rounding. */
#include "native.h"

#include <math.h>
#include <string.h>

typedef uint8_t Table[256];

FOR_EACH_CPU
static void apply_tables(uint8_t *image, int pixels, Table tables[3]) {
    for (int i = 0; i < pixels; i++, image += 3) {
        image[0] = tables[0][image[0]];
        image[1] = tables[1][image[1]];
        image[2] = tables[2][image[2]];
    }
}

/* Two sets of counters, because equal neighbours would wait for each other's sum. */
static void histograms(const uint8_t *image, int pixels, int32_t counts[3][256]) {
    int32_t odd[3][256] = {0};
    memset(counts, 0, sizeof(odd));
    int i = 0;
    for (; i + 1 < pixels; i += 2, image += 6) {
        for (int c = 0; c < 3; c++) {
            counts[c][image[c]]++;
            odd[c][image[c + 3]]++;
        }
    }
    for (int c = 0; c < 3; c++) {
        if (i < pixels) counts[c][image[c]]++;
        for (int v = 0; v < 256; v++) counts[c][v] += odd[c][v];
    }
}

static void auto_contrast(uint8_t *image, int pixels) {
    int32_t counts[3][256];
    Table tables[3];
    histograms(image, pixels, counts);
    for (int c = 0; c < 3; c++) {
        int low = 0, high = 255;
        while (low < 255 && !counts[c][low]) low++;
        while (high > 0 && !counts[c][high]) high--;
        double scale = high > low ? 255.0 / (high - low) : 1.0;
        double offset = high > low ? -low * scale : 0.0;
        for (int i = 0; i < 256; i++) {
            int value = (int)(i * scale + offset);
            tables[c][i] = value < 0 ? 0 : value > 255 ? 255 : value;
        }
    }
    apply_tables(image, pixels, tables);
}

static void equalize(uint8_t *image, int pixels) {
    int32_t counts[3][256];
    Table tables[3];
    histograms(image, pixels, counts);
    for (int c = 0; c < 3; c++) {
        int high = 255;
        while (high > 0 && !counts[c][high]) high--;
        int step = (pixels - counts[c][high]) / 255;
        int sum = step / 2;
        for (int i = 0; i < 256; i++) {
            int value = step ? sum / step : i;
            tables[c][i] = value > 255 ? 255 : value;
            sum += counts[c][i];
        }
    }
    apply_tables(image, pixels, tables);
}

/* Posterize to 0 bits gives black, as before Pillow 13 refused it. */
FOR_EACH_CPU
static void posterize(uint8_t *image, int bytes, int bits) {
    uint8_t mask = (uint8_t)(0xff00 >> bits);
    for (int i = 0; i < bytes; i++) image[i] &= mask;
}

/* Inverts from `threshold` on; 0 inverts everything. */
FOR_EACH_CPU
static void solarize(uint8_t *image, int bytes, int threshold) {
    for (int i = 0; i < bytes; i++) image[i] = image[i] < threshold ? image[i] : 255 - image[i];
}

FOR_EACH_CPU
static void solarize_add(uint8_t *image, int bytes, int add) {
    for (int i = 0; i < bytes; i++) {
        int sum = image[i] + add;
        image[i] = image[i] >= 128 ? image[i] : sum > 255 ? 255 : sum;
    }
}

/* Image.blend of one value; a factor outside of 0..1 extrapolates and clips. */
static ALWAYS_INLINE uint8_t blend(int degenerate, int value, float factor) {
    float blended = (float)degenerate + factor * (float)(value - degenerate);
    blended = blended < 0.0f ? 0.0f : blended;
    return (uint8_t)(int)(blended > 255.0f ? 255.0f : blended);
}

static ALWAYS_INLINE int luma(const uint8_t *pixel) {
    return (pixel[0] * 19595 + pixel[1] * 38470 + pixel[2] * 7471 + 0x8000) >> 16;
}

FOR_EACH_CPU
static void color(uint8_t *restrict image, ptrdiff_t pixels, float factor) {
    for (ptrdiff_t i = 0; i < pixels; i++) {
        int grey = luma(image + 3 * i);
        for (int c = 0; c < 3; c++) image[3 * i + c] = blend(grey, image[3 * i + c], factor);
    }
}

/* Blends with one grey level: black for Brightness, the mean luma for Contrast. */
FOR_EACH_CPU
static void blend_with_level(uint8_t *image, int bytes, int level, float factor) {
    for (int i = 0; i < bytes; i++) image[i] = blend(level, image[i], factor);
}

FOR_EACH_CPU
static int mean_luma(const uint8_t *image, ptrdiff_t pixels) {
    int64_t sum = 0;
    for (ptrdiff_t i = 0; i < pixels; i++) sum += luma(image + 3 * i);
    return (int)((double)sum / pixels + 0.5);
}

/* Blends with ImageFilter.SMOOTH: (8 neighbours + 5 * itself) / 13, the border as it is. Pillow sums
   floats and adds 0.5; no sum comes nearer to a tie than 1/26, so that integers give the same. */
FOR_EACH_CPU
static void sharpen(
    const uint8_t *restrict in, uint8_t *restrict out, int width, int height, float factor
) {
    ptrdiff_t row = (ptrdiff_t)width * 3;
    for (int y = 1; y < height - 1; y++) {
        const uint8_t *above = in + (y - 1) * row, *here = above + row;
        const uint8_t *below = here + row;
        uint8_t *to = out + y * row;
        for (ptrdiff_t i = 3; i < row - 3; i++) {
            uint16_t sum = above[i - 3] + above[i] + above[i + 3] + here[i - 3] + 5 * here[i] +
                           here[i + 3] + below[i - 3] + below[i] + below[i + 3];
            uint16_t smooth = (uint16_t)(2 * sum + 13) / 26;
            to[i] = blend(smooth, here[i], factor);
        }
    }
}

static int sharpness(uint8_t *image, int width, int height, float factor, Buffer *scratch) {
    size_t bytes = (size_t)width * height * 3;
    uint8_t *copy = buffer_reserve(scratch, bytes);
    if (!copy) return -1;
    memcpy(copy, image, bytes);
    if (width >= 3) sharpen(copy, image, width, height, factor);
    return 0;
}

/* Image.transform(AFFINE) with a bilinear or bicubic filter, in doubles as Pillow has it. */

#define MARGIN_PX 2 /* the edge is repeated this far, so that no neighbourhood needs a test */
static const uint32_t FILL = 124 | 116 << 8 | 104 << 16; /* timm's: ImageNet's mean colour */

static ALWAYS_INLINE double linear(double a, double b, double t) { return a + (b - a) * t; }

static ALWAYS_INLINE double cubic(double a, double b, double c, double d, double t) {
    double p2 = -a + c;
    double p3 = 2 * (a - b) + c - d;
    double p4 = -a + b - c + d;
    return b + t * (p2 + t * (p3 + t * p4));
}

static ALWAYS_INLINE double interpolate(const double values[4], int taps, double t) {
    if (taps == 1) return values[0];
    if (taps == 2) return linear(values[0], values[1], t);
    return cubic(values[0], values[1], values[2], values[3], t);
}

/* One row of the result. A neighbourhood is 1, 2 or 4 pixels wide and high. */
typedef struct {
    int width, height, stride; /* of the image, and of its copy with margins */
    int taps_x, taps_y;
    double *dx, *dy;   /* from the neighbourhood's first pixel (bicubic: its second) */
    int32_t *position; /* of that pixel in the copy */
    uint32_t *inside;  /* all ones, or 0 where the place is outside of the image */
    uint32_t *gathered[4];
    double *lines[4]; /* a line of the neighbourhood interpolated, channel after channel */
    uint32_t *pixels; /* the result */
} AffineRow;

/* Where along one axis the pixels of a row come from: a * (x + 0.5) + b * (y + 0.5) + c. Pillow's
   order of operations is the matrix's, hence two products either way. */
static ALWAYS_INLINE void locate_axis(
    const AffineRow *row, const double m[3], int y, int size, int step, double *restrict fraction
) {
    int32_t *restrict position = row->position;
    uint32_t *restrict inside = row->inside;
    const int width = row->width;
    const double a = m[0], b = m[1], c = m[2];
    for (int x = 0; x < width; x++) {
        double place = a * (x + 0.5) + b * (y + 0.5) + c;
        inside[x] &= -(uint32_t)((place >= 0) & (place < size));
        double first = floor(place - 0.5);
        fraction[x] = place - 0.5 - first;
        position[x] += ((int)first + MARGIN_PX) * step;
    }
}

FOR_EACH_CPU
static void locate(const AffineRow *row, const double m[6], int y) {
    int32_t *restrict position = row->position;
    uint32_t *restrict inside = row->inside;
    const int width = row->width;
    memset(position, 0, sizeof(*position) * width);
    memset(inside, 255, sizeof(*inside) * width);
    if (row->taps_x > 1)
        locate_axis(row, m, y, row->width, 1, row->dx);
    else
        for (int x = 0; x < width; x++) position[x] += x + MARGIN_PX;
    if (row->taps_y > 1)
        locate_axis(row, m + 3, y, row->height, row->stride, row->dy);
    else
        for (int x = 0; x < width; x++) position[x] += (y + MARGIN_PX) * row->stride;
    for (int x = 0; x < width; x++) position[x] &= inside[x]; /* somewhere harmless */
}

/* Whether the inside pixels lie side by side in the copy, as those of a shear along the row do. */
FOR_EACH_CPU
static int is_run(const AffineRow *row, int *start) {
    const int width = row->width;
    int first = 0;
    while (first < width && !row->inside[first]) first++;
    if (first == width) return 0;
    const int offset = *start = row->position[first] - first;
    uint32_t elsewhere = 0;
    for (int x = 0; x < width; x++)
        elsewhere |= (uint32_t)(row->position[x] - x - offset) & row->inside[x];
    return !elsewhere;
}

static ALWAYS_INLINE void interpolate_line(
    const AffineRow *row, const uint32_t *const from[4], int taps, double *line
) {
    const uint32_t *restrict a = from[0], *restrict b = from[1];
    const uint32_t *restrict c = from[2], *restrict d = from[3];
    const double *restrict dx = row->dx;
    const int width = row->width;
    for (int shift = 0; shift < 24; shift += 8, line += width) {
        double *restrict to = line;
        for (int x = 0; x < width; x++) {
            double values[4] = {(int)(a[x] >> shift & 255)};
            if (taps > 1) values[1] = (int)(b[x] >> shift & 255);
            if (taps > 2) values[2] = (int)(c[x] >> shift & 255);
            if (taps > 2) values[3] = (int)(d[x] >> shift & 255);
            to[x] = interpolate(values, taps, dx[x]);
        }
    }
}

static ALWAYS_INLINE void interpolate_pixels(const AffineRow *row, int taps) {
    const int width = row->width;
    const double *restrict dy = row->dy;
    uint32_t *restrict pixels = row->pixels;
    memset(pixels, 0, sizeof(uint32_t) * width);
    for (int channel = 0; channel < 3; channel++) {
        const double *restrict a = row->lines[0] + channel * width;
        const double *restrict b = row->lines[1] + channel * width;
        const double *restrict c = row->lines[2] + channel * width;
        const double *restrict d = row->lines[3] + channel * width;
        for (int x = 0; x < width; x++) {
            double values[4] = {a[x]};
            if (taps > 1) values[1] = b[x];
            if (taps > 2) values[2] = c[x];
            if (taps > 2) values[3] = d[x];
            double value = interpolate(values, taps, dy[x]);
            value = value < 0.0 ? 0.0 : value;
            pixels[x] |= (uint32_t)(int)(value > 255.0 ? 255.0 : value) << 8 * channel;
        }
    }
    const uint32_t *restrict inside = row->inside;
    for (int x = 0; x < width; x++) pixels[x] = (pixels[x] & inside[x]) | (FILL & ~inside[x]);
}

static ALWAYS_INLINE void gather(
    const uint32_t *restrict from, const int32_t *restrict position, int width,
    uint32_t *restrict to
) {
    for (int x = 0; x < width; x++) to[x] = from[position[x]];
}

/* The calls have constants for the compiler to leave out what one or two taps don't need. */
FOR_EACH_CPU
static void make_row(const AffineRow *row, const uint32_t *copy) {
    int start, run = is_run(row, &start);
    for (int j = 0; j < row->taps_y; j++) {
        const uint32_t *taps[4] = {0};
        for (int i = 0; i < row->taps_x; i++) {
            const uint32_t *from = copy + (row->taps_y == 4 ? j - 1 : j) * row->stride;
            from += row->taps_x == 4 ? i - 1 : i;
            taps[i] = run ? from + start : row->gathered[i];
            if (!run) gather(from, row->position, row->width, row->gathered[i]);
        }
        if (row->taps_x == 1) interpolate_line(row, taps, 1, row->lines[j]);
        if (row->taps_x == 2) interpolate_line(row, taps, 2, row->lines[j]);
        if (row->taps_x == 4) interpolate_line(row, taps, 4, row->lines[j]);
    }
    if (row->taps_y == 1) interpolate_pixels(row, 1);
    if (row->taps_y == 2) interpolate_pixels(row, 2);
    if (row->taps_y == 4) interpolate_pixels(row, 4);
}

/* RGB to RGBX with a margin. A pixel and a byte of the next one are read at once, where there is a
   next one. */
static void pad(const uint8_t *image, int width, int height, uint32_t *padded) {
    for (int y = -MARGIN_PX; y < height + MARGIN_PX; y++, padded += width + 2 * MARGIN_PX) {
        const uint8_t *row = image + (ptrdiff_t)(y < 0 ? 0 : y < height ? y : height - 1) * width * 3;
        uint32_t *to = padded + MARGIN_PX;
        for (int x = 0; x < width - 1; x++, row += 3) memcpy(&to[x], row, 4);
        to[width - 1] = row[0] | row[1] << 8 | row[2] << 16;
        for (int x = 1; x <= MARGIN_PX; x++) {
            to[-x] = to[0];
            to[width - 1 + x] = to[width - 1];
        }
    }
}

static void unpad(const uint32_t *pixels, int width, uint8_t *row) {
    for (int x = 0; x < width - 1; x++, row += 3) memcpy(row, &pixels[x], 4);
    memcpy(row, &pixels[width - 1], 3);
}

static int affine(uint8_t *image, int width, int height, const Op *op, Buffer *scratch) {
    const double *m = op->args;
    /* An axis that stays as it is needs one tap: interpolation by 0 gives the pixel itself. */
    int taps = op->cubic ? 4 : 2;
    int same_x = m[0] == 1 && m[1] == 0 && m[2] == 0, same_y = m[3] == 0 && m[4] == 1 && m[5] == 0;
    if (same_x && same_y) return 0;
    AffineRow row = {
        .width = width, .height = height, .stride = width + 2 * MARGIN_PX,
        .taps_x = same_x ? 1 : taps, .taps_y = same_y ? 1 : taps
    };
    /* A run begins up to a row before the copy, and ends up to a row after it. */
    size_t copy_pixels = (size_t)row.stride * (height + 2 * MARGIN_PX + 4);
    row.dx = buffer_reserve(
        scratch, width * (14 * sizeof(double) + 7 * sizeof(uint32_t)) + copy_pixels * 4
    );
    if (!row.dx) return -1;
    row.dy = row.dx + width;
    for (int i = 0; i < 4; i++) row.lines[i] = row.dy + width * (1 + 3 * i);
    row.position = (int32_t *)(row.lines[3] + 3 * width);
    row.inside = (uint32_t *)row.position + width;
    for (int i = 0; i < 4; i++) row.gathered[i] = row.inside + width * (1 + i);
    row.pixels = row.gathered[3] + width;
    uint32_t *copy = row.pixels + width + 2 * row.stride;
    pad(image, width, height, copy);
    for (int y = 0; y < height; y++) {
        locate(&row, m, y);
        make_row(&row, copy);
        unpad(row.pixels, width, image + (ptrdiff_t)y * width * 3);
    }
    return 0;
}

int augment(uint8_t *image, int width, int height, const Op *op, Buffer *scratch) {
    int pixels = width * height, bytes = pixels * 3;
    float factor = (float)op->args[0];
    int level = (int)op->args[0];
    switch (op->kind) {
        case OP_NONE:
            return 0;
        case OP_AUTO_CONTRAST:
            auto_contrast(image, pixels);
            return 0;
        case OP_EQUALIZE:
            equalize(image, pixels);
            return 0;
        case OP_INVERT:
            solarize(image, bytes, 0);
            return 0;
        case OP_POSTERIZE:
            posterize(image, bytes, level);
            return 0;
        case OP_SOLARIZE:
            solarize(image, bytes, level);
            return 0;
        case OP_SOLARIZE_ADD:
            solarize_add(image, bytes, level);
            return 0;
        case OP_COLOR:
            color(image, pixels, factor);
            return 0;
        case OP_CONTRAST:
            blend_with_level(image, bytes, mean_luma(image, pixels), factor);
            return 0;
        case OP_BRIGHTNESS:
            blend_with_level(image, bytes, 0, factor);
            return 0;
        case OP_SHARPNESS:
            return sharpness(image, width, height, factor, scratch);
        case OP_AFFINE:
            return affine(image, width, height, op, scratch);
    }
    return -1;
}
