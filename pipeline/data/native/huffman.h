/* A faster Huffman decoder for libjpeg's place of it. */
#ifndef PIPELINE_HUFFMAN_H
#define PIPELINE_HUFFMAN_H

#include "native.h"

#include <stdio.h>

#include <jpeglib.h>

#define LOOKUP_BITS 10
#define BLOCK_COEFFICIENTS 64

/* One Huffman table: what the next LOOKUP_BITS bits mean, and what canonical codes need beyond. */
typedef struct {
    JHUFF_TBL source; /* from which it was made, for not making it again for the next file */
    uint32_t lookup[1 << LOOKUP_BITS];
    int32_t end_code[18]; /* one more than the last code of each length, left-aligned to 16 bits */
    int32_t value_offset[18];
} HuffmanTable;

/* What one block of an MCU needs. */
typedef struct {
    const HuffmanTable *dc, *ac;
    int *last_dc;
} BlockTables;

typedef struct {
    Buffer bytes; /* the scan without its stuffing */
    const uint8_t *next, *end;
    int marker; /* that follows the scan; 0 without one */
    uint64_t bits; /* the next bits of the scan, from the highest down */
    uint32_t bit_count;
    int last_dc[MAX_COMPS_IN_SCAN];
    BlockTables blocks[D_MAX_BLOCKS_IN_MCU];
    HuffmanTable dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
} HuffmanScan;

/* To be called between jpeg_start_decompress and the first row. 0 when this file's scan is read from
   `scan`, -1 when it is of another kind and libjpeg goes on alone. */
int huffman_begin(j_decompress_ptr info, HuffmanScan *scan);

/* The coefficients of one MCU into zeroed blocks, or nowhere when `blocks` is NULL. Answers -1 for a
   scan that is damaged: libjpeg has rules for that, so it must decode the file. */
int huffman_decode_mcu(HuffmanScan *scan, int blocks_in_mcu, JBLOCKROW *blocks);

/* Whether nothing is left but padding bits, and the end-of-image marker follows. */
int huffman_is_at_end(const HuffmanScan *scan);

#endif
