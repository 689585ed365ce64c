// Files that are read and written by name, as onnx_kivi/staging.py and paths.py do it: only regular ones are read; what
// is written gets its name when it is complete, and takes the place of a regular file or of nothing.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>

namespace onnx_kivi {

// What the system says.
class SystemError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Throws a SystemError of the errno of this thread.
[[noreturn]] void throw_system_error();

struct CloseFile {
    void operator()(std::FILE* file) const { std::fclose(file); }
};
using FilePtr = std::unique_ptr<std::FILE, CloseFile>;

class RegularFile {
public:
    // Opens it to read. Throws SystemError, also for what would never end or never begin: a FIFO, a device.
    explicit RegularFile(const std::string& path);

    std::FILE* file() const { return file_.get(); }
    int64_t bytes() const { return bytes_; }

private:
    FilePtr file_;
    int64_t bytes_;
};

// A locked file beside its target, gone with this unless it was published. What a killed writer left is locked by
// nobody, and goes when the same name is written next.
class StagedFile {
public:
    // Throws SystemError, also unless `target` is a regular file or a name not in use.
    explicit StagedFile(std::string target);
    ~StagedFile();
    StagedFile(const StagedFile&) = delete;
    StagedFile& operator=(const StagedFile&) = delete;

    std::FILE* file() const { return file_.get(); }
    // Syncs it, and gives it its name. Throws SystemError.
    void publish();

private:
    const std::string target_;
    std::string path_;
    FilePtr file_;
};

}  // namespace onnx_kivi
