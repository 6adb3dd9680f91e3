/* One pass over a tensor: what recording.kernels asks of it.
 *
 * Every sum is taken in double precision, of float32 and bfloat16 too: no square over- or underflows, and a sum of
 * squares that is not finite says that an element is not. Where that happens the caller looks again with stock ops.
 *
 * One thread: a core reads a tensor that was just made about as fast as memory gives it, and to wake another costs more.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_AVX2 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#endif

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Of which source this is: a library that an older one left behind is not used. */
#ifndef GRADFLOW_SOURCE
#define GRADFLOW_SOURCE 0
#endif
EXPORT const uint32_t gradflow_source = GRADFLOW_SOURCE;

/* What is known of a run of elements. */
typedef struct {
    double sum, square, low, high;
} Moments;

/* Of two runs side by side. */
typedef struct {
    double first, second, both;
} Products;

enum Kind { FLOAT32, FLOAT64, BFLOAT16 };

/* Bytes of an element. */
static const ptrdiff_t SIZES[] = {4, 8, 2};

static inline double value_at(const void *values, ptrdiff_t i, enum Kind kind)
{
    if (kind == FLOAT64)
        return ((const double *)values)[i];
    if (kind == FLOAT32)
        return ((const float *)values)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)values)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline double least(double a, double b) { return b < a ? b : a; }
static inline double most(double a, double b) { return b > a ? b : a; }

static double square_plain(const void *values, ptrdiff_t begin, ptrdiff_t end, enum Kind kind)
{
    double square = 0;
    for (ptrdiff_t i = begin; i < end; i++) {
        double value = value_at(values, i, kind);
        square += value * value;
    }
    return square;
}

static Moments moments_plain(const void *values, ptrdiff_t begin, ptrdiff_t end, enum Kind kind)
{
    Moments found = {0, 0, value_at(values, begin, kind), value_at(values, begin, kind)};
    for (ptrdiff_t i = begin; i < end; i++) {
        double value = value_at(values, i, kind);
        found.sum += value;
        found.square += value * value;
        found.low = least(found.low, value);
        found.high = most(found.high, value);
    }
    return found;
}

static Products products_plain(const void *a, const void *b, ptrdiff_t begin, ptrdiff_t end, enum Kind kind)
{
    Products found = {0, 0, 0};
    for (ptrdiff_t i = begin; i < end; i++) {
        double left = value_at(a, i, kind), right = value_at(b, i, kind);
        found.first += left * left;
        found.second += right * right;
        found.both += left * right;
    }
    return found;
}

#ifdef HAS_AVX2
AVX2 static inline __m256 eight(const void *values, ptrdiff_t i, enum Kind kind)
{
    if (kind == FLOAT32)
        return _mm256_loadu_ps((const float *)values + i);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)values + i));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* Widened from memory: taking a register apart would keep waiting the one unit that can. */
AVX2 static inline __m256d four(const void *values, ptrdiff_t i, enum Kind kind)
{
    if (kind == FLOAT32)
        return _mm256_cvtps_pd(_mm_loadu_ps((const float *)values + i));
    __m128i half = _mm_loadl_epi64((const __m128i *)((const uint16_t *)values + i));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16)));
}

/* Asks for what is read a page later: hardware looks ahead within a page only. Past the end it is a hint of nothing. */
AVX2 static inline void ask_ahead(const void *values, ptrdiff_t i, enum Kind kind)
{
    _mm_prefetch((const char *)((uintptr_t)values + (uintptr_t)(i * SIZES[kind]) + 4096), _MM_HINT_T0);
}

