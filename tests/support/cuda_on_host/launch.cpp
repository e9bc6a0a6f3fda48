// cuda_driver.cu compiled by a host compiler, and a `launch` that walks the grid: blocks one after another, the first
// or the last first; the threads of a block one after another, or, in kernels that meet at __syncthreads, as real
// threads. It shows that indices, bounds and argument order are right, and, walked both ways, that no block needs what
// another block of its launch writes; it can't show what the GPU's rounding is.
#include <pthread.h>

#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

struct Index {
    int x, y;
};
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static pthread_barrier_t barrier;
extern "C" int backwards;
int backwards = 0;  // the last block first

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
static inline void __syncthreads() { pthread_barrier_wait(&barrier); }
static inline int min(int a, int b) { return a < b ? a : b; }

#include "cuda_driver.cu"

template <typename... A, std::size_t... I>
static void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

template <typename... A>
static void walk(void (*kernel)(A...), bool meets, void** arguments) {
    auto one = [&](int block_x, int block_y, int thread) {
        blockIdx = {block_x, block_y};
        threadIdx = {thread, 0};
        call(kernel, arguments, std::index_sequence_for<A...>{});
    };
    const int blocks = gridDim.x * gridDim.y;
    for (int block = 0; block < blocks; ++block) {
        const int place = backwards ? blocks - 1 - block : block, x = place % gridDim.x, y = place / gridDim.x;
        if (!meets) {
            for (int t = 0; t < blockDim.x; ++t) one(x, y, t);
            continue;
        }
        pthread_barrier_init(&barrier, nullptr, static_cast<unsigned>(blockDim.x));
        std::vector<std::thread> threads;
        for (int t = 0; t < blockDim.x; ++t) threads.emplace_back(one, x, y, t);
        for (std::thread& thread : threads) thread.join();
        pthread_barrier_destroy(&barrier);
    }
}

template <typename... A>
static int run(void (*kernel)(A...), bool meets, int count, void** arguments) {
    if (count != static_cast<int>(sizeof...(A))) return static_cast<int>(sizeof...(A));
    walk(kernel, meets, arguments);
    return count;
}

// Returns the number of arguments that the kernel called `name` takes, or -1 when there is none; runs it only when
// `count` is that number.
extern "C" int launch(const char* name, int grid_x, int grid_y, int threads, int count, void** arguments) {
    gridDim = {grid_x, grid_y};
    blockDim = {threads, 1};
    const std::string wanted = name;
#define RUN(kernel, meets) \
    if (wanted == #kernel) return run(&kernel, meets, count, arguments);
#define RUN_ALL(dtype)                    \
    RUN(prepare_##dtype##_float32, false) \
    RUN(prepare_##dtype##_int64, false)   \
    RUN(guidance_factor_##dtype, true)    \
    RUN(advance_##dtype, false)
    RUN_ALL(float32)
    RUN_ALL(float16)
    RUN_ALL(bfloat16)
    RUN(gather_rows, false)
    RUN(initial_noise, false)
    RUN(scaled_copy, false)
    return -1;
}
