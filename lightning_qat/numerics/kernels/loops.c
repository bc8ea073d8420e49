/* One loop per tensor for what torch has as several operations; called by loops.py.
 *
 * A tensor is `rows` times `cols` values in the order of memory; a row shares a scale. The numbers
 * are those of torch's operations to the bit: true division, ties to even, NaN stays NaN.
 * Compiled without contraction to fused multiply-adds, which would round once less.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* Defined by build.py:
 * BLOCK, values that one thread takes at a time, few enough for several loops to find them in L1;
 * RUN, values that are summed in float32 before double takes over, and that share bytes of bits. */
#define LANE (RUN / 8) /* see pack_run */
#define GRAIN 32768    /* up to so many values one thread is faster than waking another */

/* Runs the statement for blocks of values [from, to) of row `row`; `block` numbers them. */
#define FOR_BLOCKS(clauses, ...)                                                                   \
    const int64_t per_row = (cols + BLOCK - 1) / BLOCK, blocks = rows * per_row;                   \
    const int team = rows * cols > GRAIN ? threads : 1;                                            \
    PRAGMA(omp parallel for num_threads(team) schedule(static) clauses)                            \
    for (int64_t block = 0; block < blocks; block++) {                                             \
        const int64_t row = block / per_row, start = block % per_row * BLOCK;                      \
        const int64_t from = row * cols + start;                                                   \
        const int64_t to = from + (cols - start < BLOCK ? cols - start : BLOCK);                   \
        __VA_ARGS__                                                                                \
    }
#define PRAGMA(...) _Pragma(#__VA_ARGS__)

static inline float clamped(float value, float low, float high)
{
    value = value < low ? low : value;
    return value > high ? high : value;
}

/* Extremes of values; `nan`: one of them is NaN. */
typedef struct {
    float least, most;
    int nan;
} extremes;

#define NOTHING {INFINITY, -INFINITY, 0}

static inline extremes both(extremes one, extremes other)
{
    return (extremes){one.least < other.least ? one.least : other.least,
                      one.most > other.most ? one.most : other.most, one.nan | other.nan};
}

#pragma omp declare reduction(both : extremes : omp_out = both(omp_out, omp_in))                   \
    initializer(omp_priv = NOTHING)

static inline extremes extremes_of(const float *restrict x, int64_t count)
{
    float least = INFINITY, most = -INFINITY;
    int nan = 0;
    PRAGMA(omp simd reduction(min : least) reduction(max : most) reduction(| : nan))
    for (int64_t i = 0; i < count; i++) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
        nan |= x[i] != x[i];
    }
    return (extremes){least, most, nan};
}

/* (-min, max) of values clamped to `first` and `last`; infinity where one is NaN. */
static inline void give_range(extremes found, float *range, float first, float last)
{
    range[0] = found.nan ? INFINITY : -clamped(found.least, first, last);
    range[1] = found.nan ? INFINITY : clamped(found.most, first, last);
}

/* Bits of RUN values take LANE bytes: value i of a run is bit i / LANE of byte i % LANE, so that
 * whole vectors of flags are packed at once. A last run that is shorter takes as many bytes. There is
 * one row wherever bits are, and blocks are whole runs. */
static inline void pack_run(const float *restrict x, uint8_t *restrict bits, float below,
                            float above)
{
    for (int i = 0; i < LANE; i++) {
        int byte = 0;
        for (int k = 0; k < 8; k++) {
            const float value = x[k * LANE + i];
            byte |= (!((value <= below) | (value >= above))) << k;
        }
        bits[i] = (uint8_t)byte;
    }
}

static inline void pack_between(const float *restrict x, uint8_t *restrict bits, int64_t from,
                                int64_t to, float below, float above)
{
    for (int64_t run = from; run < to; run += RUN) {
        if (to - run >= RUN) {
            pack_run(x + run, bits + run / 8, below, above);
        } else {
            float last[RUN];
            for (int i = 0; i < RUN; i++)
                last[i] = run + i < to ? x[run + i] : below;
            pack_run(last, bits + run / 8, below, above);
        }
    }
}

/* Values on the grid. Where there is room for them, too: the integers `step + zero`; a bit per value,
 * whether it is strictly between `below` and `above`; the range of the values, see give_range. */
void fake_quantize(int64_t rows, int64_t cols, const float *restrict x, float *restrict y,
                   const float *restrict scales, float low, float high, uint8_t *restrict codes,
                   float zero, uint8_t *restrict bits, float below, float above,
                   float *restrict range, float first, float last, int threads)
{
    extremes found = NOTHING;
    FOR_BLOCKS(reduction(both : found), {
        const float scale = scales[row];
        if (codes) {
            for (int64_t i = from; i < to; i++) {
                const float step = clamped(rintf(x[i] / scale), low, high);
                codes[i] = (uint8_t)(int32_t)(step + zero);
                y[i] = step * scale;
            }
        } else {
            for (int64_t i = from; i < to; i++)
                y[i] = clamped(rintf(x[i] / scale), low, high) * scale;
        }
        if (bits)
            pack_between(x, bits, from, to, below, above);
        if (range)
            found = both(found, extremes_of(x + from, to - from));
    })
    if (range)
        give_range(found, range, first, last);
}

