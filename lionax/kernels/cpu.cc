// Runs a program of elementwise operations over arrays of one shape in a single pass over memory; see passes.py for what it is made from.
//
// The arrays are cut into blocks that stay in the first-level cache. Each instruction runs over one block before the next does, so an
// array is read from memory once and written once, however many instructions use it. Blocks are handed to the threads in chunks.
//
// An instruction is six numbers: an operation, where the result goes, and up to four operands. These count arguments, results, constants
// and then registers, which hold one block.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int64_t kBlock = 1024;          // elements; a register of 4 KiB, of which few are needed, is in the first-level cache
constexpr int64_t kChunk = 64 * kBlock;   // elements that a thread takes at once; fixed, so that sums do not depend on the threads
constexpr int64_t kLanes = 16;            // partial sums, so that additions need not wait for each other
constexpr int64_t kAligned = 16;          // elements in a line of the cache
constexpr int64_t kFields = 6;            // of an instruction

// In the order of `OPERATIONS` in passes.py.
enum Operation : int64_t {
  kAdd, kSub, kMul, kDiv, kMax, kMin, kNeg, kAbs, kSign, kSqrt, kCopy, kFma, kFms, kFnma, kAverage, kSelect, kFromBf16, kToBf16,
  kSumOfSquares
};

struct Vector {
  const float* values;
  float operator[](int64_t k) const { return values[k]; }
};

struct Scalar {
  float value;
  float operator[](int64_t) const { return value; }
};

// What an instruction reads or writes.
struct Place {
  char* data;
  int64_t width;  // bytes of an element; 0 for scalars and registers, whose place is the same in every block
  bool scalar;

  Place At(int64_t element) const { return {data + element * width, width, scalar}; }
  float* floats() const { return reinterpret_cast<float*>(data); }
  uint16_t* halves() const { return reinterpret_cast<uint16_t*>(data); }
  Vector vector() const { return {floats()}; }
  Scalar value() const { return {*floats()}; }
};

#if defined(__clang__)
#define LIONAX_LOOP _Pragma("clang loop vectorize(assume_safety)") for (int64_t k = 0; k < n; ++k)
#else
#define LIONAX_LOOP _Pragma("GCC ivdep") for (int64_t k = 0; k < n; ++k)
#endif

inline float Fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline float FromBf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t ToBf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return x != x ? ((bits >> 16) & 0x8000) | 0x7fc0 : rounded;
}

template <typename F>
inline void Map(F f, Place result, Place a, int64_t n) {
  float* to = result.floats();
  const float* from = a.floats();
  LIONAX_LOOP to[k] = f(from[k]);
}

// Calls a loop with two operands as what they are; one of them is not a scalar.
template <typename L>
inline void Dispatch(L loop, Place a, Place b) {
  if (a.scalar) {
    loop(a.value(), b.vector());
  } else if (b.scalar) {
    loop(a.vector(), b.value());
  } else {
    loop(a.vector(), b.vector());
  }
}

template <typename F>
inline void Map(F f, Place result, Place a, Place b, int64_t n) {
  float* to = result.floats();
  Dispatch([=](auto x, auto y) { LIONAX_LOOP to[k] = f(x[k], y[k]); }, a, b);
}

template <typename F>
inline void Map(F f, Place result, Place a, Place b, Place c, int64_t n) {
  if (c.scalar) {
    const float last = *c.floats();
    Map([f, last](float x, float y) { return f(x, y, last); }, result, a, b, n);
    return;
  }
  const float* last = c.floats();
  float* to = result.floats();
  Dispatch([=](auto x, auto y) { LIONAX_LOOP to[k] = f(x[k], y[k], last[k]); }, a, b);
}

inline void Select(Place result, Place condition, Place otherwise, Place then, int64_t n) {
  const Place chosen = *condition.floats() != 0 ? then : otherwise;
  if (chosen.scalar) {
    std::fill_n(result.floats(), n, *chosen.floats());
  } else if (result.data != chosen.data) {
    std::copy_n(chosen.floats(), n, result.floats());
  }
}

