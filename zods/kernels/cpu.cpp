// The kernels for CPU tensors. combine_, replay_ and fingerprint: the bits of reference.py, in one pass
// over memory. reference.py documents the layouts of the streams and the meaning of every constant.
//
// The compiler vectorises this code. All loops work on rows of 16 lanes (AVX-512: one register;
// AVX2: two; NEON: four). Only the 32 x 32 -> 64 bit products of Philox are written with intrinsics,
// because compilers emulate a 64 x 64 bit product. The code must be compiled with
// -ffp-contract=off. Every fused multiply-add of reference.py is explicit.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;
constexpr int kRounds = 10;
// Elements computed at a time: a multiple of every stream's group, and 8 KB, which stay in L1.
constexpr int kTile = 2048;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kGaussianStream = 0, kRademacherStream = 1, kRoundingStream = 2;
constexpr uint32_t kSignBit = 0x80000000u;

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

struct PhiloxKey {
  uint32_t k0[kRounds], k1[kRounds];

  explicit PhiloxKey(uint64_t seed) {
    for (uint32_t round = 0; round < kRounds; ++round) {
      k0[round] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
      k1[round] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    }
  }
};

using Words = uint32_t[4][kLanes];

#if defined(__AVX2__)
#if defined(__AVX512F__)
typedef uint64_t Wide __attribute__((vector_size(64)));
inline Wide multiply_low_halves(Wide a, Wide b) { return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#else
typedef uint64_t Wide __attribute__((vector_size(32)));
inline Wide multiply_low_halves(Wide a, Wide b) { return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#endif

// Each 64-bit lane holds one block's word in its low half. The high halves are not read until the
// even and the odd blocks are merged at the end, so that no product needs a shuffle.
inline void philox(uint64_t first_block, uint32_t parameter, uint32_t stream, const PhiloxKey& key, Words words) {
  constexpr int kWide = sizeof(Wide) / sizeof(uint64_t);
  const Wide zero = {};
  Wide even_lanes;
  for (int i = 0; i < kWide; ++i) even_lanes[i] = 2 * i;
  for (int base = 0; base < kLanes; base += 2 * kWide) {
    Wide c[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      c[odd][0] = even_lanes + (first_block + base + odd);
      c[odd][1] = zero + (first_block >> 32);
      c[odd][2] = zero + parameter;
      c[odd][3] = zero + stream;
    }
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; ++round) {
      for (int odd = 0; odd < 2; ++odd) {
        const Wide p0 = multiply_low_halves(c[odd][0], zero + kPhiloxM0);
        const Wide p1 = multiply_low_halves(c[odd][2], zero + kPhiloxM1);
        c[odd][0] = (p1 >> 32) ^ c[odd][1] ^ static_cast<uint64_t>(key.k0[round]);
        c[odd][1] = p1;
        c[odd][2] = (p0 >> 32) ^ c[odd][3] ^ static_cast<uint64_t>(key.k1[round]);
        c[odd][3] = p0;
      }
    }
    for (int word = 0; word < 4; ++word) {
      const Wide both = (c[0][word] & (zero + 0xFFFFFFFFu)) | (c[1][word] << 32);
      std::memcpy(&words[word][base], &both, sizeof both);
    }
  }
}
#else
inline void philox(uint64_t first_block, uint32_t parameter, uint32_t stream, const PhiloxKey& key, Words words) {
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane) {
    // A group's first block is a multiple of 16: adding the lane never carries into the high half.
    uint32_t c0 = static_cast<uint32_t>(first_block) + lane, c1 = static_cast<uint32_t>(first_block >> 32);
    uint32_t c2 = parameter, c3 = stream;
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * kPhiloxM0, p1 = static_cast<uint64_t>(c2) * kPhiloxM1;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key.k0[round];
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key.k1[round];
      c3 = static_cast<uint32_t>(p0);
    }
    words[0][lane] = c0, words[1][lane] = c1, words[2][lane] = c2, words[3][lane] = c3;
  }
}
#endif

template <int N>
inline float polynomial(const float (&coefficients)[N], float x) {
  float value = coefficients[0];
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) value = fma(value, x, coefficients[i]);
  return value;
}

