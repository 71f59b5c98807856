// What the vector units of this machine can do at most: multiply-adds, or bf16 dot products, on registers alone.
//
// `run` does `iterations` rounds on each thread of a team; `flops_per_iteration` says how much work a round is. There are
// enough independent accumulators to cover the latency of any unit of today.

#include <cstdint>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int bytes = 64;
constexpr int accumulators = 24;
#elif defined(__AVX__)
constexpr int bytes = 32;
constexpr int accumulators = 12;
#elif defined(__aarch64__)
constexpr int bytes = 16;
constexpr int accumulators = 24;
#else
constexpr int bytes = 16;
constexpr int accumulators = 12;
#endif

constexpr int lanes = bytes / sizeof(float);
typedef float Vector __attribute__((vector_size(bytes)));

struct Task {
    int64_t iterations;
    int64_t is_dot;
};

inline Vector filled(float value) {
    return value - Vector{};
}

template <class Step>
void loop(Task* task, Step step) {
    // Loops over the accumulators are unrolled in full, so that each is a register. Without leave to reassociate, a
    // compiler can neither merge rounds nor skip one.
    Vector total[accumulators];
#pragma GCC unroll 24
    for (int i = 0; i < accumulators; ++i) total[i] = filled(float(i));
    for (int64_t n = 0; n < task->iterations; ++n) {
#pragma GCC unroll 24
        for (int i = 0; i < accumulators; ++i) total[i] = step(total[i]);
    }
    Vector sum = total[0];
#pragma GCC unroll 24
    for (int i = 1; i < accumulators; ++i) sum += total[i];
    // Never read, yet what is written here must have been computed.
    volatile float sink = sum[0];
    (void)sink;
}

void fma_loop(Task* task) {
    const Vector a = filled(0.999f), b = filled(0.001f);
    loop(task, [=](Vector total) { return total * a + b; });
}

#if defined(__AVX512BF16__)
void dot_loop(Task* task) {
    const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
    loop(task, [=](Vector total) { return (Vector)_mm512_dpbf16_ps((__m512)total, a, a); });
}
constexpr bool has_dot = true;
#else
void dot_loop(Task* task) { fma_loop(task); }
constexpr bool has_dot = false;
#endif

void one_thread(void* argument) {
    Task* task = static_cast<Task*>(argument);
    task->is_dot ? dot_loop(task) : fma_loop(task);
}

}  // namespace

extern "C" {

// Whether `is_dot` means anything here.
int64_t has_dot_units() { return has_dot; }

int64_t flops_per_iteration(int64_t is_dot) { return int64_t(accumulators) * lanes * 2 * (is_dot && has_dot ? 2 : 1); }

// `parallel` is GOMP_parallel of the OpenMP runtime in use, or null for the calling thread alone.
void run(int64_t iterations, int64_t is_dot, void* parallel, int64_t threads) {
    Task task{iterations, is_dot};
    if (parallel == nullptr || threads == 1) {
        one_thread(&task);
        return;
    }
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    reinterpret_cast<Parallel>(parallel)(one_thread, &task, unsigned(threads), 0);
}
}