// Adds the squares to as many partial sums as there are lanes.
inline void SumOfSquares(double* sums, const float* x, int64_t n) {
  double lanes[kLanes];  // a copy, which the compiler keeps in registers
  std::copy_n(sums, kLanes, lanes);
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double value = x[k + lane];
      lanes[lane] += value * value;
    }
  }
  for (int64_t lane = 0; lane < n - k; ++lane) lanes[lane] += static_cast<double>(x[k + lane]) * x[k + lane];
  std::copy_n(lanes, kLanes, sums);
}

struct Instruction {
  int64_t operation;
  Place result, a, b, c, d;
  int64_t sum;  // which one it adds to
};

// Runs instructions over the n elements from one on.
inline void Run(const std::vector<Instruction>& program, int64_t at, int64_t n, double* sums) {
  for (const Instruction& i : program) {
    const Place to = i.result.At(at), a = i.a.At(at), b = i.b.At(at), c = i.c.At(at), d = i.d.At(at);
    switch (i.operation) {
      case kAdd: Map([](float x, float y) { return x + y; }, to, a, b, n); break;
      case kSub: Map([](float x, float y) { return x - y; }, to, a, b, n); break;
      case kMul: Map([](float x, float y) { return x * y; }, to, a, b, n); break;
      case kDiv: Map([](float x, float y) { return x / y; }, to, a, b, n); break;
      // A NaN on either side is the result.
      case kMax: Map([](float x, float y) { return x != x || x >= y ? x : y; }, to, a, b, n); break;
      case kMin: Map([](float x, float y) { return x != x || x <= y ? x : y; }, to, a, b, n); break;
      case kNeg: Map([](float x) { return -x; }, to, a, n); break;
      case kAbs: Map([](float x) { return std::fabs(x); }, to, a, n); break;
      case kSign: Map([](float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x != x ? x : std::copysign(0.0f, x); }, to, a, n); break;
      case kSqrt: Map([](float x) { return std::sqrt(x); }, to, a, n); break;
      case kCopy: std::memcpy(to.data, a.data, n * to.width); break;  // to a result
      case kFma: Map([](float x, float y, float z) { return Fma(x, y, z); }, to, a, b, c, n); break;
      case kFms: Map([](float x, float y, float z) { return Fma(x, y, -z); }, to, a, b, c, n); break;
      case kFnma: Map([](float x, float y, float z) { return Fma(-x, y, z); }, to, a, b, c, n); break;
      case kAverage: {
        const float x = *a.floats(), y = *c.floats();
        Map([x, y](float b, float d) { return Fma(x, b, y * d); }, to, b, d, n);
        break;
      }
      case kSelect: Select(to, a, b, c, n); break;
      case kFromBf16: {
        const uint16_t* from = a.halves();
        float* floats = to.floats();
        LIONAX_LOOP floats[k] = FromBf16(from[k]);
        break;
      }
      case kToBf16: {
        const float* from = a.floats();
        uint16_t* halves = to.halves();
        LIONAX_LOOP halves[k] = ToBf16(from[k]);
        break;
      }
      case kSumOfSquares: SumOfSquares(sums + i.sum * kLanes, a.floats(), n); break;
    }
  }
}

class Pass {
 public:
  Pass(std::vector<Place> places, ffi::Span<const int64_t> program, int64_t registers, int64_t sums, int64_t size)
      : places_(std::move(places)), program_(program.begin(), program.end()), registers_(registers), sums_(sums), size_(size),
        chunks_((size + kChunk - 1) / kChunk), partial_(chunks_ * sums * kLanes) {}

  // Works on chunks until none is left.
  void Work() {
    int64_t chunk = next_.fetch_add(1);
    if (chunk >= chunks_) return;
    std::unique_ptr<float[]> memory(new float[registers_ * Length() + kAligned]);
    const std::vector<Instruction> program = Decoded(memory.get());
    for (; chunk < chunks_; chunk = next_.fetch_add(1)) {
      const int64_t end = std::min(size_, (chunk + 1) * kChunk);
      double* sums = partial_.data() + chunk * sums_ * kLanes;
      int64_t at = chunk * kChunk;
      for (; at + kBlock <= end; at += kBlock) Run(program, at, kBlock, sums);
      if (at < end) Run(program, at, end - at, sums);
      if (done_.fetch_add(1) + 1 == chunks_) {
        std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_all();
      }
    }
  }