constexpr float kLog[] = {-0x1.654488p-3f, 0x1.263BA2p-2f,  -0x1.3238FP-2f, 0x1.5332A4p-2f, -0x1.98B748p-2f,
                          0x1.00057p-1f,   -0x1.555792p-1f, 0x1.FFFFF8p-1f, -2.0f};
constexpr float kSin[] = {-0x1.2D9BB8p-15f, 0x1.465EC6p-9f, -0x1.4ABBBAp-4f, 0x1.921FB6p-1f};
constexpr float kCos[] = {-0x1.4E5ED6p-12f, 0x1.03AF5Cp-6f, -0x1.3BD392p-2f, 1.0f};
constexpr float kMinus2Log2 = -0x1.62E43p0f;
constexpr uint32_t kSqrtHalfBits = 0x3F3504F3u;

inline void box_muller(uint32_t radius_word, uint32_t angle_word, float& x, float& y) {
  const float distance = fma(static_cast<float>(static_cast<int32_t>(radius_word)), 0x1p-32f, 0x1p-33f);
  const float u = distance < 0 ? distance + 1.0f : distance;
  const uint32_t bits = as_bits(u) - kSqrtHalfBits;
  const int32_t exponent = static_cast<int32_t>(bits) >> 23;
  const float m = as_float((bits & 0x7FFFFFu) + kSqrtHalfBits);
  const float f = exponent == 0 ? distance : m - 1.0f;
  float r = std::sqrt(fma(static_cast<float>(exponent), kMinus2Log2, f * polynomial(kLog, f)));
  r = as_float(as_bits(r) | (angle_word & kSignBit));

  const float a = static_cast<float>(static_cast<int32_t>(angle_word << 2)) * 0x1p-31f;
  const float square = a * a;
  const float sine = polynomial(kSin, square) * a, cosine = polynomial(kCos, square);
  const bool reflected = angle_word & 0x40000000u;
  x = r * (reflected ? sine : cosine);
  y = r * (reflected ? cosine : sine);
}

// acc[i] += coefficient * z(start + i) for first <= i < last, widened to whole groups. With kMirror
// also mirrored[i] -= coefficient * z(start + i). `start` is a multiple of kTile.
template <bool kMirror>
void add_gaussian(float* acc, float* mirrored, uint64_t start, int first, int last, uint32_t parameter,
                  const PhiloxKey& key, float coefficient) {
  constexpr int kGroup = 64;
  for (int base = first / kGroup * kGroup; base < last; base += kGroup) {
    Words words;
    philox((start + base) / kGroup * kLanes, parameter, kGaussianStream, key, words);
    for (int pair = 0; pair < 2; ++pair) {
      const int at = base + 2 * pair * kLanes;
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) {
        float x, y;
        box_muller(words[2 * pair][lane], words[2 * pair + 1][lane], x, y);
        acc[at + lane] = fma(coefficient, x, acc[at + lane]);
        acc[at + kLanes + lane] = fma(coefficient, y, acc[at + kLanes + lane]);
        if (kMirror) {
          mirrored[at + lane] = fma(-coefficient, x, mirrored[at + lane]);
          mirrored[at + kLanes + lane] = fma(-coefficient, y, mirrored[at + kLanes + lane]);
        }
      }
    }
  }
}

// The same for Rademacher directions; the tile is one group. fma(coefficient, +-1, acc) equals
// acc + (+-coefficient). Not inlined: inlined into sweep_tile, gcc 12 makes it a fifth slower.
template <bool kMirror>
__attribute__((noinline)) void add_rademacher(float* acc, float* mirrored, uint64_t start, uint32_t parameter, const PhiloxKey& key,
                    float coefficient) {
  Words words;
  philox(start / kTile * kLanes, parameter, kRademacherStream, key, words);
  const uint32_t coefficient_bits = as_bits(coefficient);
  for (int row = 0; row < kTile / kLanes; ++row) {
    const uint32_t* word = words[row / 32];
    const int shift = 31 - row % 32;
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float addend = as_float(coefficient_bits ^ ((word[lane] << shift) & kSignBit));
      acc[row * kLanes + lane] += addend;
      if (kMirror) mirrored[row * kLanes + lane] -= addend;
    }
  }
}

