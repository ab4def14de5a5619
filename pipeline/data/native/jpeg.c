/* JPEG to RGB with the pixels of Pillow: libjpeg-turbo's accurate DCT and fancy upsampling.
   Only what the crop needs is decoded. */
#include "huffman.h"

#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include <jerror.h>
#include <jpegint.h>

/* Fancy upsampling looks at the next chroma sample on either side, but at the edges of the columns
   that jpeg_crop_scanline was asked for it takes them for the edges of the image. */
#define CROP_MARGIN_PX 2
#define ROWS_PER_CALL 16

struct Decoder {
    struct jpeg_decompress_struct info;
    struct jpeg_error_mgr errors;
    jmp_buf on_error;
    HuffmanScan scan;
};

enum { FAILED = 1, DAMAGED_SCAN };

static void raise_error(j_common_ptr info) {
    longjmp(((Decoder *)info->client_data)->on_error, FAILED);
}

static void ignore_message(j_common_ptr info) { (void)info; }

static boolean refuse_to_go_on(j_decompress_ptr info) {
    ERREXIT(info, JERR_INPUT_EOF); /* Pillow refuses a truncated file, libjpeg would paint it grey */
    return FALSE;
}

static boolean decode_mcu(j_decompress_ptr info, JBLOCKROW *blocks) {
    Decoder *decoder = info->client_data;
    if (huffman_decode_mcu(&decoder->scan, info->blocks_in_MCU, blocks))
        longjmp(decoder->on_error, DAMAGED_SCAN);
    return TRUE;
}

Decoder *decoder_create(void) {
    Decoder *decoder = calloc(1, sizeof(Decoder));
    if (!decoder) return NULL;
    decoder->info.err = jpeg_std_error(&decoder->errors);
    decoder->errors.error_exit = raise_error;
    decoder->errors.output_message = ignore_message;
    decoder->info.client_data = decoder;
    return decoder;
}

/* Reads the header, into a libjpeg object that is new: a used one keeps its tables, and a file that lacks one of its own
   would be decoded with those of the file before. */
static void begin(Decoder *decoder, const Source *source) {
    struct jpeg_decompress_struct *info = &decoder->info;
    jpeg_create_decompress(info);
    jpeg_mem_src(info, source->data, source->size_bytes);
    info->src->fill_input_buffer = refuse_to_go_on;
    jpeg_read_header(info, TRUE);
    info->out_color_space = JCS_RGB;
    info->dct_method = JDCT_ISLOW;
}

static int decode(
    Decoder *decoder, const Source *source, const int32_t box[4], Buffer *pixels, View *view,
    char *message, int own_huffman
) {
    struct jpeg_decompress_struct *info = &decoder->info;
    int error = setjmp(decoder->on_error);
    if (error) {
        if (error == FAILED) info->err->format_message((j_common_ptr)info, message);
        jpeg_destroy_decompress(info);
        return error;
    }
    begin(decoder, source);
    if ((int)info->image_width != source->width || (int)info->image_height != source->height) {
        snprintf(
            message, MESSAGE_BYTES, "the JPEG is %ux%u, the file's table says %dx%d",
            info->image_width, info->image_height, source->width, source->height
        );
        jpeg_destroy_decompress(info);
        return FAILED;
    }
    jpeg_start_decompress(info);
    if (own_huffman && !huffman_begin(info, &decoder->scan)) info->entropy->decode_mcu = decode_mcu;

    JDIMENSION left = box[0] > CROP_MARGIN_PX ? box[0] - CROP_MARGIN_PX : 0;
    JDIMENSION right = box[0] + box[2] + CROP_MARGIN_PX;
    if (right > info->output_width) right = info->output_width;
    JDIMENSION width = right - left;
    if (width < info->output_width) jpeg_crop_scanline(info, &left, &width);

    ptrdiff_t stride = (ptrdiff_t)info->output_width * 3;
    uint8_t *rows = buffer_reserve(pixels, (size_t)stride * box[3]);
    if (!rows) {
        snprintf(message, MESSAGE_BYTES, "out of memory");
        jpeg_destroy_decompress(info);
        return FAILED;
    }
    if (box[1] > 0) jpeg_skip_scanlines(info, box[1]);
    for (int done = 0; done < box[3];) {
        JSAMPROW pointers[ROWS_PER_CALL];
        int count = box[3] - done < ROWS_PER_CALL ? box[3] - done : ROWS_PER_CALL;
        for (int i = 0; i < count; i++) pointers[i] = rows + stride * (done + i);
        done += jpeg_read_scanlines(info, pointers, count);
    }
    jpeg_destroy_decompress(info);
    view->pixels = rows + (ptrdiff_t)(box[0] - (int)left) * 3;
    view->stride = stride;
    return 0;
}

/* Reads every bit of the scan by our own decoder, without making pixels. */
static int is_whole_scan(Decoder *decoder) {
    struct jpeg_decompress_struct *info = &decoder->info;
    HuffmanScan *scan = &decoder->scan;
    for (JDIMENSION left = info->MCUs_per_row * info->MCU_rows_in_scan; left > 0; left--)
        if (huffman_decode_mcu(scan, info->blocks_in_MCU, NULL)) return 0;
    return huffman_is_at_end(scan);
}

/* Whether a progressive file's scans brought every bit of every coefficient: libjpeg smooths over what is missing. */
static int has_all_coefficients(const struct jpeg_decompress_struct *info) {
    for (int i = 0; info->progressive_mode && i < info->num_components; i++)
        for (int k = 0; k < BLOCK_COEFFICIENTS; k++)
            if (info->coef_bits[i][k] != 0) return 0;
    return 1;
}

/* 1 for a JPEG that is whole: then every decoder makes the same pixels of it. What a damaged one is taken for differs
   from decoder to decoder, and from version to version. */
int jpeg_is_whole(Decoder *decoder, const Source *source, Buffer *row) {
    struct jpeg_decompress_struct *info = &decoder->info;
    if (setjmp(decoder->on_error)) {
        jpeg_destroy_decompress(info);
        return 0;
    }
    begin(decoder, source);
    int is_whole = (int)info->image_width == source->width && (int)info->image_height == source->height;
    if (is_whole) {
        jpeg_start_decompress(info);
        if (!huffman_begin(info, &decoder->scan)) {
            is_whole = is_whole_scan(decoder);
        } else { /* progressive, or with restart markers: libjpeg says what it finds */
            JSAMPROW pixels = buffer_reserve(row, (size_t)info->output_width * 3);
            while (pixels && info->output_scanline < info->output_height) jpeg_read_scanlines(info, &pixels, 1);
            is_whole = pixels && has_all_coefficients(info);
            if (is_whole) jpeg_finish_decompress(info);
        }
        is_whole = is_whole && info->err->num_warnings == 0;
    }
    jpeg_destroy_decompress(info);
    return is_whole;
}

/* Decodes `box` into `pixels`; `view` is where the box begins in it. */
int decode_jpeg(
    Decoder *decoder, const Source *source, const int32_t box[4], Buffer *pixels, View *view,
    char *message
) {
    int error = decode(decoder, source, box, pixels, view, message, 1);
    if (error == DAMAGED_SCAN) error = decode(decoder, source, box, pixels, view, message, 0);
    return error ? -1 : 0;
}
