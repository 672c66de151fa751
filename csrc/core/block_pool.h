// The paged KV cache's bookkeeping: which block belongs to which sequence, and which contents are known.
//
// A sequence is known by a handle; its table lists blocks in the order of positions. Blocks carry reference counts.
// All growth of a step happens in ordered transactions, `admit` and `reserve`.
//
// A full, computed block can be committed: others then find it by a hash of all tokens up to its end. A block is
//
//   unused       no reference, unknown: on a stack, so that memory touched last is reused first
//   held         by tables, and as the source of a queued copy
//   evictable    no reference, but known: in the order of release; handed out, oldest first, when no block is unused
//
// Blocks that are shared or known are never written: only full blocks are shared, a partial one is copied.
//
// With host blocks, an evictable block that is handed out leaves its content in a host slot, and an admission brings
// contents back from there into new device blocks. The pool decides, the executor moves: every move is a `Transfer`,
// in the order of the decisions. Done in that order, each finds what it should, whatever happened to its slot and its
// block since, as long as nothing else of a step is done before the transfers taken for it.
// Single-threaded: only the engine thread calls it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/block_list.h"
#include "core/host_index.h"
#include "core/siphash.h"

namespace llmserve {

struct OutOfBlocks : std::bad_alloc {
  const char* what() const noexcept override { return "no block is free for the copy of a partial block"; }
};

// A sequence's tokens, read in pieces: whoever holds them in another form converts only what is looked at.
class Tokens {
 public:
  virtual ~Tokens() = default;
  virtual int64_t size() const = 0;
  virtual void read(int64_t first, std::span<int32_t> out) const = 0;
};

class TokenSpan final : public Tokens {
 public:
  explicit TokenSpan(std::span<const int32_t> ids) : ids_(ids) {}
  int64_t size() const override { return static_cast<int64_t>(ids_.size()); }
  void read(int64_t first, std::span<int32_t> out) const override;

 private:
  std::span<const int32_t> ids_;
};

struct Admission {
  int64_t handle;
  const Tokens* tokens;
  uint64_t salt;  // separates tenants, adapters, versions
  int64_t num_tokens;
  bool reads_cache;
};

// `target` gets what `source` holds before anything of the step is written. No source is a target.
struct BlockCopy {
  int32_t source, target;
};

enum class TransferKind : uint8_t { kToHost, kToDevice };

// `source` is a device block and `target` a host slot, or the other way round.
struct Transfer {
  TransferKind kind;
  int32_t source, target;
};

class BlockPool {
 public:
  // `hash_key` must be secret: with it, different prefixes of the same hash can be made.
  BlockPool(int32_t num_blocks, int32_t block_size, const Hash128& hash_key = {}, int32_t num_host_blocks = 0);

  // Each call below throws std::invalid_argument, having changed nothing, on an unknown handle or a count that is
  // negative or does not fit.
  int64_t create();
  // Grows each table to cover its number of tokens, in order; stops at the first that does not fit and leaves it and
  // all after it unchanged. Returns how many succeeded.
  size_t reserve(const std::vector<int64_t>& handles, const std::vector<int64_t>& num_tokens);
  // Fills empty tables, in order: the longest known prefix (at least one token is left to compute), then new blocks.
  // What of the prefix is on the host gets new blocks and transfers; it counts as cached like the rest.
  // Stops at the first that does not fit and leaves it untouched. Returns the cached tokens of each admitted one.
  std::vector<int64_t> admit(const std::vector<Admission>& admissions);
  // The tokens `admit` would find.
  int64_t match(const Tokens& tokens, uint64_t salt) const;
  // Makes the full blocks among the first `num_computed` tokens known. One whose content is known already stays
  // private.
  void commit(int64_t handle, const Tokens& tokens, int64_t num_computed);
  // A table that shares the blocks of the first `num_tokens`; a partial last one is copied. Throws OutOfBlocks.
  int64_t fork(int64_t handle, int64_t num_tokens);
  // Throws when it cuts into a block that another sequence holds: it would be written.
  void truncate(int64_t handle, int64_t num_tokens);
  void release(int64_t handle);
  // Like `release`, and nobody finds the blocks of the table any more: what they hold is wrong.
  void discard(int64_t handle);
  const std::vector<int32_t>& table(int64_t handle) const;
  // Forgets all contents. Tables that exist commit nothing more: what they hold is what had to be forgotten.
  void reset_cache();

