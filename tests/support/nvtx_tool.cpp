// A tool that NVTX loads in place of Nsight Systems ($NVTX_INJECTION64_PATH): it writes the ranges to $NVTX_TOOL_LOG.
// The layouts and numbers are those of NVTX 3's public interface.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

struct Callbacks {
    std::size_t size;
    int (*table)(int module, void**** functions, unsigned* count);
};

struct Attributes {
    std::uint16_t version, size;
    std::uint32_t category;
    std::int32_t color_type;
    std::uint32_t color;
    std::int32_t payload_type, reserved;
    std::uint64_t payload;
    std::int32_t message_type;  // 1: text, 3: registered, which here is the text too
    const char* message;
};

std::FILE* log_file;
std::atomic<std::uint64_t> ranges{0};

std::uint64_t start(void* domain, const Attributes* attributes) {
    const std::uint64_t id = ++ranges;
    const auto* name = static_cast<const char*>(domain);
    std::fprintf(log_file, "start %llu %s %s\n", static_cast<unsigned long long>(id), name, attributes->message);
    std::fflush(log_file);
    return id;
}

void end(void*, std::uint64_t id) {
    std::fprintf(log_file, "end %llu\n", static_cast<unsigned long long>(id));
    std::fflush(log_file);
}

void* keep(const char* text) {
    char* copy = nullptr;
    return asprintf(&copy, "%s", text) < 0 ? nullptr : copy;
}

void* register_string(void*, const char* text) { return keep(text); }

}  // namespace

extern "C" int InitializeInjectionNvtx2(const void* (*export_table)(std::uint32_t)) {
    const char* path = std::getenv("NVTX_TOOL_LOG");
    const auto* callbacks = static_cast<const Callbacks*>(export_table(1));
    void*** functions = nullptr;
    unsigned count = 0;
    constexpr int domains = 5;  // the module of functions with a domain
    if (path == nullptr || callbacks == nullptr || callbacks->table(domains, &functions, &count) == 0 || count < 13) {
        return 0;
    }
    log_file = std::fopen(path, "w");
    *functions[2] = reinterpret_cast<void*>(start);
    *functions[3] = reinterpret_cast<void*>(end);
    *functions[10] = reinterpret_cast<void*>(register_string);
    *functions[12] = reinterpret_cast<void*>(keep);
    return log_file != nullptr;
}