/* The range alone; see give_range. */
void value_range(int64_t rows, int64_t cols, const float *restrict x, float *restrict range,
                 float first, float last, int threads)
{
    extremes found = NOTHING;
    FOR_BLOCKS(reduction(both : found), {
        (void)row;
        found = both(found, extremes_of(x + from, to - from));
    })
    give_range(found, range, first, last);
}

/* Minimum and maximum of each row; both NaN where it has one. */
void row_ranges(int64_t rows, int64_t cols, const float *restrict x, float *restrict least,
                float *restrict most, int threads)
{
    const int team = rows * cols > GRAIN ? threads : 1;
    PRAGMA(omp parallel for num_threads(team) schedule(static))
    for (int64_t row = 0; row < rows; row++) {
        const extremes found = extremes_of(x + row * cols, cols);
        least[row] = found.nan ? NAN : found.least;
        most[row] = found.nan ? NAN : found.most;
    }
}

/* The gradients of a learned grid, times `factor`; see learned_fake_quantize.py for the formulas. A value is
 * stopped if its step is outside where BY_STEPS, else if it is not strictly between the edges. What
 * is stopped counts as outside the range, where CLAMPED only what is above. Values beyond the edges
 * count `share`. `sums` has room for three numbers per block, which are
 * added up in their order, so that they are the same on any number of threads. */
enum { BY_EDGES, BY_STEPS, CLAMPED };

#define LEARNED(stopped, outside)                                                                  \
    FOR_BLOCKS(, {                                                                                 \
        const float scale = scales[row];                                                           \
        double inner = 0, beyond = 0, rest = 0;                                                    \
        for (int64_t run = from; run < to; run += RUN) {                                           \
            const int64_t end = run + RUN < to ? run + RUN : to;                                   \
            float a = 0, b = 0, c = 0;                                                             \
            PRAGMA(omp simd reduction(+ : a, b, c))                                                \
            for (int64_t i = run; i < end; i++) {                                                  \
                const float value = x[i], step = rintf(value / scale);                             \
                const float point = clamped(step, low, high) * scale;                              \
                const float passed = (stopped) ? 0.0f : g[i], kept_back = g[i] - passed;           \
                gx[i] = passed;                                                                    \
                a += passed * (point - value);                                                     \
                b += kept_back * point;                                                            \
                c += outside;                                                                      \
            }                                                                                      \
            inner += a;                                                                            \
            beyond += b;                                                                           \
            rest += c;                                                                             \
        }                                                                                          \
        sums[3 * block] = inner;                                                                   \
        sums[3 * block + 1] = beyond;                                                              \
        sums[3 * block + 2] = rest;                                                                \
    })

void learned_backward(int64_t rows, int64_t cols, const float *restrict g,
                      const float *restrict x, float *restrict gx, const float *restrict scales, float low, float high, float below,
                      float above, int mask, double share, double factor,
                      double *restrict sums, float *restrict of_scale, float *restrict of_low,
                      int threads)
{
    if (mask == BY_STEPS) {
        LEARNED((step < low) | (step > high), kept_back)
    } else if (mask == BY_EDGES) {
        LEARNED((value <= below) | (value >= above), kept_back)
    } else {
        LEARNED((value <= below) | (value >= above), value >= above ? g[i] : 0.0f)
    }
    const int64_t per_row = (cols + BLOCK - 1) / BLOCK;
    for (int64_t row = 0; row < rows; row++) {
        double inner = 0, beyond = 0, rest = 0;
        for (const double *sum = sums + 3 * per_row * row; sum < sums + 3 * per_row * (row + 1);
             sum += 3) {
            inner += sum[0];
            beyond += sum[1];
            rest += sum[2];
        }
        of_scale[row] = (float)((inner + share * beyond) / scales[row] * factor);
        of_low[row] = (float)(rest * factor);
    }
}

/* A bit per value: whether it is strictly between two ends. */
void bits_between(int64_t rows, int64_t cols, const float *restrict x, uint8_t *restrict bits,
                  float below, float above, int threads)
{
    FOR_BLOCKS(, { pack_between(x, bits, from, to, below, above); })
}

/* A gradient where its bit is set, zero elsewhere: as integers, which saves a choice per value. */
void masked(int64_t rows, int64_t cols, const uint32_t *restrict g, const uint8_t *restrict bits,
            uint32_t *restrict gx, int threads)
{
    FOR_BLOCKS(, {
        (void)row;
        for (int64_t run = from; run < to; run += RUN) {
            const uint8_t *byte = bits + run / 8;
            for (int k = 0; k < 8; k++) {
                const int64_t lane = run + k * LANE;
                const int64_t count = to - lane < LANE ? to - lane : LANE;
                for (int64_t i = 0; i < count; i++)
                    gx[lane + i] = g[lane + i] & -(uint32_t)(byte[i] >> k & 1);
            }
        }
    })
}

/* The real values of integers. */
void restore(int64_t rows, int64_t cols, const uint8_t *restrict codes, int is_signed,
             float *restrict y, const float *restrict scales, float zero, int threads)
{
    FOR_BLOCKS(, {
        const float scale = scales[row];
        if (is_signed) {
            for (int64_t i = from; i < to; i++)
                y[i] = ((float)(int8_t)codes[i] - zero) * scale;
        } else {
            for (int64_t i = from; i < to; i++)
                y[i] = ((float)codes[i] - zero) * scale;
        }
    })
}
