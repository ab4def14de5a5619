/* What the C files share. Images are packed 8-bit RGB rows, as Pillow's "RGB" and numpy (H, W, 3). */
#ifndef PIPELINE_NATIVE_H
#define PIPELINE_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define MESSAGE_BYTES 256
#define OPS_PER_SAMPLE 2

/* Compiled for three generations of x86-64 and chosen when the library is loaded: before a sanitizer is ready for it. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FOR_EACH_CPU
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EACH_CPU
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* A RandAugment operation. `args` is the affine matrix, or the factor, level or bits in args[0]. */
enum {
    OP_NONE,
    OP_AUTO_CONTRAST,
    OP_EQUALIZE,
    OP_INVERT,
    OP_POSTERIZE,
    OP_SOLARIZE,
    OP_SOLARIZE_ADD,
    OP_COLOR,
    OP_CONTRAST,
    OP_BRIGHTNESS,
    OP_SHARPNESS,
    OP_AFFINE
};

typedef struct {
    int32_t kind;
    int32_t cubic; /* an affine operation's filter: 0 bilinear, 1 bicubic */
    double args[6];
} Op;

/* Crop `box` (left, top, width, height), resize it to `resized` (width, height), and keep the output
   whose top left corner lies at `offset` (left, top) of the resized image; outside of it is black. */
typedef struct {
    int32_t box[4];
    int32_t resized[2];
    int32_t offset[2];
    int32_t cubic;
    int32_t flip;
    Op ops[OPS_PER_SAMPLE];
} Plan;

/* Where a sample's bytes are: a JPEG file, or width * height * 3 bytes when `raw`. */
typedef struct {
    const uint8_t *data;
    uint64_t size_bytes;
    int32_t width, height;
    int32_t raw;
    int32_t padding;
} Source;

/* Memory that grows to the largest request and is reused. */
typedef struct {
    void *data;
    size_t size_bytes;
} Buffer;

void *buffer_reserve(Buffer *buffer, size_t size_bytes); /* NULL when there is no memory */
void buffer_free(Buffer *buffer);

/* Pixels somewhere in memory: `stride` bytes from one row to the next. */
typedef struct {
    const uint8_t *pixels;
    ptrdiff_t stride;
} View;

/* jpeg.c: every function answers 0, or -1 with a reason in `message`. */
typedef struct Decoder Decoder;
Decoder *decoder_create(void);
int decode_jpeg(
    Decoder *decoder, const Source *source, const int32_t box[4], Buffer *pixels, View *view,
    char *message
);
int jpeg_is_whole(Decoder *decoder, const Source *source, Buffer *row); /* answers 1 or 0 */

/* resize.c */
typedef struct {
    Buffer weights, spans, lines, between;
} ResizeScratch;
int resize_crop(
    View box_pixels, const Plan *plan, int width, int height, uint8_t *out, ResizeScratch *scratch
);

/* augment.c: in place on a (height, width, 3) image without gaps between rows. */
int augment(uint8_t *image, int width, int height, const Op *op, Buffer *scratch);

#endif
