// Fuzzes the reader of cache files: whatever a file says under a right checksum, it is refused in words, or makes a
// cache that saves as the same file. An input is a version, the header up to a line break, then the arrays.
#include <algorithm>
#include <cstring>

#include "../../../custom_ops/files/cache_file.hpp"
#include "../../../custom_ops/files/sha256.hpp"
#include "../../../custom_ops/store/store.hpp"

using namespace onnx_kivi;

namespace {

std::string file_of(const uint8_t* data, std::size_t size) {
    const uint8_t* const end = data + size;
    const uint8_t* const header_end = std::find(data + 1, end, '\n');
    const auto header_bytes = static_cast<uint64_t>(header_end - data - 1);
    const auto version = static_cast<uint16_t>(data[0] - '0');
    std::string file = "KIVIKV";
    file.append(reinterpret_cast<const char*>(&version), sizeof version);
    file.append(reinterpret_cast<const char*>(&header_bytes), sizeof header_bytes);
    file.append(data + 1, header_end);
    if (header_end != end) file.append(header_end + 1, end);
    Sha256 sha256;
    sha256.update(file.data(), file.size());
    const Sha256::Digest digest = sha256.digest();
    return file.append(digest.begin(), digest.end());
}

State read(std::string& file) {
    std::FILE* const opened = fmemopen(file.data(), file.size(), "r");
    try {
        State state = read_cache(opened, static_cast<int64_t>(file.size()));
        std::fclose(opened);
        return state;
    } catch (...) {
        std::fclose(opened);
        throw;
    }
}

std::string written(const State& state) {
    char* data = nullptr;
    std::size_t size = 0;
    std::FILE* const opened = open_memstream(&data, &size);
    write_cache(opened, state);
    std::fclose(opened);
    const std::string file(data, size);
    std::free(data);
    return file;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
    if (size == 0) return 0;
    std::string file = file_of(data, size);
    try {
        const State state = read(file);
        if (written(state) != file) __builtin_trap();
        const int64_t handle = new_cache(state);
        if (nbytes(state) < 0 || cache_length(handle) != state.length()) __builtin_trap();
        close_cache(handle);
    } catch (const Error&) {
    }
    return 0;
}
