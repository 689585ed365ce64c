/* The caches of libonnx_kivi, for programs that run a rewritten model with onnxruntime.
 *
 * Register the library with a session's options (RegisterCustomOpsLibrary_V2 in C, register_custom_ops_library in
 * Python): it serves the ops of domain onnx_kivi. A session keeps its tokens in a cache of its own, its
 * default one, to which each run appends; the graph input `past_length` (int64, 1) drops what lies beyond it: 0
 * starts anew. For several sequences in turn, make caches and feed the handle of one to the graph input
 * `cache_handle` (int64, 1). For several at once, in a model of version 2, feed the handles of as many caches of one
 * row each: row b of the batch is that cache's, whatever it holds. `past_length` then has one number for all or one for
 * each, and `new_length` says how many of a row's tokens, its last ones, are new (-1: all).
 *
 * Every function may be called from any thread. One that fails returns -1, and kivi_last_error() says why.
 */
#ifndef ONNX_KIVI_H
#define ONNX_KIVI_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Handle (> 0) of a new, empty cache. It belongs to the first model that uses it. */
int64_t kivi_new_cache(void);

/* Frees a cache. Returns 0. */
int kivi_free_cache(int64_t handle);

/* Handle of a copy, which shares the memory of sealed blocks: the tokens so far are the common prefix of both. */
int64_t kivi_fork_cache(int64_t handle);

/* Handle of a new cache whose row i is a copy of row rows[i] of cache handles[i], for i < count: it selects, repeats,
 * splits and joins. Copies share the memory of sealed blocks; rows may differ in length. */
int64_t kivi_gather_rows(const int64_t* handles, const int64_t* rows, int64_t count);

/* Row i becomes the old row rows[i], for i < count (beam search). Returns 0. */
int kivi_reorder_cache(int64_t handle, const int64_t* rows, int64_t count);

/* Keeps the first `length` tokens of each row, of shorter rows all. Returns 0. */
int kivi_crop_cache(int64_t handle, int64_t length);

/* Keeps the first lengths[b] tokens of row b; count is the number of rows. Returns 0. */
int kivi_crop_rows(int64_t handle, const int64_t* lengths, int64_t count);

/* Drops all tokens; the cache stays with its model. Returns 0. */
int kivi_reset_cache(int64_t handle);

/* Tokens in the cache, in the row that has most. */
int64_t kivi_cache_length(int64_t handle);

/* Number of rows, 0 for an empty cache; writes the tokens of the first `room` of them to `lengths`. */
int64_t kivi_cache_lengths(int64_t handle, int64_t* lengths, int64_t room);

/* Those of them that are held in quantized form, the least over the model's layers. */
int64_t kivi_cache_sealed_tokens(int64_t handle);

/* Bytes that the tokens take. */
int64_t kivi_cache_nbytes(int64_t handle);

/* Of these, the bytes that another cache, or another row of this one, holds too. */
int64_t kivi_cache_shared_nbytes(int64_t handle);

/* Writes a cache to a file, the same bytes as Cache.save in Python; it gets its name when it is complete and synced.
 * A link, a folder or a device in its place is refused. Returns 0. */
int kivi_save_cache(int64_t handle, const char* path);

/* Handle of a new cache, as it was saved here or in Python. A file that is damaged, or lies, is refused. The cache
 * belongs to the model that it was saved with. */
int64_t kivi_load_cache(const char* path);

/* From now on a SIGINT (Ctrl-C) ends the run that is under way on the calling thread: it fails and its tokens are
 * dropped. The program's own handler is called too. Returns 0, or -1 where there is none, which is no error. */
int kivi_watch_interrupts(void);

/* Why the last call of this thread that failed did so: one line, valid until the next call that fails. */
const char* kivi_last_error(void);

/* The ISA level that attention runs at, or null if ONNX_KIVI_ISA names one that can't run here. */
const char* kivi_isa(void);

#ifdef __cplusplus
}
#endif

#endif