// noise[i] = the 16 random bits of element start + i, for first <= i < last, widened to whole groups.
void make_noise(uint16_t* noise, uint64_t start, int first, int last, uint32_t parameter, const PhiloxKey& key) {
  constexpr int kGroup = 128;
  for (int base = first / kGroup * kGroup; base < last; base += kGroup) {
    Words words;
    philox((start + base) / kGroup * kLanes, parameter, kRoundingStream, key, words);
    for (int word = 0; word < 4; ++word) {
      uint16_t* low = noise + base + 2 * word * kLanes;
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) {
        low[lane] = static_cast<uint16_t>(words[word][lane]);
        low[kLanes + lane] = static_cast<uint16_t>(words[word][lane] >> 16);
      }
    }
  }
}

// acc[i] += sum_q scales[q] values[q * stride + i], one q after the other. Four q at a time, so that acc
// is read and written once for them.
inline void add_multiples(float* acc, const float* scales, const float* values, int64_t num, int64_t stride,
                          int count) {
  int64_t q = 0;
  for (; q + 4 <= num; q += 4) {
    const float s0 = scales[q], s1 = scales[q + 1], s2 = scales[q + 2], s3 = scales[q + 3];
    const float *v0 = values + q * stride, *v1 = v0 + stride, *v2 = v1 + stride, *v3 = v2 + stride;
#pragma omp simd
    for (int i = 0; i < count; ++i) acc[i] = fma(s3, v3[i], fma(s2, v2[i], fma(s1, v1[i], fma(s0, v0[i], acc[i]))));
  }
  for (; q < num; ++q) {
    const float scale = scales[q];
    const float* one = values + q * stride;
#pragma omp simd
    for (int i = 0; i < count; ++i) acc[i] = fma(scale, one[i], acc[i]);
  }
}

// acc[i] += sum_q left[row, q] right[q, column] for the element start + i of a matrix with
// `num_columns` columns, for first <= i < last. Row 0 of `left` is the matrix's row `first_row`.
void add_factors(float* acc, uint64_t start, int first, int last, const float* left, const float* right,
                 int num_factors, int64_t num_columns, int64_t first_row) {
  for (int i = first; i < last;) {
    const int64_t row = (start + i) / num_columns, column = (start + i) % num_columns;
    const int count = static_cast<int>(std::min<int64_t>(last - i, num_columns - column));
    add_multiples(acc + i, left + (row - first_row) * num_factors, right + column, num_factors, num_columns, count);
    i += count;
  }
}

inline float widen(float value) { return value; }
inline float widen(uint16_t bfloat16) { return as_float(static_cast<uint32_t>(bfloat16) << 16); }

inline uint32_t nearest_increment(uint32_t bits) { return 0x7FFFu + (bits >> 16 & 1u); }

inline uint16_t to_bfloat16(uint32_t bits, uint32_t increment) {
  const uint32_t rounded = (bits & ~kSignBit) > 0x7F800000u ? 0x7FC0u : (bits + increment) >> 16;
  return static_cast<uint16_t>(rounded);
}

// Round a float32 to T. noise: random bits of each element for stochastic rounding; null: round to
// nearest even.
template <typename T>
inline T round_to(float value, const uint16_t* noise, int i) {
  if constexpr (std::is_same_v<T, float>) return value;
  const uint32_t bits = as_bits(value);
  const bool has_upper_neighbour = (bits & ~kSignBit) <= 0x7F7F0000u;
  return to_bfloat16(bits, noise != nullptr && has_upper_neighbour ? noise[i] : nearest_increment(bits));
}

template <typename T>
void add_scaled(float* acc, const T* values, float scale, int count) {
#pragma omp simd
  for (int i = 0; i < count; ++i) acc[i] = fma(scale, widen(values[i]), acc[i]);
}

// out[i] = sum[i] + scale * weight[i], or with kNegate -sum[i] + scale * weight[i], rounded to T.
// No sum is -0, because it started at 0.
template <bool kNegate, typename T>
void store(T* out, const float* sum, const T* weight, float scale, const uint16_t* noise, int count) {
  const auto each = [&](auto value) {
    if (noise == nullptr) {
#pragma omp simd
      for (int i = 0; i < count; ++i) out[i] = round_to<T>(value(i), nullptr, i);
    } else {
#pragma omp simd
      for (int i = 0; i < count; ++i) out[i] = round_to<T>(value(i), noise, i);
    }
  };
  const auto signed_sum = [&](int i) { return kNegate ? 0.0f - sum[i] : sum[i]; };
  if (weight == nullptr) each(signed_sum);
  else each([&](int i) { return fma(scale, widen(weight[i]), signed_sum(i)); });
}