AVX2 static inline __m256d lower(__m256 x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
AVX2 static inline __m256d upper(__m256 x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

AVX2 static inline double total(__m256d x)
{
    double lanes[4];
    _mm256_storeu_pd(lanes, x);
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

AVX2 static inline double square_wide(const void *values, ptrdiff_t n, enum Kind kind)
{
    __m256d q0 = _mm256_setzero_pd(), q1 = q0, q2 = q0, q3 = q0;
    ptrdiff_t i = 0;
    for (; i + 16 <= n; i += 16) {
        ask_ahead(values, i, kind);
        __m256d a = four(values, i, kind), b = four(values, i + 4, kind);
        __m256d c = four(values, i + 8, kind), d = four(values, i + 12, kind);
        q0 = _mm256_fmadd_pd(a, a, q0);
        q1 = _mm256_fmadd_pd(b, b, q1);
        q2 = _mm256_fmadd_pd(c, c, q2);
        q3 = _mm256_fmadd_pd(d, d, q3);
    }
    double square = total(_mm256_add_pd(_mm256_add_pd(q0, q1), _mm256_add_pd(q2, q3)));
    return square + square_plain(values, i, n, kind);
}

AVX2 static inline Moments moments_wide(const void *values, ptrdiff_t n, enum Kind kind)
{
    __m256d s0 = _mm256_setzero_pd(), s1 = s0, s2 = s0, s3 = s0, q0 = s0, q1 = s0, q2 = s0, q3 = s0;
    __m256 low = eight(values, 0, kind), high = low;
    ptrdiff_t i = 0;
    for (; i + 16 <= n; i += 16) {
        ask_ahead(values, i, kind);
        __m256 x = eight(values, i, kind), y = eight(values, i + 8, kind);
        __m256d a = four(values, i, kind), b = four(values, i + 4, kind);
        __m256d c = four(values, i + 8, kind), d = four(values, i + 12, kind);
        s0 = _mm256_add_pd(a, s0);
        s1 = _mm256_add_pd(b, s1);
        s2 = _mm256_add_pd(c, s2);
        s3 = _mm256_add_pd(d, s3);
        q0 = _mm256_fmadd_pd(a, a, q0);
        q1 = _mm256_fmadd_pd(b, b, q1);
        q2 = _mm256_fmadd_pd(c, c, q2);
        q3 = _mm256_fmadd_pd(d, d, q3);
        low = _mm256_min_ps(low, _mm256_min_ps(x, y));
        high = _mm256_max_ps(high, _mm256_max_ps(x, y));
    }
    Moments found = {
        total(_mm256_add_pd(_mm256_add_pd(s0, s1), _mm256_add_pd(s2, s3))),
        total(_mm256_add_pd(_mm256_add_pd(q0, q1), _mm256_add_pd(q2, q3))),
        0,
        0,
    };
    float lows[8], highs[8];
    _mm256_storeu_ps(lows, low);
    _mm256_storeu_ps(highs, high);
    found.low = lows[0];
    found.high = highs[0];
    for (int lane = 1; lane < 8; lane++) {
        found.low = least(found.low, lows[lane]);
        found.high = most(found.high, highs[lane]);
    }
    if (i < n) {
        Moments rest = moments_plain(values, i, n, kind);
        found.sum += rest.sum;
        found.square += rest.square;
        found.low = least(found.low, rest.low);
        found.high = most(found.high, rest.high);
    }
    return found;
}

AVX2 static inline Products products_wide(const void *a, const void *b, ptrdiff_t n, enum Kind kind)
{
    __m256d f0 = _mm256_setzero_pd(), f1 = f0, s0 = f0, s1 = f0, p0 = f0, p1 = f0;
    ptrdiff_t i = 0;
    for (; i + 8 <= n; i += 8) {
        ask_ahead(a, i, kind);
        ask_ahead(b, i, kind);
        __m256d x0 = four(a, i, kind), x1 = four(a, i + 4, kind), y0 = four(b, i, kind), y1 = four(b, i + 4, kind);
        f0 = _mm256_fmadd_pd(x0, x0, f0);
        f1 = _mm256_fmadd_pd(x1, x1, f1);
        s0 = _mm256_fmadd_pd(y0, y0, s0);
        s1 = _mm256_fmadd_pd(y1, y1, s1);
        p0 = _mm256_fmadd_pd(x0, y0, p0);
        p1 = _mm256_fmadd_pd(x1, y1, p1);
    }
    Products rest = products_plain(a, b, i, n, kind);
    Products found = {
        rest.first + total(_mm256_add_pd(f0, f1)),
        rest.second + total(_mm256_add_pd(s0, s1)),
        rest.both + total(_mm256_add_pd(p0, p1)),
    };
    return found;
}

/* One copy a kind, so that no choice is left inside the loops. */
AVX2 static double square_float32(const void *v, ptrdiff_t n) { return square_wide(v, n, FLOAT32); }
AVX2 static double square_bfloat16(const void *v, ptrdiff_t n) { return square_wide(v, n, BFLOAT16); }
AVX2 static Moments moments_float32(const void *v, ptrdiff_t n) { return moments_wide(v, n, FLOAT32); }
AVX2 static Moments moments_bfloat16(const void *v, ptrdiff_t n) { return moments_wide(v, n, BFLOAT16); }
AVX2 static Products products_float32(const void *a, const void *b, ptrdiff_t n)
{
    return products_wide(a, b, n, FLOAT32);
}
AVX2 static Products products_bfloat16(const void *a, const void *b, ptrdiff_t n)
{
    return products_wide(a, b, n, BFLOAT16);
}

static int is_wide(ptrdiff_t n, enum Kind kind)
{
    return n >= 16 && kind != FLOAT64 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

static double square_run(const void *values, ptrdiff_t n, enum Kind kind)
{
#ifdef HAS_AVX2
    if (is_wide(n, kind))
        return kind == FLOAT32 ? square_float32(values, n) : square_bfloat16(values, n);
#endif
    return square_plain(values, 0, n, kind);
}

static Moments moments_run(const void *values, ptrdiff_t n, enum Kind kind)
{
#ifdef HAS_AVX2
    if (is_wide(n, kind))
        return kind == FLOAT32 ? moments_float32(values, n) : moments_bfloat16(values, n);
#endif
    return moments_plain(values, 0, n, kind);
}

static Products products_run(const void *a, const void *b, ptrdiff_t n, enum Kind kind)
{
#ifdef HAS_AVX2
    if (is_wide(n, kind))
        return kind == FLOAT32 ? products_float32(a, b, n) : products_bfloat16(a, b, n);
#endif
    return products_plain(a, b, 0, n, kind);
}

/* Of a unit over the rows. Deviations are from its first value on: exactly 0 where all rows agree. */
typedef struct {
    double origin, sum, square, active, largest;
} Unit;

static Unit unit_of(const void *values, ptrdiff_t rows, ptrdiff_t by_row, enum Kind kind)
{
    Unit unit = {value_at(values, 0, kind), 0, 0, 0, 0};
    for (ptrdiff_t row = 0; row < rows; row++) {
        double value = value_at(values, row * by_row, kind), deviation = value - unit.origin;
        unit.sum += deviation;
        unit.square += deviation * deviation;
        unit.active += value != 0;
        unit.largest = most(unit.largest, fabs(value));
    }
    return unit;
}

#ifdef HAS_AVX2
/* Eight units at once. */
AVX2 static inline void eight_units(const float *values, ptrdiff_t rows, ptrdiff_t by_row, ptrdiff_t by_unit,
                                    Unit units[8])
{
    const __m256i places = _mm256_mullo_epi32(_mm256_set1_epi32((int)by_unit), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    __m256d s0 = _mm256_setzero_pd(), s1 = s0, q0 = s0, q1 = s0, o0 = s0, o1 = s0;
    __m256 active = _mm256_setzero_ps(), largest = active;
    for (ptrdiff_t row = 0; row < rows; row++) {
        const float *here = values + row * by_row;
        __m256 x = by_unit == 1 ? _mm256_loadu_ps(here) : _mm256_i32gather_ps(here, places, 4);
        if (row == 0) {
            o0 = lower(x);
            o1 = upper(x);
        }
        __m256d a = _mm256_sub_pd(lower(x), o0), b = _mm256_sub_pd(upper(x), o1);
        s0 = _mm256_add_pd(s0, a);
        s1 = _mm256_add_pd(s1, b);
        q0 = _mm256_fmadd_pd(a, a, q0);
        q1 = _mm256_fmadd_pd(b, b, q1);
        active = _mm256_add_ps(active, _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ), one));
        largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, x));
    }
    double sum[8], square[8], origin[8];
    float counts[8], sizes[8];
    _mm256_storeu_pd(sum, s0);
    _mm256_storeu_pd(sum + 4, s1);
    _mm256_storeu_pd(square, q0);
    _mm256_storeu_pd(square + 4, q1);
    _mm256_storeu_pd(origin, o0);
    _mm256_storeu_pd(origin + 4, o1);
    _mm256_storeu_ps(counts, active);
    _mm256_storeu_ps(sizes, largest);
    for (int lane = 0; lane < 8; lane++)
        units[lane] = (Unit){origin[lane], sum[lane], square[lane], counts[lane], sizes[lane]};
}

AVX2 static void eight_neighbours(const float *values, ptrdiff_t rows, ptrdiff_t by_row, Unit units[8])
{
    eight_units(values, rows, by_row, 1, units);
}

AVX2 static void eight_apart(const float *values, ptrdiff_t rows, ptrdiff_t by_row, ptrdiff_t by_unit, Unit units[8])
{
    eight_units(values, rows, by_row, by_unit, units);
}
#endif

/* Up to eight units; returns how many. */
static int some_units(const void *values, ptrdiff_t rows, ptrdiff_t by_row, ptrdiff_t left, ptrdiff_t by_unit,
                      enum Kind kind, Unit units[8])
{
#ifdef HAS_AVX2
    /* Counts are kept in single precision, and places in 32 bits. */
    if (left >= 8 && kind == FLOAT32 && rows < 1 << 24 && by_unit < 1 << 24 && is_wide(16, FLOAT32)) {
        if (by_unit == 1)
            eight_neighbours(values, rows, by_row, units);
        else
            eight_apart(values, rows, by_row, by_unit, units);
        return 8;
    }
#endif
    (void)left;
    (void)by_unit;
    units[0] = unit_of(values, rows, by_row, kind);
    return 1;
}

/* The sum of squares of n elements. */
EXPORT double gradflow_square(const void *values, ptrdiff_t n, int kind)
{
    return square_run(values, n, kind);
}

/* Sum, sum of squares, smallest and largest of n >= 1 elements. */
EXPORT void gradflow_moments(const void *values, ptrdiff_t n, int kind, double found[4])
{
    Moments moments = moments_run(values, n, kind);
    memcpy(found, &moments, sizeof moments);
}

/* The sums of squares of two runs of n elements, and of their products. */
EXPORT void gradflow_products(const void *a, const void *b, ptrdiff_t n, int kind, double found[3])
{
    Products products = products_run(a, b, n, kind);
    memcpy(found, &products, sizeof products);
}

/* The same of each pair of rows: found holds all first, then all second, then all products. */
EXPORT void gradflow_row_products(const void *a, ptrdiff_t by_row_a, const void *b, ptrdiff_t by_row_b, ptrdiff_t rows,
                                  ptrdiff_t n, int kind, double found[])
{
    for (ptrdiff_t row = 0; row < rows; row++) {
        Products products = products_run((const char *)a + row * by_row_a * SIZES[kind],
                                         (const char *)b + row * by_row_b * SIZES[kind], n, kind);
        found[row] = products.first;
        found[rows + row] = products.second;
        found[2 * rows + row] = products.both;
    }
}

/* The sums of squares of many tensors. */
EXPORT void gradflow_squares(const void *const values[], const ptrdiff_t n[], const int kinds[], ptrdiff_t count,
                             double found[])
{
    for (ptrdiff_t i = 0; i < count; i++)
        found[i] = square_run(values[i], n[i], kinds[i]);
}

/* A matrix of rows (samples) and units, strides counted in elements.
 *
 * found: the mean; the variance over rows, averaged over units; the variance over units of their means; the mean square
 * of those means; the largest magnitude; how many elements are not 0. Of each unit: in how many rows it is not 0, and
 * whether its mean is more than `depth` of its standard deviations below 0; NULL asks for neither.
 */
EXPORT void gradflow_units(const void *values, ptrdiff_t rows, ptrdiff_t by_row, ptrdiff_t units, ptrdiff_t by_unit,
                           int kind, double depth, double found[6], float active[], unsigned char sunk[])
{
    double sum = 0, within = 0, common = 0, largest = 0, nonzero = 0;
    Unit some[8];
    for (ptrdiff_t at = 0, count; at < units; at += count) {
        count = some_units((const char *)values + at * by_unit * SIZES[kind], rows, by_row, units - at, by_unit, kind,
                           some);
        for (ptrdiff_t i = 0; i < count; i++) {
            double shift = some[i].sum / rows, variance = some[i].square / rows - shift * shift;
            double mean = some[i].origin + shift;
            variance = variance > 0 ? variance : 0;
            sum += mean;
            within += variance;
            common += mean * mean;
            largest = most(largest, some[i].largest);
            nonzero += some[i].active;
            if (active != NULL) {
                active[at + i] = (float)some[i].active;
                sunk[at + i] = mean < 0 && mean * mean > depth * depth * variance;
            }
        }
    }
    double mean = sum / units, spread = common / units - mean * mean;
    found[0] = mean;
    found[1] = within / units;
    found[2] = spread > 0 ? spread : 0;
    found[3] = common / units;
    found[4] = largest;
    found[5] = nonzero;
}

/* How the tensors of one shape are surveyed: kernels.Survey in Python. */
typedef struct {
    ptrdiff_t n, offset, rows, by_row, units, by_unit;
    double depth;
    int kind, sampled;
} Survey;

/* Of a tensor without gaps: the six numbers of its matrix, or of a sample of it, which alone says nothing of its sum, sum
 * of squares, smallest and largest: they follow. Returns whether all that was read is finite.
 */
EXPORT int gradflow_survey(const void *values, const Survey *how, double found[10], float active[], unsigned char sunk[])
{
    found[7] = 0;
    if (how->sampled)
        gradflow_moments(values, how->n, how->kind, found + 6);
    gradflow_units((const char *)values + how->offset * SIZES[how->kind], how->rows, how->by_row, how->units,
                   how->by_unit, how->kind, how->depth, found, active, sunk);
    return isfinite(found[1] + found[3] + found[7]);
}

/* Where the pre-activations of a rectifier lie, [outer, units, inner]: kernels.Grid in Python. */
typedef struct {
    ptrdiff_t offset, outer, by_outer, units, by_unit, inner, by_inner;
    double depth, least;
    int kind, asks_sunk;
} Grid;

/* Of some units that are read side by side. */
enum { SIDE_BY_SIDE = 16 };
typedef struct {
    int32_t active[SIDE_BY_SIDE];
    double sum[SIDE_BY_SIDE], square[SIDE_BY_SIDE];
} Units;

static inline void add_units(const void *values, const Grid *grid, ptrdiff_t count, enum Kind kind, Units *units)
{
    for (ptrdiff_t outer = 0; outer < grid->outer; outer++)
        for (ptrdiff_t inner = 0; inner < grid->inner; inner++) {
            ptrdiff_t place = outer * grid->by_outer + inner * grid->by_inner;
            for (ptrdiff_t i = 0; i < count; i++) {
                double value = value_at(values, place + i * grid->by_unit, kind);
                units->active[i] += value > 0;
                if (grid->asks_sunk) {
                    units->sum[i] += value;
                    units->square[i] += value * value;
                }
            }
        }
}

static void count_units(const void *values, const Grid *grid, ptrdiff_t count, Units *units)
{
    memset(units, 0, sizeof *units);
    if (grid->kind == FLOAT32)
        add_units(values, grid, count, FLOAT32, units);
    else
        add_units(values, grid, count, grid->kind, units);
}

/* Observations that are not padding: there all units are exactly 0. */
static double observations(const void *values, const Grid *grid)
{
    double seen = 0;
    for (ptrdiff_t outer = 0; outer < grid->outer; outer++)
        for (ptrdiff_t inner = 0; inner < grid->inner; inner++) {
            ptrdiff_t place = outer * grid->by_outer + inner * grid->by_inner, unit = 0;
            while (unit < grid->units && value_at(values, place + unit * grid->by_unit, grid->kind) == 0)
                unit++;
            seen += unit < grid->units;
        }
    return seen;
}

/* Shares of inactive, of always active and of sunk units, and how many observations count; see activations.py. */
EXPORT void gradflow_rectifier(const void *values, const Grid *grid, double found[4])
{
    const char *start = (const char *)values + grid->offset * SIZES[grid->kind];
    double seen = most(observations(start, grid), 1), total = (double)grid->outer * (double)grid->inner;
    /* Rounded as stock ops round them: whether 3 of 300 are less than 1% is no matter of taste. */
    double few = grid->kind == FLOAT64 ? grid->least * seen : (float)grid->least * (float)seen;
    double many = grid->kind == FLOAT64 ? (1 - grid->least) * seen : (float)(1 - grid->least) * (float)seen;
    double inactive = 0, always = 0, sunk = 0;
    Units units;
    for (ptrdiff_t at = 0; at < grid->units; at += SIDE_BY_SIDE) {
        ptrdiff_t count = grid->units - at < SIDE_BY_SIDE ? grid->units - at : SIDE_BY_SIDE;
        count_units(start + at * grid->by_unit * SIZES[grid->kind], grid, count, &units);
        for (ptrdiff_t i = 0; i < count; i++) {
            double mean = units.sum[i] / total, variance = units.square[i] / total - mean * mean;
            inactive += units.active[i] < few;
            always += units.active[i] > many;
            sunk += units.active[i] == 0 && mean < -grid->depth * sqrt(variance < 0 ? 0 : variance);
        }
    }
    found[0] = inactive / (double)grid->units;
    found[1] = always / (double)grid->units;
    found[2] = grid->asks_sunk ? sunk / (double)grid->units : NAN;
    found[3] = seen;
}
