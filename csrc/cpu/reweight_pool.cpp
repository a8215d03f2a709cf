// reweight_pool on the CPU: one read of the feature map forward, one write backward.
//
// A row of positions, or a channel of channels_last, belongs to one thread, so results are bit-equal for any number of
// threads.
#include "reweight_pool.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "huge_pages.h"
#include "lanes.h"
#include "parallel.h"

namespace mlfast::cpu {
namespace {

// Integers as wide as T, so that positions and values share the lanes of a vector.
template <typename T>
using Position = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// Channels whose running sums, maxima and positions stay in L1 together.
constexpr int64_t kChannelTile = 2048;
// Positions that are added in the computing type; their sums are added in double.
constexpr int64_t kPositionTile = 2048;

// What a row of positions comes to. Like Tensor.max, a NaN is above every number, and the first maximum counts.
template <typename T>
struct Pooled {
  double sum;      // of f
  T peak;          // the maximum of weight * f
  int64_t argmax;  // where it is first
};

// The same of a tile, whose positions count from its beginning.
template <typename T>
struct PooledTile {
  T sum, peak;
  Position<T> argmax;
};

template <typename T>
using Places = typename Lanes<Position<T>>::Vector;

template <typename T>
MLFAST_ALWAYS void number_lanes(Places<T>& lanes) {
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i;
}

// Has `combine` put together all lanes of x, in every lane.
template <typename T, typename Vector, typename Combine>
MLFAST_ALWAYS void across_lanes(Vector& x, const Combine& combine) {
  Places<T> lane;
  number_lanes<T>(lane);
#pragma GCC unroll 3
  for (int step = kLanes<T> / 2; step > 0; step /= 2) combine(x, __builtin_shuffle(x, lane ^ step));
}

// NaN products are passed over: see first_nan. Each lane has a maximum of its own; the highest that comes first counts.
template <bool kArgmax, typename T>
MLFAST_SIMD PooledTile<T> pool_tile(const T* f, T weight, Position<T> n) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kWide = kLanes<T>;
  const Vector lowest = Vector{} - std::numeric_limits<T>::infinity();
  Vector sum[2] = {}, peak[2] = {lowest, lowest};
  Places<T> place, at[2] = {};
  number_lanes<T>(place);
  Position<T> p = 0;
  for (; p + 2 * kWide <= n; p += 2 * kWide) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Vector value = *reinterpret_cast<const Vector*>(f + p + v * kWide), product = weight * value;
      sum[v] += value;
      if (kArgmax) at[v] = product > peak[v] ? place : at[v];
      peak[v] = product > peak[v] ? product : peak[v];
    }
    place += 2 * kWide;
  }
  Vector total = sum[0] + sum[1], top = peak[1] > peak[0] ? peak[1] : peak[0];
  across_lanes<T>(total, [](Vector& x, const Vector& y) __attribute__((always_inline)) { x += y; });
  across_lanes<T>(top, [](Vector& x, const Vector& y) __attribute__((always_inline)) { x = y > x ? y : x; });
  PooledTile<T> tile{total[0], top[0], 0};
  if (kArgmax) {
    const auto earlier = [](Places<T>& x, const Places<T>& y) __attribute__((always_inline)) { x = y < x ? y : x; };
    const Places<T> nowhere = Places<T>{} + n;
    Places<T> first = peak[0] == top ? at[0] : nowhere;
    earlier(first, peak[1] == top ? at[1] + kWide : nowhere);
    across_lanes<T>(first, earlier);
    tile.argmax = first[0];
  }
  for (; p < n; ++p) {
    const T product = weight * f[p];
    tile.sum += f[p];
    tile.argmax = product > tile.peak ? p : tile.argmax;
    tile.peak = product > tile.peak ? product : tile.peak;
  }
  return tile;
}

// Corrects peak and argmax where a product is NaN. Then weight * sum is not finite, so few rows are looked at.
template <typename T, typename From>
void first_nan(const From* f, int64_t stride, int64_t n, T weight, Pooled<T>& pooled) {
  if (std::isfinite(weight * static_cast<T>(pooled.sum))) return;
  for (int64_t i = 0; i < n; ++i) {
    const T product = weight * widen(f[i * stride]);
    if (product != product) {
      pooled.peak = product;
      pooled.argmax = i;
      return;
    }
  }
}

template <typename T, typename From>
Pooled<T> pool_row(const From* f, T weight, int64_t n, bool with_argmax) {
  Pooled<T> pooled{0, -std::numeric_limits<T>::infinity(), 0};
  for (int64_t begin = 0; begin < n; begin += kPositionTile) {
    const auto size = static_cast<Position<T>>(std::min(kPositionTile, n - begin));
    alignas(64) T converted[kPositionTile];
    const T* values = converted;
    if constexpr (std::is_same_v<T, From>) {
      values = f + begin;
    } else {
      convert(f + begin, converted, size);
    }
    const PooledTile<T> tile =
        with_argmax ? pool_tile<true>(values, weight, size) : pool_tile<false>(values, weight, size);
    pooled.sum += static_cast<double>(tile.sum);
    if (tile.peak > pooled.peak) {
      pooled.peak = tile.peak;
      pooled.argmax = begin + tile.argmax;
    }
  }
  first_nan(f, 1, n, weight, pooled);
  return pooled;
}

