/* Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the same
   numbers as numpy.random.Philox(key=key, counter=counter).random_raw(). */
#include "native.h"

#define ROUNDS 10

static void philox4x64(const uint64_t counter[4], const uint64_t key[2], uint64_t out[4]) {
    uint64_t a = counter[0], b = counter[1], c = counter[2], d = counter[3];
    uint64_t k0 = key[0], k1 = key[1];
    for (int i = 0; i < ROUNDS; i++) {
        unsigned __int128 p0 = (unsigned __int128)0xD2E7470EE14C6C93u * a;
        unsigned __int128 p1 = (unsigned __int128)0xCA5A826395121157u * c;
        a = (uint64_t)(p1 >> 64) ^ b ^ k0;
        b = (uint64_t)p1;
        c = (uint64_t)(p0 >> 64) ^ d ^ k1;
        d = (uint64_t)p0;
        k0 += 0x9E3779B97F4A7C15u;
        k1 += 0xBB67AE8584CAA73Bu;
    }
    out[0] = a;
    out[1] = b;
    out[2] = c;
    out[3] = d;
}

/* `blocks` x 4 numbers for each of `n` counters; numpy steps the counter before it draws. */
EXPORT void philox(
    const uint64_t key[2], const uint64_t (*counters)[4], int64_t n, int64_t blocks, uint64_t *out
) {
    for (int64_t i = 0; i < n; i++) {
        uint64_t counter[4] = {counters[i][0], counters[i][1], counters[i][2], counters[i][3]};
        for (int64_t j = 0; j < blocks; j++, out += 4) {
            for (int word = 0; word < 4 && ++counter[word] == 0; word++) {
            }
            philox4x64(counter, key, out);
        }
    }
}