// Data that all sweeps over one slice share: the slice's tensors, its range in the whole parameter,
// and the shape of the factors.
template <typename T>
struct Slice {
  T *out, *mirror;
  const T *weight, *dense;
  bool rademacher;
  uint32_t parameter;
  uint64_t offset, stop;
  int num_factors;
  int64_t num_columns;
};

struct Sweep {
  float scale;
  const PhiloxKey* keys;
  const float* coefficients;
  size_t num_terms;
  const float *left, *right;
  std::optional<float> dense_coefficient;  // none: `dense` is not read, even if not finite
  std::optional<uint64_t> rounding_seed;
};

template <typename T>
void sweep_tile(const Slice<T>& slice, const Sweep& sweep, uint64_t start) {
  alignas(64) float acc[kTile], mirrored[kTile];
  alignas(64) uint16_t noise[kTile];
  const int first = static_cast<int>(std::max(slice.offset, start) - start);
  const int last = static_cast<int>(std::min<uint64_t>(slice.stop - start, kTile));
  const int count = last - first;
  const int64_t at = static_cast<int64_t>(start + first - slice.offset);

  const auto add_term = [&](auto mirror_too, size_t k) {
    constexpr bool kMirror = decltype(mirror_too)::value;
    const PhiloxKey& key = sweep.keys[k];
    const float coefficient = sweep.coefficients[k];
    if (slice.rademacher) add_rademacher<kMirror>(acc, mirrored, start, slice.parameter, key, coefficient);
    else add_gaussian<kMirror>(acc, mirrored, start, first, last, slice.parameter, key, coefficient);
  };
  const auto add_matrices = [&](float* sum) {
    if (slice.num_factors)
      add_factors(sum, start, first, last, sweep.left, sweep.right, slice.num_factors, slice.num_columns,
                  slice.offset / slice.num_columns);
    if (sweep.dense_coefficient) add_scaled(sum + first, slice.dense + at, *sweep.dense_coefficient, count);
  };
  const auto finish = [&](auto negate, T* to, const float* sum) {
    store<decltype(negate)::value>(to + at, sum + first, slice.weight == nullptr ? nullptr : slice.weight + at,
                                   sweep.scale, sweep.rounding_seed ? noise + first : nullptr, count);
  };

  std::fill(acc, acc + kTile, 0.0f);
  if (sweep.rounding_seed) make_noise(noise, start, first, last, slice.parameter, PhiloxKey(*sweep.rounding_seed));
  const bool mirroring = slice.mirror != nullptr;
  const bool opposite = mirroring && sweep.num_terms == 1 && !slice.num_factors && !sweep.dense_coefficient;
  const size_t num_common = sweep.num_terms - (mirroring && !opposite);
  for (size_t k = 0; k < num_common; ++k) add_term(std::false_type(), k);
  if (opposite) {
    finish(std::true_type(), slice.mirror, acc);
  } else if (mirroring) {
    std::copy(acc, acc + kTile, mirrored);
    add_term(std::true_type(), num_common);
    add_matrices(mirrored);
    finish(std::false_type(), slice.mirror, mirrored);
  }
  add_matrices(acc);
  finish(std::false_type(), slice.out, acc);
}