  // What the next step must do first: the transfers, in their order; then zero the blocks handed out since the last one
  // (0 · NaN is NaN), of which blocks filled from the host are none; then copy. `take_*` or `finish_pending` says that
  // it is done (of transfers `take_transfers` alone); until then copies hold their sources.
  std::vector<Transfer> take_transfers() { return std::exchange(transfers_, {}); }
  std::vector<int32_t> new_blocks() const;
  const std::vector<BlockCopy>& copies() const { return copies_; }
  std::vector<int32_t> take_new_blocks();
  std::vector<BlockCopy> take_copies();
  void finish_pending();
  bool is_new(int32_t block) const { return at(block).is_new; }
  // The same for a step that zeroed only these: the others stay new until a step reaches them.
  void finish_pending(const std::vector<int32_t>& zeroed);

  // Throws std::runtime_error when tables, references, free blocks and index disagree.
  void check_integrity() const;

  int32_t num_blocks() const { return static_cast<int32_t>(blocks_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(unused_.size()) + evictable_.size(); }
  int32_t num_cached() const { return static_cast<int32_t>(index_.size()); }
  int32_t num_host_blocks() const { return host_.num_slots(); }
  int32_t num_host_cached() const { return host_.num_known(); }
  // Blocks brought back from there so far.
  int64_t num_host_hits() const { return num_host_hits_; }
  int32_t block_size() const { return block_size_; }

 private:
  struct Block {
    int32_t references = 0;
    bool is_known = false;   // `hash` is in the index and leads here
    bool is_new = false;     // must be zeroed
    bool is_listed = false;  // stands in new_blocks_
    Hash128 hash;
  };
  struct Table {
    std::vector<int32_t> blocks;
    std::vector<Hash128> hashes;  // of the committed blocks, which are the first ones
    uint64_t salt = 0;
    bool may_commit = true;
  };
  struct HostHit {
    size_t number;  // in the prefix
    int32_t slot;
  };
  struct Prefix {
    std::vector<int32_t> blocks;  // kOnHost for what is in `host_hits`
    std::vector<Hash128> hashes;
    std::vector<HostHit> host_hits;
  };
  static constexpr int32_t kOnHost = -1;

  Block& at(int32_t block) { return blocks_[static_cast<size_t>(block)]; }
  const Block& at(int32_t block) const { return blocks_[static_cast<size_t>(block)]; }
  Table& find(int64_t handle);
  const Table& find(int64_t handle) const;
  int64_t insert(Table table);
  int64_t blocks_for(int64_t num_tokens) const;
  Hash128 hash_block(const Hash128& parent, uint64_t salt, const Tokens& tokens, int64_t number) const;
  Prefix find_prefix(const Tokens& tokens, uint64_t salt) const;
  void check_admissions(const std::vector<Admission>& admissions) const;
  bool admit_one(const Admission& admission);
  bool is_evictable(int32_t block) const { return block != kOnHost && evictable_.contains(block); }
  void bring_back(Prefix& prefix);
  void forget_new_blocks();
  int32_t allocate();
  void grow(std::vector<int32_t>& blocks, int64_t num_blocks);
  void hold(int32_t block);
  void drop(int32_t block);
  void make_known(int32_t block, const Hash128& hash);
  void offload(int32_t block);
  void forget(int32_t block);
  void open_for_writing(int32_t block);
  int32_t copy_of(int32_t block);
  void check_references() const;
  void check_free() const;
  void check_index() const;

  int32_t block_size_;
  Hash128 hash_key_;
  std::vector<Block> blocks_;
  std::vector<int32_t> unused_;
  BlockList evictable_;
  std::unordered_map<Hash128, int32_t, LowBits> index_;
  HostIndex host_;
  std::vector<Transfer> transfers_;
  int64_t num_host_hits_ = 0;
  std::vector<int32_t> new_blocks_;  // candidates, each once; `is_new` decides
  std::vector<BlockCopy> copies_;
  std::unordered_map<int64_t, Table> tables_;
  int64_t next_handle_ = 1;
  mutable std::vector<int32_t> message_;  // what hash_block hashes
};

}  // namespace llmserve
