#include "cache_file.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>

#include "../store/canonical.hpp"
#include "../store/import.hpp"
#include "header.hpp"
#include "sha256.hpp"
#include "staged.hpp"

namespace onnx_kivi {

namespace {

static_assert(std::endian::native == std::endian::little, "numbers in a file are little-endian");

constexpr char MAGIC[] = {'K', 'I', 'V', 'I', 'K', 'V'};
constexpr int64_t DIGEST_BYTES = std::tuple_size_v<Sha256::Digest>;
constexpr uint64_t LARGEST_HEADER = 1 << 26;

struct Prefix {
    char magic[sizeof MAGIC];
    uint16_t version;
    uint64_t header_bytes;
};

static_assert(sizeof(Prefix) == 16, "as a file begins");

std::string text(uint64_t value) { return std::to_string(value); }

void check_header_bytes(uint64_t bytes) {
    if (bytes <= LARGEST_HEADER) return;
    throw_cache_error("expected a header of at most " + text(LARGEST_HEADER) + " bytes, got " + text(bytes) +
                      "; it may be damaged");
}

class Writer {
public:
    explicit Writer(std::FILE* file) : file_(file) {}

    void put(const void* data, std::size_t bytes) {
        if (bytes == 0) return;  // `data` may be null, which fwrite forbids
        digest_.update(data, bytes);
        write(data, bytes);
    }

    void put_digest() {
        const Sha256::Digest digest = digest_.digest();
        write(digest.data(), digest.size());
    }

    // The keys and values of dense tokens.
    template <class Export>
    void put_tokens(const SlotShape& shape, int64_t tokens, const Export& export_to) {
        if (tokens == 0) return;
        const auto count = [&](int64_t size) { return static_cast<std::size_t>(shape.kv_heads * tokens * size); };
        std::vector<float> key(count(shape.k_size)), value(count(shape.v_size));
        export_to(TokensState{key.data(), value.data(), tokens});
        put(key.data(), key.size() * sizeof(float));
        put(value.data(), value.size() * sizeof(float));
    }

    void put_block(const SlotLayout& layout, const Block& block) {
        Memory key, value;
        export_block(
            layout, block,
            {side(key, layout, true, block.dense & KEY_DENSE), side(value, layout, false, block.dense & VALUE_DENSE)});
        for (const Memory* parts : {&key, &value}) {
            for (const auto& part : *parts) put(part.data(), part.size());
        }
    }

private:
    using Memory = std::vector<std::vector<unsigned char>>;

    static SideState side(Memory& memory, const SlotLayout& layout, bool key, bool dense) {
        std::vector<void*> data;
        for (const Part& part : side_parts(layout, key, dense)) {
            const int64_t bytes = element_bytes(part.element) * elements(part);
            void* const own = memory.emplace_back(static_cast<std::size_t>(bytes)).data();
            data.push_back(bytes > 0 ? own : nullptr);
        }
        return side_state(data, dense);
    }

    void write(const void* data, std::size_t bytes) {
        if (std::fwrite(data, 1, bytes, file_) != bytes) throw_system_error();
    }

    std::FILE* const file_;
    Sha256 digest_;
};

// Takes bytes off the front of a file, never more than it has, and checks their sum at the end.
class Reader {
public:
    Reader(std::FILE* file, int64_t bytes)
        : file_(file), left_(static_cast<uint64_t>(std::max<int64_t>(bytes - DIGEST_BYTES, 0))) {}

    Prefix prefix() {
        Prefix prefix{};
        if (left_ >= sizeof prefix) take(&prefix, sizeof prefix);
        if (std::memcmp(prefix.magic, MAGIC, sizeof MAGIC) != 0) {
            throw_cache_error("expected a cache file of onnx_kivi, got something else, or only its beginning");
        }
        return prefix;
    }

    std::string header(uint64_t bytes) {
        check_left(bytes, "a header");
        std::string text(bytes, '\0');
        take(text.data(), bytes);
        return text;
    }

    // The next array, which lives as long as this.
    ArrayView array(Element element, std::vector<int64_t> shape) {
        const auto bytes = static_cast<uint64_t>(element_bytes(element)) * count(element, shape);
        auto data = std::make_unique_for_overwrite<unsigned char[]>(bytes);
        take(data.get(), bytes);
        held_.push_back(std::move(data));
        return {held_.back().get(), element_name(element), std::move(shape), true};
    }

    SideArrays side(const SlotLayout& layout, bool key, bool dense) {
        std::vector<ArrayView> arrays;
        for (Part& part : side_parts(layout, key, dense)) arrays.push_back(array(part.element, std::move(part.shape)));
        return side_arrays(arrays, dense);
    }

