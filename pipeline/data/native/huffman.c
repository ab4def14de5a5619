/* Huffman decoding of baseline JPEG, where libjpeg-turbo spends three quarters of its time. Bits come
   from a copy of the scan without stuffed bytes, eight bytes at a time and without asking how many
   are left, and one look-up gives run and value of most coefficients. */
#include "huffman.h"

#include <string.h>

#include <jpegint.h>

/* An MCU of at most ten blocks cannot read further than this past the end. */
#define PADDING_BYTES 4096
#define END_OF_BLOCK 128 /* the run that ends a block; valid data never has another above 15 */

/* An entry of the look-up is value << 16 | run << 8 | bits; or, where the value needs more bits than
   were looked at, symbol << 16 | INCOMPLETE | bits of the code; or INCOMPLETE alone for a longer code. */
#define INCOMPLETE 0x80
#define BITS 0x3f

static const uint8_t NATURAL_ORDER[BLOCK_COEFFICIENTS + END_OF_BLOCK] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    [64 ... BLOCK_COEFFICIENTS + END_OF_BLOCK - 1] = 63
};

/* The value of `size` bits at the top of `bits`. When the first of them is 0 it is negative (JPEG
   standard, figure F.12); there is no guessing that, so no branch. */
static ALWAYS_INLINE int first_value(uint64_t bits, int size) {
    int if_negative = (int)(~bits >> 63) * (1 - (1 << size));
    return (int)(bits >> 1 >> (63 - size)) + if_negative;
}

static uint32_t lookup_entry(int symbol, int code_bits, int rest, int rest_bits, int is_ac) {
    int run = symbol >> 4, size = symbol & 15;
    if (size > rest_bits) return (uint32_t)symbol << 16 | INCOMPLETE | code_bits;
    if (size == 0 && run != 15 && is_ac) run = END_OF_BLOCK;
    int value = first_value((uint64_t)rest << 1 << (63 - rest_bits), size);
    return (uint32_t)value << 16 | run << 8 | (code_bits + size);
}

static void make_table(HuffmanTable *table, const JHUFF_TBL *source, int is_ac) {
    if (!memcmp(table->source.bits, source->bits, sizeof(source->bits)) &&
        !memcmp(table->source.huffval, source->huffval, sizeof(source->huffval)))
        return;
    table->source = *source;
    for (int i = 0; i < 1 << LOOKUP_BITS; i++) table->lookup[i] = INCOMPLETE;
    int code = 0, index = 0;
    for (int length = 1; length <= 16; length++) {
        table->value_offset[length] = index - code;
        for (int i = 0; i < source->bits[length]; i++, code++, index++) {
            int rest_bits = LOOKUP_BITS - length;
            for (int rest = 0; rest_bits >= 0 && rest < 1 << rest_bits; rest++)
                table->lookup[code << rest_bits | rest] =
                    lookup_entry(source->huffval[index], length, rest, rest_bits, is_ac);
        }
        table->end_code[length] = code << (16 - length);
        code <<= 1;
    }
    table->end_code[17] = INT32_MAX;
}

/* Copies the scan up to its first marker, FF 00 becoming FF. */
static int copy_scan(HuffmanScan *scan, const uint8_t *from, size_t size_bytes) {
    uint8_t *to = buffer_reserve(&scan->bytes, size_bytes + PADDING_BYTES);
    if (!to) return -1;
    scan->next = to;
    scan->marker = 0;
    const uint8_t *end = from + size_bytes;
    while (from < end) {
        const uint8_t *marker = memchr(from, 0xff, end - from);
        int stuffed = marker && marker + 1 < end && marker[1] == 0;
        size_t count = (marker ? marker : end) - from + stuffed;
        memcpy(to, from, count);
        to += count;
        if (!stuffed) {
            while (marker && marker < end && *marker == 0xff) marker++; /* fill bytes */
            scan->marker = marker && marker < end ? *marker : 0;
            break;
        }
        from = marker + 2;
    }
    scan->end = to;
    memset(to, 0, PADDING_BYTES);
    return 0;
}