// Apply all sweeps to one slice, tile by tile, so that a tile stays in L1 for all sweeps. The terms
// of all sweeps are concatenated. The factors are stacked: (sweeps, num_rows, num_factors) and
// (sweeps, num_factors, num_columns).
template <typename T>
void combine(uintptr_t out_address, uintptr_t mirror_address, uintptr_t weight_address, uintptr_t dense_address,
             const std::vector<float>& scales, const std::vector<size_t>& num_terms,
             const std::vector<uint64_t>& seeds, const std::vector<float>& coefficients,
             const std::vector<std::optional<float>>& dense_coefficients,
             const std::vector<std::optional<uint64_t>>& rounding_seeds,
             bool rademacher, uint32_t parameter, uint64_t offset, uintptr_t left_address, uintptr_t right_address,
             int64_t num_rows, int num_factors, int64_t num_columns, int64_t numel, int num_threads) {
  const Slice<T> slice{reinterpret_cast<T*>(out_address),          reinterpret_cast<T*>(mirror_address),
                       reinterpret_cast<const T*>(weight_address), reinterpret_cast<const T*>(dense_address),
                       rademacher, parameter, offset, offset + numel, num_factors, num_columns};
  const std::vector<PhiloxKey> keys(seeds.begin(), seeds.end());
  std::vector<Sweep> sweeps;
  size_t term = 0;
  for (size_t s = 0; s < scales.size(); ++s) {
    sweeps.push_back({scales[s], keys.data() + term, coefficients.data() + term, num_terms[s],
                      reinterpret_cast<const float*>(left_address) + s * num_rows * num_factors,
                      reinterpret_cast<const float*>(right_address) + s * num_factors * num_columns,
                      dense_coefficients[s], rounding_seeds[s]});
    term += num_terms[s];
  }
  const int64_t first_tile = offset / kTile, stop_tile = (slice.stop + kTile - 1) / kTile;

  // Tiles lie on a grid of the whole parameter, not of this slice: the results do not depend on the
  // number of threads, nor on the split into slices.
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t tile = first_tile; tile < stop_tile; ++tile)
    for (const Sweep& sweep : sweeps) sweep_tile(slice, sweep, static_cast<uint64_t>(tile) * kTile);
}

// zods.kernels.directions: out[k][i] = z(seeds[k], parameter, offset + i).
void directions(uintptr_t out_address, const std::vector<uint64_t>& seeds, bool rademacher, uint32_t parameter,
                uint64_t offset, int64_t numel, int num_threads) {
  const std::vector<PhiloxKey> keys(seeds.begin(), seeds.end());
  const float one = 1.0f;
  const int64_t first_tile = offset / kTile, stop_tile = (offset + numel + kTile - 1) / kTile;
#pragma omp parallel for collapse(2) schedule(static) num_threads(num_threads)
  for (size_t k = 0; k < keys.size(); ++k)
    for (int64_t tile = first_tile; tile < stop_tile; ++tile) {
      const Slice<float> slice{reinterpret_cast<float*>(out_address) + k * numel, nullptr, nullptr, nullptr,
                               rademacher, parameter, offset, offset + numel, 0, 1};
      sweep_tile(slice, Sweep{1.0f, &keys[k], &one, 1, nullptr, nullptr, std::nullopt, std::nullopt},
                 static_cast<uint64_t>(tile) * kTile);
    }
}

// zods.kernels.fingerprint; T is an unsigned integer of the elements' size.
template <typename T>
uint64_t fingerprint(uintptr_t address, uint64_t offset, int64_t numel, int num_threads) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
  const T* const values = reinterpret_cast<const T*>(address);
  uint64_t total = 0;
#pragma omp parallel for simd schedule(static) num_threads(num_threads) reduction(+ : total)
  for (int64_t i = 0; i < numel; ++i) {
    uint64_t x = values[i] + (offset + static_cast<uint64_t>(i) + 1) * kGolden;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    total += x ^ (x >> 31);
  }
  return total;
}

// out[r] = sum_i max(0, from[i] - matrix[rows[r]][i]). The float32 values are integers below 2^24, so
// that the sum is exact in any order.
void summed_excess(uintptr_t matrix_address, const std::vector<int64_t>& rows, int64_t num_columns,
                   uintptr_t from_address, uintptr_t out_address, int num_threads) {
  const auto* matrix = reinterpret_cast<const float*>(matrix_address);
  const auto* from = reinterpret_cast<const float*>(from_address);
  auto* out = reinterpret_cast<int64_t*>(out_address);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (size_t r = 0; r < rows.size(); ++r) {
    const float* row = matrix + rows[r] * num_columns;
    int64_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < num_columns; ++i) {
      const float excess = from[i] - row[i];
      total += static_cast<int32_t>(excess > 0.0f ? excess : 0.0f);
    }
    out[r] = total;
  }
}

