// Element-wise kernels, written once as plain loops and compiled by every ISA's translation unit in its own namespace.
//
// Sums run in 16 lanes with one fixed reduction tree, no contraction to FMA happens (-ffp-contract=off), and rounding
// to integers uses the 1.5 * 2^23 trick: so all ISAs agree bit by bit. No std:: templates: their symbols are weak and
// the linker would keep one ISA's copy for all.

#include "cpu/numbers.inl"
#include "cpu/grid.inl"
#include "cpu/dequantize.inl"

constexpr int kLanes = 16;

static inline float reduce_lanes(const float* lanes) {
  float t[kLanes];
  for (int i = 0; i < kLanes; ++i) t[i] = lanes[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) t[i] += t[i + width];
  return t[0];
}

static inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// 2^x for x <= 127; relative error about 1e-7. Below -126 it is 0.
static inline float exp2_poly(float x) {
  const float clamped = x < -126.0f ? -126.0f : x;
  const float whole = round_even(clamped);
  const float f = clamped - whole;
  float p = 1.5403530393381609e-4f;
  p = p * f + 1.3333558146428443e-3f;
  p = p * f + 9.6181291076284772e-3f;
  p = p * f + 5.5504108664821580e-2f;
  p = p * f + 2.4022650695910072e-1f;
  p = p * f + 6.9314718055994531e-1f;
  p = p * f + 1.0f;
  const float power = bits_float(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
  return x < -126.0f ? 0.0f : p * power;
}

// e^x for |x| <= 87 (clamped), with the two-step reduction that keeps large arguments accurate.
static inline float exp_poly(float x) {
  const float low = x < -87.0f ? -87.0f : x;
  const float clamped = low > 88.0f ? 88.0f : low;
  const float whole = round_even(clamped * 1.44269504088896341f);
  const float r = (clamped - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * bits_float(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
}

static void rms_norm(const float* x, const float* weight, float* out, int64_t n, float eps) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
  for (; i < n; ++i) lanes[i % kLanes] += x[i] * x[i];
  const float factor = 1.0f / __builtin_sqrtf(reduce_lanes(lanes) / static_cast<float>(n) + eps);
  for (i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

static void layer_norm(const float* x, const float* weight, const float* bias, float* out, int64_t n, float eps) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i % kLanes] += x[i];
  const float mean = reduce_lanes(lanes) / static_cast<float>(n);
  for (int j = 0; j < kLanes; ++j) lanes[j] = 0.0f;
  for (int64_t i = 0; i < n; ++i) lanes[i % kLanes] += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / __builtin_sqrtf(reduce_lanes(lanes) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) {
    const float y = (x[i] - mean) * factor * weight[i];
    out[i] = bias == nullptr ? y : y + bias[i];
  }
}

// The group's codes by the rule of GroupMeta: the scale is that of the largest value outside the step of the high
// parts. A group with a value that is not finite becomes NaN as a whole.
static void quantize_group(const float* x, int8_t* codes, GroupMeta* meta) {
  constexpr int kSteps = kGroup / 4;
  float magnitudes[kSteps], first = 0.0f, second = 0.0f;
  bool finite = true;
  for (int i = 0; i < kGroup; ++i) finite = finite && __builtin_fabsf(x[i]) < 1e38f;
  for (int step = 0; step < kSteps; ++step) {
    magnitudes[step] = 0.0f;
    for (int i = step * 4; i < step * 4 + 4; ++i)
      magnitudes[step] = __builtin_fabsf(x[i]) > magnitudes[step] ? __builtin_fabsf(x[i]) : magnitudes[step];
    first = magnitudes[step] > first ? magnitudes[step] : first;
  }
  int at = 0;
  for (int step = kSteps - 1; step >= 0; --step) at = magnitudes[step] == first ? step : at;
  for (int step = 0; step < kSteps; ++step)
    second = step != at && magnitudes[step] > second ? magnitudes[step] : second;
  const float least = first * kLeastShare;
  const float largest = second > least ? second : least;
  const bool usable = finite && first > 1e-28f;
  const float inverse = usable ? 127.0f / largest : 0.0f;
  const float scale = !finite ? __builtin_nanf("") : usable ? largest / 127.0f : 0.0f;
  int32_t sums[2] = {};
  int8_t high[4];
  for (int i = 0; i < kGroup; ++i) {
    const int32_t code = static_cast<int32_t>(round_even(usable ? x[i] * inverse : 0.0f));
    const int32_t upper = i / 4 == at ? (code + (1 << (kHighBits - 1))) >> kHighBits : 0;
    codes[i] = static_cast<int8_t>(code - upper * (1 << kHighBits));
    if (i / 4 == at) high[i % 4] = static_cast<int8_t>(upper * (1 << (kHighBits - kHighShift)));
    sums[i / (kGroup / 2)] += code;
  }
  __builtin_memcpy(&meta->high, high, 4);
  meta->scale = scale;
  meta->negative_sum = -(sums[0] + sums[1]);
  meta->scaled_sum = scale * static_cast<float>(sums[0] + sums[1]);
  meta->high_step = at;
  meta->negative_first_sum = -sums[0];
  meta->scaled_first_sum = scale * static_cast<float>(sums[0]);
  meta->scaled_second_sum = scale * static_cast<float>(sums[1]);
}

static void quantize_q8(const float* x, int8_t* codes, GroupMeta* meta, int64_t n) {
  for (int64_t g = 0; g < n / kGroup; ++g) quantize_group(x + g * kGroup, codes + g * kGroup, meta + g);
}

// One row with one scale: NaN where a value is not finite.
static RowMeta quantize_i8(const float* x, int8_t* codes, int64_t n) {
  float lanes[kLanes] = {};
  int32_t poisoned = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = __builtin_fabsf(x[i]);
    lanes[i % kLanes] = magnitude > lanes[i % kLanes] ? magnitude : lanes[i % kLanes];
    poisoned |= magnitude < 1e38f ? 0 : 1;
  }
  float largest = 0.0f;
  for (int j = 0; j < kLanes; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
  const bool usable = poisoned == 0 && largest > 1e-30f;
  const float inverse = usable ? 127.0f / largest : 0.0f;
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t code = static_cast<int32_t>(round_even(usable ? x[i] * inverse : 0.0f));
    codes[i] = static_cast<int8_t>(code);
    sum += code;
  }
  for (int64_t i = n; i % kTile != 0; ++i) codes[i] = 0;
  return {poisoned != 0 ? __builtin_nanf("") : usable ? largest / 127.0f : 0.0f, -sum};
}

static float quantize_head(const float* x, int8_t* codes, int64_t n) {
  float largest = 0.0f;
  int num_nans = 0;
  for (int64_t i = 0; i < n; ++i) largest = __builtin_fabsf(x[i]) > largest ? __builtin_fabsf(x[i]) : largest;
  for (int64_t i = 0; i < n; ++i) num_nans += x[i] != x[i] ? 1 : 0;
  const bool finite = num_nans == 0 && largest < 1e38f;
  const bool usable = finite && largest > 1e-30f;
  const float inverse = usable ? 127.0f / largest : 0.0f;
  for (int64_t i = 0; i < n; ++i)
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(round_even(usable ? x[i] * inverse : 0.0f)));
  return usable ? largest / 127.0f : finite ? 0.0f : __builtin_nanf("");
}