int huffman_begin(j_decompress_ptr info, HuffmanScan *scan) {
    if (info->progressive_mode || info->arith_code || info->inputctl->has_multiple_scans ||
        info->restart_interval)
        return -1;
    for (int i = 0; i < info->comps_in_scan; i++) {
        const jpeg_component_info *component = info->cur_comp_info[i];
        const JHUFF_TBL *dc = info->dc_huff_tbl_ptrs[component->dc_tbl_no];
        const JHUFF_TBL *ac = info->ac_huff_tbl_ptrs[component->ac_tbl_no];
        if (!dc || !ac) return -1;
        make_table(&scan->dc[component->dc_tbl_no], dc, 0);
        make_table(&scan->ac[component->ac_tbl_no], ac, 1);
        scan->last_dc[i] = 0;
    }
    for (int i = 0; i < info->blocks_in_MCU; i++) {
        int component = info->MCU_membership[i];
        scan->blocks[i] = (BlockTables){
            &scan->dc[info->cur_comp_info[component]->dc_tbl_no],
            &scan->ac[info->cur_comp_info[component]->ac_tbl_no], &scan->last_dc[component]
        };
    }
    scan->bits = 0;
    scan->bit_count = 0;
    return copy_scan(scan, info->src->next_input_byte, info->src->bytes_in_buffer);
}

/* Only the lower six bits of `count` are meant, so that a whole entry can be subtracted from it. */
typedef struct {
    const uint8_t *next;
    uint64_t bits;
    uint32_t count;
} Bits;

/* At least 56 bits from here on. */
static ALWAYS_INLINE void refill(Bits *in) {
    uint64_t bytes;
    uint32_t count = in->count & BITS;
    memcpy(&bytes, in->next, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    bytes = __builtin_bswap64(bytes);
#endif
    in->bits |= bytes >> count;
    in->next += (63 - count) >> 3;
    in->count = count | 56;
}

static ALWAYS_INLINE void drop(Bits *in, uint32_t count) {
    in->bits <<= count & BITS;
    in->count -= count;
}

static ALWAYS_INLINE uint32_t look_up(const Bits *in, const HuffmanTable *table) {
    return table->lookup[in->bits >> (64 - LOOKUP_BITS)];
}

/* Takes a symbol off whose entry is incomplete, and refills. Answers its run, or -1 when there is no
   such code. */
static ALWAYS_INLINE int take_rest(
    Bits *in, const HuffmanTable *table, uint32_t entry, int is_ac, int *value
) {
    int symbol = entry >> 16;
    if (entry & BITS) {
        drop(in, entry);
    } else {
        int code = (int)(in->bits >> 48), length = LOOKUP_BITS + 1;
        while (code >= table->end_code[length]) length++;
        if (length > 16) return -1;
        symbol = table->source.huffval[(code >> (16 - length)) + table->value_offset[length]];
        drop(in, length);
    }
    int run = symbol >> 4, size = symbol & 15;
    *value = first_value(in->bits, size);
    drop(in, size);
    refill(in);
    return is_ac && size == 0 && run != 15 ? END_OF_BLOCK : run;
}

static ALWAYS_INLINE int decode_block(Bits *in, const BlockTables *tables, JCOEF *block) {
    const HuffmanTable *dc = tables->dc, *ac = tables->ac;
    refill(in);
    uint32_t entry = look_up(in, dc);
    int value = (int32_t)entry >> 16;
    if (!(entry & INCOMPLETE))
        drop(in, entry);
    else if (take_rest(in, dc, entry, 0, &value) < 0)
        return -1;
    *tables->last_dc = (int)((unsigned)*tables->last_dc + (unsigned)value);
    block[0] = (JCOEF)*tables->last_dc;

    int k = 1;
    for (;;) {
        refill(in); /* enough for two complete entries, and another symbol of up to 31 bits */
#pragma GCC unroll 3
        for (int i = 0; i < 3; i++) {
            entry = look_up(in, ac);
            if (!(entry & INCOMPLETE)) {
                drop(in, entry);
                k += entry >> 8 & 0xff;
                value = (int32_t)entry >> 16;
            } else {
                int run = take_rest(in, ac, entry, 1, &value);
                if (run < 0) return -1;
                k += run;
            }
            block[NATURAL_ORDER[k++]] = (JCOEF)value;
            if (k >= BLOCK_COEFFICIENTS) return k > BLOCK_COEFFICIENTS && k <= END_OF_BLOCK ? -1 : 0;
        }
    }
}

FOR_EACH_CPU
int huffman_decode_mcu(HuffmanScan *scan, int blocks_in_mcu, JBLOCKROW *blocks) {
    JCOEF ignored[BLOCK_COEFFICIENTS];
    Bits in = {scan->next, scan->bits, scan->bit_count};
    for (int i = 0; i < blocks_in_mcu; i++)
        if (decode_block(&in, &scan->blocks[i], blocks ? *blocks[i] : ignored)) return -1;
    scan->next = in.next;
    scan->bits = in.bits;
    scan->bit_count = in.count & BITS;
    return in.next - (scan->bit_count >> 3) > scan->end ? -1 : 0;
}

int huffman_is_at_end(const HuffmanScan *scan) {
    return scan->marker == JPEG_EOI && scan->next - (scan->bit_count >> 3) == scan->end;
}