    void finish() {
        if (left_ > 0)
            throw_cache_error("expected no more bytes of arrays, got " + text(left_) + ": the file is damaged");
        Sha256::Digest said{};
        const bool is_whole = std::fread(said.data(), 1, said.size(), file_) == said.size();
        if (is_whole && said == digest_.digest()) return;
        throw_cache_error("expected content that agrees with its checksum, got a damaged or truncated file");
    }

private:
    // Elements of an array that the file has room for.
    uint64_t count(Element element, const std::vector<int64_t>& shape) const {
        if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
        const uint64_t most = left_ / static_cast<uint64_t>(element_bytes(element));
        uint64_t count = 1;
        for (const int64_t size : shape) {
            if (count > most / static_cast<uint64_t>(size)) refuse_more("more", "bytes of arrays");
            count *= static_cast<uint64_t>(size);
        }
        return count;
    }

    void check_left(uint64_t bytes, const char* what) const {
        if (bytes > left_) refuse_more(text(bytes) + " more", what);
    }

    [[noreturn]] void refuse_more(const std::string& more, const char* what) const {
        throw_cache_error("expected " + more + " bytes (" + what + "), got " + text(left_) +
                          ": the file is damaged or truncated");
    }

    void take(void* to, uint64_t bytes) {
        if (std::fread(to, 1, bytes, file_) != bytes) {
            if (std::ferror(file_)) throw_system_error();
            refuse_more(text(bytes) + " more", "that it had a moment ago");
        }
        digest_.update(to, bytes);
        left_ -= bytes;
    }

    std::FILE* const file_;
    uint64_t left_;
    Sha256 digest_;
    std::vector<std::unique_ptr<unsigned char[]>> held_;
};

RowArrays read_row(Reader& reader, const RowOptions& options, const RowHeader& row) {
    const auto tokens = [&](int64_t count, int64_t size) {
        return reader.array(Element::float32, {row.heads, count, size});
    };
    const SlotLayout layout = make_slot_layout(options, row.heads, row.k_size, row.v_size);
    RowArrays arrays;
    arrays.sink_key = tokens(row.sinks, row.k_size);
    arrays.sink_value = tokens(row.sinks, row.v_size);
    arrays.freed = row.freed;
    for (std::size_t i = 0; i < row.blocks.size(); i += 2) {
        BlockArrays& block = arrays.blocks.emplace_back();
        block.key = reader.side(layout, true, row.blocks[i] == 'd');
        block.value = reader.side(layout, false, row.blocks[i + 1] == 'd');
    }
    arrays.residual_key = tokens(row.residual, row.k_size);
    arrays.residual_value = tokens(row.residual, row.v_size);
    return arrays;
}

Header read_header(Reader& reader) {
    const Prefix prefix = reader.prefix();
    if (prefix.version < FIRST_FORMAT || prefix.version > LAST_FORMAT) {
        throw_cache_error("expected format version 1 or 2, got " + text(prefix.version) +
                          "; load it with the newer onnx_kivi that saved it");
    }
    check_header_bytes(prefix.header_bytes);
    return parse_header(reader.header(prefix.header_bytes), prefix.version);
}

}  // namespace

void write_cache(std::FILE* file, const State& state) {
    const Header header = header_of(state);
    const int64_t version = least_version(header);
    const std::string text = header_text(header, version);
    check_header_bytes(text.size());
    Prefix prefix{{}, static_cast<uint16_t>(version), text.size()};
    std::memcpy(prefix.magic, MAGIC, sizeof MAGIC);
    Writer writer(file);
    writer.put(&prefix, sizeof prefix);
    writer.put(text.data(), text.size());
    for (const auto& [index, slot] : state.slots) {
        for (const Row& row : slot.rows) {
            const SlotLayout& layout = *slot.layout;
            writer.put_tokens(layout.sinks.shape, row.sink_tokens(layout),
                              [&](const TokensState& to) { export_sinks(layout, row, to); });
            for (int64_t i = 0; i < row.sealed_blocks(); ++i) writer.put_block(layout, row.block(i));
            writer.put_tokens(layout.blocks.shape, row.residual_tokens(layout),
                              [&](const TokensState& to) { export_residual(layout, row, to); });
        }
    }
    writer.put_digest();
}

State read_cache(std::FILE* file, int64_t bytes) {
    Reader reader(file, bytes);
    const Header header = read_header(reader);
    StateArrays state{header.step, header.lengths, {}};
    for (const SlotHeader& from : header.slots) {
        SlotArrays& slot = state.slots.emplace_back(SlotArrays{from.attributes, {}});
        for (const RowHeader& row : from.rows) slot.rows.push_back(read_row(reader, from.attributes.row, row));
    }
    reader.finish();
    return import_state(state);
}

void save_cache(const std::string& path, const State& state) {
    try {
        StagedFile staged(path);
        write_cache(staged.file(), state);
        staged.publish();
    } catch (const std::exception& error) {
        throw_cache_error(path + ": expected a place where the cache can be written, got: " + error.what());
    }
}

State load_cache(const std::string& path) {
    try {
        const RegularFile source(path);
        return read_cache(source.file(), source.bytes());
    } catch (const std::bad_alloc&) {
        throw_cache_error(path + ": expected a cache that fits in memory, got a larger one");
    } catch (const SystemError& error) {
        throw_cache_error(path + ": expected a cache file, got: " + error.what());
    } catch (const Error& error) {
        throw_cache_error(path + ": " + error.what());
    }
}

}  // namespace onnx_kivi