// A dot product in float32. Its bits depend on the two vectors alone.
template <typename T>
float dot(const T* x, const float* y, int64_t size) {
  constexpr int kSums = 4 * kLanes;  // independent sums hide the latency of a multiply-add
  alignas(64) float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= size; i += kSums) {
#pragma omp simd
    for (int j = 0; j < kSums; ++j) sums[j] = fma(widen(x[i + j]), y[i + j], sums[j]);
  }
  for (int j = 0; i < size; ++i, ++j) sums[j] = fma(widen(x[i]), y[i], sums[j]);
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

// Call work(group, first_row, stop_row) for this thread's share of the rows.
template <typename Work>
void for_rows(const std::vector<int64_t>& bounds, int num_threads, const Work& work) {
  const int64_t num_rows = bounds.back();
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int share = 0; share < num_threads; ++share) {
    const int64_t begin = num_rows * share / num_threads, end = num_rows * (share + 1) / num_threads;
    for (size_t group = 0; group + 1 < bounds.size(); ++group) {
      const int64_t first = std::max(begin, bounds[group]), stop = std::min(end, bounds[group + 1]);
      if (first < stop) work(group, first, stop);
    }
  }
}

// zods.kernels.grouped_products.project_
template <typename T>
void project(uintptr_t inner_address, uintptr_t x_address, uintptr_t factors_address,
             const std::vector<int64_t>& bounds, int64_t num_inner, int64_t num_factors, int64_t num_columns,
             int num_threads) {
  auto* inner = reinterpret_cast<float*>(inner_address);
  const auto* x = reinterpret_cast<const T*>(x_address);
  const auto* factors = reinterpret_cast<const float*>(factors_address);
  for_rows(bounds, num_threads, [&](size_t group, int64_t first, int64_t stop) {
    for (int64_t row = first; row < stop; ++row)
      for (int64_t q = 0; q < num_factors; ++q)
        inner[row * num_inner + q] =
            dot(x + row * num_columns, factors + (group * num_factors + q) * num_columns, num_columns);
  });
}

// zods.kernels.grouped_products.add_products_
template <typename T>
void add_products(uintptr_t out_address, uintptr_t inner_address, uintptr_t outer_address,
                  const std::vector<int64_t>& bounds, int64_t num_inner, uintptr_t common_inner_address,
                  uintptr_t common_outer_address, int64_t num_common, float scale, int64_t num_columns,
                  int num_threads) {
  auto* out = reinterpret_cast<T*>(out_address);
  const auto* inner = reinterpret_cast<const float*>(inner_address);
  const auto* outer = reinterpret_cast<const float*>(outer_address);
  const auto* common_inner = reinterpret_cast<const float*>(common_inner_address);
  const auto* common_outer = reinterpret_cast<const float*>(common_outer_address);
  for_rows(bounds, num_threads, [&](size_t group, int64_t first, int64_t stop) {
    for (int64_t column = 0; column < num_columns; column += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, num_columns - column));
      for (int64_t row = first; row < stop; ++row) {
        alignas(64) float sum[kTile];
        std::fill(sum, sum + count, 0.0f);
        add_multiples(sum, common_inner + row * num_common, common_outer + column, num_common, num_columns, count);
        add_multiples(sum, inner + row * num_inner, outer + group * num_inner * num_columns + column, num_inner,
                      num_columns, count);
        T* at = out + row * num_columns + column;
        store<false>(at, sum, at, scale, nullptr, count);
      }
    }
  });
}

}  // namespace

// Arguments are addresses, not tensors: with torch's headers the first build would take a minute.
// zods.kernels checks the arguments.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("combine_float32", &combine<float>, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("combine_bfloat16", &combine<uint16_t>, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("directions", &directions, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("fingerprint_1", &fingerprint<uint8_t>, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("fingerprint_2", &fingerprint<uint16_t>, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("fingerprint_4", &fingerprint<uint32_t>, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("fingerprint_8", &fingerprint<uint64_t>, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("project_float32", &project<float>, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("project_bfloat16", &project<uint16_t>, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("add_products_float32", &add_products<float>, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("add_products_bfloat16", &add_products<uint16_t>, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("summed_excess", &summed_excess, pybind11::call_guard<pybind11::gil_scoped_release>());
}