  // Waits for the chunks that other threads are at.
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_.load() >= chunks_; });
  }

  int64_t chunks() const { return chunks_; }

  double Sum(int64_t index) const {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      for (int64_t lane = 0; lane < kLanes; ++lane) total += partial_[(chunk * sums_ + index) * kLanes + lane];
    }
    return total;
  }

 private:
  // Of a register.
  int64_t Length() const { return std::min(kBlock, (size_ + kAligned - 1) / kAligned * kAligned); }

  // The instructions of a thread, which has registers of its own.
  std::vector<Instruction> Decoded(float* memory) const {
    const int64_t count = places_.size();
    char* registers = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    auto place = [&](int64_t id) -> Place {
      if (id < count) return places_[id];
      return {registers + (id - count) * Length() * static_cast<int64_t>(sizeof(float)), 0, false};
    };
    std::vector<Instruction> program;
    program.reserve(program_.size() / kFields);
    for (size_t i = 0; i < program_.size(); i += kFields) {
      const int64_t* fields = program_.data() + i;
      const bool sums = fields[0] == kSumOfSquares;
      program.push_back({fields[0], sums ? Place{} : place(fields[1]), place(fields[2]), place(fields[3]), place(fields[4]),
                         place(fields[5]), sums ? fields[1] : 0});
    }
    return program;
  }

  const std::vector<Place> places_;  // arguments, results, constants
  const std::vector<int64_t> program_;
  const int64_t registers_, sums_, size_, chunks_;
  std::vector<double> partial_;  // for each chunk its part of each sum, in lanes
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

ffi::Error OnePass(ffi::ThreadPool threads, ffi::Span<const int64_t> program, ffi::Span<const float> constants, int64_t registers,
                   ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  std::vector<Place> places;
  std::vector<double*> sums;
  int64_t size = 0;
  bool fits = program.size() % kFields == 0;
  auto add = [&](const ffi::AnyBuffer& buffer) {
    const bool scalar = buffer.dimensions().size() == 0;
    const int64_t count = buffer.element_count();
    fits &= scalar || size == 0 || size == count;
    if (!scalar) size = count;
    places.push_back({static_cast<char*>(buffer.untyped_data()), scalar ? 0 : buffer.element_type() == ffi::BF16 ? 2 : 4, scalar});
  };
  for (size_t i = 0; i < arguments.size(); ++i) add(*arguments.get<ffi::AnyBuffer>(i));
  for (size_t i = 0; i < results.size(); ++i) {
    ffi::AnyBuffer result = **results.get<ffi::AnyBuffer>(i);
    if (result.element_type() == ffi::F64) {
      sums.push_back(result.typed_data<double>());
    } else {
      add(result);
    }
  }
  for (const float& constant : constants) places.push_back({reinterpret_cast<char*>(const_cast<float*>(&constant)), 0, true});
  for (size_t i = 0; i < program.size(); ++i) {
    const bool sum = i % kFields == 1 && program[i - 1] == kSumOfSquares;
    const size_t limit = i % kFields == 0 ? kSumOfSquares + 1 : sum ? sums.size() : places.size() + registers;
    fits &= program[i] >= 0 && static_cast<size_t>(program[i]) < limit;
  }
  if (!fits) return ffi::Error::InvalidArgument("lionax_one_pass: the program does not fit the buffers");
  // Shared with the threads, of which one may begin when all is done.
  auto pass = std::make_shared<Pass>(std::move(places), program, registers, sums.size(), size);
  const int64_t others = std::min<int64_t>(threads.num_threads(), pass->chunks()) - 1;
  for (int64_t i = 0; i < others; ++i) threads.Schedule([pass] { pass->Work(); });
  pass->Work();
  pass->Wait();
  for (size_t i = 0; i < sums.size(); ++i) *sums[i] = pass->Sum(i);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(lionax_one_pass, OnePass,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<ffi::Span<const int64_t>>("program")
                                  .Attr<ffi::Span<const float>>("constants")
                                  .Attr<int64_t>("registers")
                                  .RemainingArgs()
                                  .RemainingRets());
