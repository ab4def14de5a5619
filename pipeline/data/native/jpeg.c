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
    Decoder *volatile decoder = calloc(1, sizeof(Decoder));
    if (!decoder) return NULL;
    decoder->info.err = jpeg_std_error(&decoder->errors);
    decoder->errors.error_exit = raise_error;
    decoder->errors.output_message = ignore_message;
    decoder->info.client_data = decoder;
    if (setjmp(decoder->on_error)) {
        free(decoder);
        return NULL;
    }
    jpeg_create_decompress(&decoder->info);
    return decoder;
}

static int decode(
    Decoder *decoder, const Source *source, const int32_t box[4], Buffer *pixels, View *view,
    char *message, int own_huffman
) {
    struct jpeg_decompress_struct *info = &decoder->info;
    int error = setjmp(decoder->on_error);
    if (error) {
        if (error == FAILED) info->err->format_message((j_common_ptr)info, message);
        jpeg_abort_decompress(info);
        return error;
    }
    jpeg_mem_src(info, source->data, source->size_bytes);
    info->src->fill_input_buffer = refuse_to_go_on;
    jpeg_read_header(info, TRUE);
    if ((int)info->image_width != source->width || (int)info->image_height != source->height) {
        snprintf(
            message, MESSAGE_BYTES, "the JPEG is %ux%u, the file's table says %dx%d",
            info->image_width, info->image_height, source->width, source->height
        );
        jpeg_abort_decompress(info);
        return FAILED;
    }
    info->out_color_space = JCS_RGB;
    info->dct_method = JDCT_ISLOW;
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
        jpeg_abort_decompress(info);
        return FAILED;
    }
    if (box[1] > 0) jpeg_skip_scanlines(info, box[1]);
    for (int done = 0; done < box[3];) {
        JSAMPROW pointers[ROWS_PER_CALL];
        int count = box[3] - done < ROWS_PER_CALL ? box[3] - done : ROWS_PER_CALL;
        for (int i = 0; i < count; i++) pointers[i] = rows + stride * (done + i);
        done += jpeg_read_scanlines(info, pointers, count);
    }
    jpeg_abort_decompress(info);
    view->pixels = rows + (ptrdiff_t)(box[0] - (int)left) * 3;
    view->stride = stride;
    return 0;
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