static void round_bf16(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(x[i]);
}

static inline void rotate(const HeadRow& row) {
  const int half = row.rotary_dim / 2;
  for (int i = 0; i < half; ++i) {
    const int a = row.interleaved ? 2 * i : i;
    const int b = row.interleaved ? 2 * i + 1 : i + half;
    const float x = row.x[a], y = row.x[b];
    row.x[a] = x * row.cosine[i] - y * row.sine[i];
    row.x[b] = y * row.cosine[i] + x * row.sine[i];
  }
}

static void head(const HeadRow& row) {
  if (row.bias != nullptr)
    for (int i = 0; i < row.head_dim; ++i) row.x[i] += row.bias[i];
  if (row.norm != nullptr) rms_norm(row.x, row.norm, row.x, row.head_dim, row.eps);
  if (row.cosine != nullptr) rotate(row);
}

static inline float silu(float x) { return x / (1.0f + exp_poly(-x)); }
static inline float gelu(float x) { return 0.5f * x * (1.0f + __builtin_erff(x * 0.70710678118654752f)); }
static inline float gelu_tanh(float x) {
  const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
  return x * (1.0f - 1.0f / (1.0f + exp_poly(2.0f * inner)));
}
static inline float relu2(float x) { return x <= 0.0f ? 0.0f : x * x; }  // a NaN stays one