// What the channels of a tile come to, over the positions so far.
template <typename T>
struct ChannelTile {
  alignas(64) T sum[kChannelTile], peak[kChannelTile];
  alignas(64) Position<T> argmax[kChannelTile];
  alignas(64) double total[kChannelTile];

  explicit ChannelTile(int64_t n) {
    std::fill_n(sum, n, T(0));
    std::fill_n(peak, n, -std::numeric_limits<T>::infinity());
    std::fill_n(argmax, n, Position<T>(0));
    std::fill_n(total, n, 0.0);
  }
};

// Adds `kRows` positions, beginning at `position`, to n channels. Several at a time spare the accumulators' way to L1.
template <int kRows, typename T, typename From>
MLFAST_SIMD void add_positions(const From* __restrict f, int64_t stride, const T* __restrict weight,
                               Position<T> position, T* __restrict sum, T* __restrict peak,
                               Position<T>* __restrict argmax, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    T added = 0, high = peak[c];
    Position<T> at = argmax[c];
    for (int r = 0; r < kRows; ++r) {
      const T value = widen(f[r * stride + c]), product = weight[c] * value;
      added += value;
      at = product > high ? position + r : at;
      high = product > high ? product : high;
    }
    sum[c] += added;
    peak[c] = high;
    argmax[c] = at;
  }
}

template <typename T>
MLFAST_SIMD void empty_sums(T* __restrict sum, double* __restrict total, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    total[c] += static_cast<double>(sum[c]);
    sum[c] = 0;
  }
}

template <typename T, typename From>
void pool_channels(const From* f, int64_t stride, const T* weight, int64_t positions, int64_t n, ChannelTile<T>& t) {
  constexpr int kRows = 8;
  int64_t p = 0;
  for (; p + kRows <= positions; p += kRows) {
    add_positions<kRows, T>(f + p * stride, stride, weight, static_cast<Position<T>>(p), t.sum, t.peak, t.argmax, n);
    if (p % kPositionTile == 0) empty_sums(t.sum, t.total, n);
  }
  for (; p < positions; ++p)
    add_positions<1, T>(f + p * stride, stride, weight, static_cast<Position<T>>(p), t.sum, t.peak, t.argmax, n);
  empty_sums(t.sum, t.total, n);
}

// The feature map and the tensors of one call, with their types.
template <typename T, typename From>
struct Forward {
  const FeatureMap& map;
  const From* features;
  const T* weight;
  From* out;
  int32_t* argmax;
  T* weight_slope;

  Forward(const FeatureMap& m, const ReweightPool& t)
      : map(m),
        features(static_cast<const From*>(t.features)),
        weight(static_cast<const T*>(t.weight)),
        out(static_cast<From*>(t.out)),
        argmax(t.argmax),
        weight_slope(static_cast<T*>(t.weight_slope)) {}

  // `f` and `stride` are where the positions of output `i`, of channel `c`, are.
  void store(int64_t i, int64_t c, const From* f, int64_t stride, const Pooled<T>& pooled) const {
    const T mean = static_cast<T>(pooled.sum / static_cast<double>(map.positions));
    out[i] = Narrow<From>::from(static_cast<T>(weight[c] * mean + pooled.peak));
    if (argmax == nullptr) return;
    argmax[i] = static_cast<int32_t>(pooled.argmax);
    weight_slope[i] = mean + widen(f[pooled.argmax * stride]);
  }

  void row(int64_t i) const {
    const From* f = features + i * map.positions;
    const int64_t c = i % map.channels;
    store(i, c, f, 1, pool_row<T>(f, weight[c], map.positions, argmax != nullptr));
  }

  void channel_tile(int64_t image, int64_t first) const {
    const int64_t n = std::min(kChannelTile, map.channels - first);
    const From* f = features + image * map.positions * map.channels + first;
    ChannelTile<T> tile(n);
    pool_channels<T>(f, map.channels, weight + first, map.positions, n, tile);
    for (int64_t c = 0; c < n; ++c) {
      Pooled<T> pooled{tile.total[c], tile.peak[c], tile.argmax[c]};
      first_nan(f + c, map.channels, map.positions, weight[first + c], pooled);
      store(image * map.channels + first + c, first + c, f + c, map.channels, pooled);
    }
  }
};

// What an element is stored as. GCC vectorises loops that move numbers, but not structs.
template <typename To>
using Bits = std::conditional_t<sizeof(To) == 8, uint64_t, std::conditional_t<sizeof(To) == 4, uint32_t, uint16_t>>;

