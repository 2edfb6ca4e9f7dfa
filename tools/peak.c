/* What one core can do: `rounds` x 12 independent multiply-adds of a vector, in registers. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));

int lanes(void) { return LANES; }

float peak(long rounds, float factor, float addend) {
    vec sums[12], total = {};
    for (int i = 0; i < 12; i++) sums[i] = (vec){} + (float)i;
    for (long r = 0; r < rounds; r++)
        for (int i = 0; i < 12; i++) sums[i] = sums[i] * factor + addend;
    for (int i = 0; i < 12; i++) total += sums[i];
    return total[0];
}
