#include "staged.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>

namespace onnx_kivi {

namespace {

constexpr const char* SUFFIX = ".kivi-part";

const char* kind(mode_t mode) {
    switch (mode & S_IFMT) {
        case S_IFREG: return "a regular file";
        case S_IFDIR: return "a folder";
        case S_IFLNK: return "a symbolic link";
        case S_IFIFO: return "a FIFO";
        case S_IFSOCK: return "a socket";
        case S_IFCHR:
        case S_IFBLK: return "a device";
        default: return "something unknown";
    }
}

std::string folder_of(const std::string& path) {
    const std::size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

std::string name_of(const std::string& path) { return path.substr(path.rfind('/') + 1); }

void check_target(const std::string& target) {
    struct stat status;
    if (lstat(target.c_str(), &status) == 0) {
        if (S_ISREG(status.st_mode)) return;
        throw SystemError(std::string("expected a regular file, or a name not in use, got ") + kind(status.st_mode));
    }
    if (errno != ENOENT) throw_system_error();
    const std::string folder = folder_of(target);
    if (stat(folder.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) {
        throw SystemError("expected an existing folder, got " + folder + "; create it first");
    }
}

// Removes what killed writers of this name left.
void sweep(const std::string& target) {
    const std::string folder = folder_of(target), prefix = "." + name_of(target) + ".";
    const std::unique_ptr<DIR, int (*)(DIR*)> entries(opendir(folder.c_str()), closedir);
    if (!entries) return;
    while (const dirent* entry = readdir(entries.get())) {
        const std::string name = entry->d_name;
        if (!name.starts_with(prefix) || !name.ends_with(SUFFIX)) continue;
        const std::string left = folder + "/" + name;
        const int lock = open(left.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        if (lock < 0) continue;
        if (flock(lock, LOCK_EX | LOCK_NB) == 0) unlink(left.c_str());
        close(lock);
    }
}

std::string new_name(const std::string& target) {
    static constexpr char digits[] = "0123456789abcdef";
    std::random_device random;
    std::string middle;
    for (int i = 0; i < 8; ++i) middle += digits[random() % 16];
    return folder_of(target) + "/." + name_of(target) + "." + middle + SUFFIX;
}

// A new file, open and locked; `path` becomes its name.
std::FILE* make_locked(const std::string& target, std::string& path) {
    while (true) {
        path = new_name(target);
        const int made = open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (made < 0 && errno == EEXIST) continue;
        if (made < 0) throw_system_error();
        flock(made, LOCK_EX);  // fails on a file system without locks, where nothing is swept
        struct stat status;
        std::FILE* const file = stat(path.c_str(), &status) == 0 ? fdopen(made, "w") : nullptr;
        if (file) return file;
        close(made);  // another writer swept it away before it was locked
    }
}

// Has the new name on the disk, where folders can be synced.
void sync_folder(const std::string& folder) {
    const int handle = open(folder.c_str(), O_RDONLY | O_CLOEXEC);
    if (handle < 0) return;
    fsync(handle);
    close(handle);
}

}  // namespace

void throw_system_error() { throw SystemError(std::strerror(errno)); }

RegularFile::RegularFile(const std::string& path) {
    struct stat status;
    if (stat(path.c_str(), &status) != 0) throw_system_error();
    if (!S_ISREG(status.st_mode))
        throw SystemError(std::string("expected a regular file, got ") + kind(status.st_mode));
    file_.reset(std::fopen(path.c_str(), "rbe"));
    if (!file_ || fstat(fileno(file_.get()), &status) != 0) throw_system_error();
    bytes_ = status.st_size;
}

StagedFile::StagedFile(std::string target) : target_(std::move(target)) {
    check_target(target_);
    sweep(target_);
    file_.reset(make_locked(target_, path_));
}

StagedFile::~StagedFile() {
    if (!path_.empty()) unlink(path_.c_str());
}

void StagedFile::publish() {
    if (std::fflush(file_.get()) != 0 || fsync(fileno(file_.get())) != 0) throw_system_error();
    if (std::rename(path_.c_str(), target_.c_str()) != 0) throw_system_error();
    path_.clear();
    sync_folder(folder_of(target_));
}

}  // namespace onnx_kivi