template <typename To>
MLFAST_SIMD void fill(To* __restrict to, To value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

template <typename T, typename To>
struct Backward {
  const FeatureMap& map;
  const To* grad_out;
  const T* weight;
  const int32_t* argmax;
  const T* weight_slope;
  Bits<To>* grad_features;
  T* grad_weight;

  Backward(const FeatureMap& m, const ReweightPoolBackward& t)
      : map(m),
        grad_out(static_cast<const To*>(t.grad_out)),
        weight(static_cast<const T*>(t.weight)),
        argmax(t.argmax),
        weight_slope(static_cast<const T*>(t.weight_slope)),
        grad_features(static_cast<Bits<To>*>(t.grad_features)),
        grad_weight(static_cast<T*>(t.grad_weight)) {}

  // The gradient of output `i`, of channel `c`, by a position: where the maximum is not, and where it is.
  void slopes(int64_t i, int64_t c, Bits<To>& cold, Bits<To>& hot) const {
    const T slope = weight[c] * widen(grad_out[i]), mean = slope / static_cast<T>(map.positions);
    const To values[] = {Narrow<To>::from(mean), Narrow<To>::from(static_cast<T>(mean + slope))};
    memcpy(&cold, &values[0], sizeof cold);
    memcpy(&hot, &values[1], sizeof hot);
  }

  void row(int64_t i) const {
    Bits<To>* row = grad_features + i * map.positions;
    Bits<To> cold, hot;
    slopes(i, i % map.channels, cold, hot);
    fill(row, cold, map.positions);
    row[argmax[i]] = hot;
  }

  void channel_tile(int64_t image, int64_t first) const {
    const int64_t n = std::min(kChannelTile, map.channels - first), at = image * map.channels + first;
    alignas(64) Bits<To> cold[kChannelTile], hot[kChannelTile];
    for (int64_t c = 0; c < n; ++c) slopes(at + c, first + c, cold[c], hot[c]);
    Bits<To>* to = grad_features + image * map.positions * map.channels + first;
    for (int64_t p = 0; p < map.positions; ++p) std::copy_n(cold, n, to + p * map.channels);
    for (int64_t c = 0; c < n; ++c) to[argmax[at + c] * map.channels + c] = hot[c];
  }

  // The gradient by the weights of a tile of channels: over the batch, in its order.
  void weight_tile(int64_t first) const {
    const int64_t n = std::min(kChannelTile, map.channels - first);
    double total[kChannelTile];
    std::fill_n(total, n, 0.0);
    for (int64_t image = 0; image < map.batch; ++image) {
      const int64_t at = image * map.channels + first;
      for (int64_t c = 0; c < n; ++c)
        total[c] += static_cast<double>(widen(grad_out[at + c])) * static_cast<double>(weight_slope[at + c]);
    }
    for (int64_t c = 0; c < n; ++c) grad_weight[first + c] = static_cast<T>(total[c]);
  }
};

// Calls row(i) for every row of positions, or channel_tile(image, first channel) for every tile in channels_last.
template <typename Pass>
void for_map(const FeatureMap& map, const Pass& pass) {
  const int64_t rows = map.batch * map.channels;
  if (!map.channels_last) return for_each(rows, rows * map.positions / kReadsPerLoss, [&](int64_t i) { pass.row(i); });
  const int64_t tiles = (map.channels + kChannelTile - 1) / kChannelTile;
  for_each(map.batch * tiles, rows * map.positions / kReadsPerLoss,
           [&](int64_t i) { pass.channel_tile(i / tiles, i % tiles * kChannelTile); });
}

}  // namespace

void reweight_pool(const FeatureMap& map, const ReweightPool& tensors) {
  with_float_types(map.type, [&](auto* computing, auto* type) {
    for_map(map,
            Forward<std::remove_pointer_t<decltype(computing)>, std::remove_pointer_t<decltype(type)>>(map, tensors));
  });
}

void reweight_pool_backward(const FeatureMap& map, const ReweightPoolBackward& tensors) {
  with_float_types(map.type, [&](auto* computing, auto* type) {
    using Type = std::remove_pointer_t<decltype(type)>;
    const Backward<std::remove_pointer_t<decltype(computing)>, Type> backward(map, tensors);
    const int64_t rows = map.batch * map.channels;
    if (backward.grad_features) {
      prefer_huge_pages(backward.grad_features, rows * map.positions * static_cast<int64_t>(sizeof(Type)));
      for_map(map, backward);
    }
    if (backward.grad_weight)
      for_each((map.channels + kChannelTile - 1) / kChannelTile, rows / kReadsPerLoss,
               [&](int64_t i) { backward.weight_tile(i * kChannelTile); });
  });
}

}  // namespace mlfast::cpu
