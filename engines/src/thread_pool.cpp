#include "thread_pool.hpp"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace tstitch {
namespace {

class Pool {
  public:
    // False when another caller holds the pool.
    bool run(std::int64_t items, int helpers, void (*body)(void*, std::int64_t), void* context) {
        const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        start(helpers);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            items_ = items;
            body_ = body;
            context_ = context;
            next_.store(0, std::memory_order_relaxed);
            wanted_ = std::min(helpers, workers_);
        }
        for (int i = 0; i < std::min(helpers, workers_); ++i) wake_.notify_one();
        take_items();
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;  // a helper that has not woken by now is not waited for
        done_.wait(lock, [this] { return running_ == 0; });
        return true;
    }

  private:
    void start(int helpers) {
        sigset_t all, before;
        sigfillset(&all);  // signals are for the program's own threads
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
        } catch (const std::exception&) {
            // The process may have no more threads or memory: those that started share the work with the caller.
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            ++running_;
            lock.unlock();
            take_items();
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    void take_items() {
        for (;;) {
            const std::int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
            if (item >= items_) return;
            body_(context_, item);
        }
    }

    std::mutex turn_;   // one caller at a time
    std::mutex mutex_;  // guards all below but next_; the work's fields change only while running_ is 0
    std::condition_variable wake_, done_;
    int workers_ = 0, wanted_ = 0, running_ = 0;
    std::int64_t items_ = 0;
    void (*body_)(void*, std::int64_t) = nullptr;
    void* context_ = nullptr;
    std::atomic<std::int64_t> next_{0};
};

// Never destroyed: its detached threads may outlive every static object. After a fork the threads are gone and the
// locks are in whatever state they had, so the child forgets the parent's pool.
std::atomic<Pool*> the_pool{nullptr};

Pool* pool() {
    Pool* found = the_pool.load(std::memory_order_acquire);
    if (found != nullptr) return found;
    static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
    static_cast<void>(registered);
    Pool* made = new Pool;
    if (the_pool.compare_exchange_strong(found, made)) return made;
    delete made;  // another thread was first; this one has started no threads yet
    return found;
}

}  // namespace

void parallel_for(std::int64_t items, int threads, void (*body)(void*, std::int64_t), void* context) {
    const int helpers = static_cast<int>(std::min<std::int64_t>(threads, items)) - 1;
    if (helpers > 0 && pool()->run(items, helpers, body, context)) return;
    for (std::int64_t i = 0; i < items; ++i) body(context, i);
}

int available_threads() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
    return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace tstitch