static void activate(Activation kind, const float* x, float* out, int64_t n) {
  switch (kind) {
    case Activation::kSilu:
      for (int64_t i = 0; i < n; ++i) out[i] = silu(x[i]);
      return;
    case Activation::kGelu:
      for (int64_t i = 0; i < n; ++i) out[i] = gelu(x[i]);
      return;
    case Activation::kGeluTanh:
      for (int64_t i = 0; i < n; ++i) out[i] = gelu_tanh(x[i]);
      return;
    case Activation::kRelu2:
      for (int64_t i = 0; i < n; ++i) out[i] = relu2(x[i]);
      return;
  }
}

static void gated(Activation kind, const float* gate, const float* x, float* out, int64_t n) {
  if (kind == Activation::kSilu) {
    for (int64_t i = 0; i < n; ++i) out[i] = silu(gate[i]) * x[i];
    return;
  }
  float buffer[kTile];
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t width = n - i < kTile ? n - i : kTile;
    activate(kind, gate + i, buffer, width);
    for (int64_t j = 0; j < width; ++j) out[i + j] = buffer[j] * x[i + j];
  }
}

static void add(const float* x, const float* y, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] + y[i];
}

static void scale(const float* x, float by, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * by;
}

static float maximum(const float* x, int64_t n) {
  float lanes[kLanes];
  int32_t nans[kLanes] = {};
  for (int j = 0; j < kLanes; ++j) lanes[j] = -__builtin_inff();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
      nans[j] |= x[i + j] != x[i + j] ? 1 : 0;
    }
  }
  for (; i < n; ++i) {
    lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    nans[0] |= x[i] != x[i] ? 1 : 0;
  }
  for (int j = 0; j < kLanes; ++j)
    if (nans[j] != 0) return __builtin_nanf("");
  float largest = lanes[0];
  for (int j = 1; j < kLanes; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
  return largest;
}

static void exp_weights(const float* x, float largest, float inverse_temperature, float* w, double* sums, int64_t n) {
  for (int64_t begin = 0; begin < n; begin += 256) {
    const int64_t end = begin + 256 < n ? begin + 256 : n;
    for (int64_t i = begin; i < end; ++i) {
      const float z = (x[i] - largest) * inverse_temperature;
      w[i] = z < -87.0f ? 0.0f : exp_poly(z);
    }
    double lanes[kLanes] = {};
    for (int64_t i = begin; i < end; ++i) lanes[(i - begin) % kLanes] += static_cast<double>(w[i]);
    double sum = 0.0;
    for (int j = 0; j < kLanes; ++j) sum += lanes[j];
    sums[begin / 256] = sum;
  }
}

[[maybe_unused]] static void fill_elementwise(KernelTable& table) {
  table.rms_norm = rms_norm;
  table.layer_norm = layer_norm;
  table.quantize_q8 = quantize_q8;
  table.quantize_i8 = quantize_i8;
  table.round_bf16 = round_bf16;
  table.quantize_head = quantize_head;
  table.head = head;
  table.activate = activate;
  table.gated = gated;
  table.add = add;
  table.scale = scale;
  table.dequantize = dequantize;
  table.maximum = maximum;
  table.exp_weights = exp_weights;
}
