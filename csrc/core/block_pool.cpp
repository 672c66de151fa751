#include "core/block_pool.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <unordered_set>

namespace llmserve {

namespace {
constexpr size_t kMessageHeader = 6;  // parent's hash and salt, in 32-bit words
}

void TokenSpan::read(int64_t first, std::span<int32_t> out) const {
  std::copy_n(ids_.begin() + first, out.size(), out.begin());
}

BlockPool::BlockPool(int32_t num_blocks, int32_t block_size, const Hash128& hash_key, int32_t num_host_blocks)
    : block_size_(block_size), hash_key_(hash_key), evictable_(std::max(num_blocks, 0)), host_(num_host_blocks) {
  if (num_blocks <= 0) throw std::invalid_argument("num_blocks: must be positive");
  if (block_size <= 0) throw std::invalid_argument("block_size: must be positive");
  blocks_.resize(static_cast<size_t>(num_blocks));
  unused_.reserve(static_cast<size_t>(num_blocks));
  for (int32_t block = num_blocks - 1; block >= 0; --block) unused_.push_back(block);
  message_.resize(kMessageHeader + static_cast<size_t>(block_size));
}

int64_t BlockPool::create() { return insert({}); }

size_t BlockPool::reserve(const std::vector<int64_t>& handles, const std::vector<int64_t>& num_tokens) {
  if (handles.size() != num_tokens.size()) throw std::invalid_argument("num_tokens: one entry per handle expected");
  for (size_t i = 0; i < handles.size(); ++i) find(handles[i]), blocks_for(num_tokens[i]);
  for (size_t i = 0; i < handles.size(); ++i) {
    std::vector<int32_t>& blocks = find(handles[i]).blocks;
    const int64_t needed = blocks_for(num_tokens[i]);
    if (needed - static_cast<int64_t>(blocks.size()) > num_free()) return i;
    grow(blocks, needed);
  }
  return handles.size();
}

std::vector<int64_t> BlockPool::admit(const std::vector<Admission>& admissions) {
  check_admissions(admissions);
  std::vector<int64_t> num_cached;
  for (const Admission& admission : admissions) {
    if (!admit_one(admission)) break;
    num_cached.push_back(static_cast<int64_t>(find(admission.handle).hashes.size()) * block_size_);
  }
  return num_cached;
}

void BlockPool::check_admissions(const std::vector<Admission>& admissions) const {
  std::unordered_set<int64_t> seen;
  for (const Admission& admission : admissions) {
    if (!find(admission.handle).blocks.empty() || !seen.insert(admission.handle).second)
      throw std::invalid_argument("handles: only empty tables can be admitted");
    blocks_for(admission.num_tokens);
  }
}

bool BlockPool::admit_one(const Admission& admission) {
  Prefix prefix = admission.reads_cache ? find_prefix(*admission.tokens, admission.salt) : Prefix{};
  const int64_t needed = blocks_for(admission.num_tokens), num_matched = std::ssize(prefix.blocks);
  // Matched blocks that nobody holds stop being free: they cannot be handed out for the rest.
  const auto matched_free =
      std::count_if(prefix.blocks.begin(), prefix.blocks.end(), [this](int32_t block) { return is_evictable(block); });
  const int64_t num_new = std::max(needed, num_matched) - (num_matched - std::ssize(prefix.host_hits));
  if (num_new > num_free() - matched_free) return false;
  for (const int32_t block : prefix.blocks)
    if (block != kOnHost) hold(block);
  bring_back(prefix);
  Table& table = find(admission.handle);
  table.salt = admission.salt;
  table.hashes = std::move(prefix.hashes);
  table.blocks = std::move(prefix.blocks);
  grow(table.blocks, needed);
  return true;
}

// Each new block may evict another into the host; what is still to be read there is pinned until its turn. What was
// read stays on the host: evicted again soon, its block costs no transfer. As the coldest it takes nobody's place.
void BlockPool::bring_back(Prefix& prefix) {
  num_host_hits_ += std::ssize(prefix.host_hits);
  for (const HostHit& hit : prefix.host_hits) host_.pin(hit.slot);
  for (const HostHit& hit : prefix.host_hits) {
    const int32_t block = allocate();
    at(block).is_new = false;
    transfers_.push_back({TransferKind::kToDevice, hit.slot, block});
    make_known(block, prefix.hashes[hit.number]);
    host_.unpin_as_coldest(hit.slot);
    prefix.blocks[hit.number] = block;
  }
}

int64_t BlockPool::match(const Tokens& tokens, uint64_t salt) const {
  return static_cast<int64_t>(find_prefix(tokens, salt).blocks.size()) * block_size_;
}

void BlockPool::commit(int64_t handle, const Tokens& tokens, int64_t num_computed) {
  Table& table = find(handle);
  if (blocks_for(num_computed) > static_cast<int64_t>(table.blocks.size()) || num_computed > tokens.size())
    throw std::invalid_argument("num_computed: more than the table or the tokens hold");
  if (!table.may_commit) return;
  const int64_t num_full = num_computed / block_size_;
  for (auto number = static_cast<int64_t>(table.hashes.size()); number < num_full; ++number) {
    const Hash128 parent = table.hashes.empty() ? Hash128{} : table.hashes.back();
    const Hash128 hash = hash_block(parent, table.salt, tokens, number);
    table.hashes.push_back(hash);
    make_known(table.blocks[static_cast<size_t>(number)], hash);
  }
}

int64_t BlockPool::fork(int64_t handle, int64_t num_tokens) {
  const Table& parent = find(handle);
  if (blocks_for(num_tokens) > static_cast<int64_t>(parent.blocks.size()))
    throw std::invalid_argument("num_tokens: more than the table holds");
  const auto num_full = static_cast<size_t>(num_tokens / block_size_);
  const bool has_rest = num_tokens % block_size_ != 0;
  if (has_rest && num_free() == 0) throw OutOfBlocks();
  Table child;
  child.salt = parent.salt;
  child.may_commit = parent.may_commit;
  child.hashes.assign(parent.hashes.begin(),
                      parent.hashes.begin() + static_cast<int64_t>(std::min(num_full, parent.hashes.size())));
  child.blocks.assign(parent.blocks.begin(), parent.blocks.begin() + static_cast<int64_t>(num_full));
  for (const int32_t block : child.blocks) hold(block);
  if (has_rest) child.blocks.push_back(copy_of(parent.blocks[num_full]));
  return insert(std::move(child));
}

void BlockPool::truncate(int64_t handle, int64_t num_tokens) {
  Table& table = find(handle);
  const auto kept = static_cast<size_t>(blocks_for(num_tokens));
  const auto num_full = static_cast<size_t>(num_tokens / block_size_);
  if (num_full < kept && kept <= table.blocks.size()) open_for_writing(table.blocks[num_full]);
  if (table.hashes.size() > num_full) table.hashes.resize(num_full);
  while (table.blocks.size() > kept) {
    drop(table.blocks.back());
    table.blocks.pop_back();
  }
}

void BlockPool::release(int64_t handle) {
  truncate(handle, 0);
  tables_.erase(handle);
}

void BlockPool::discard(int64_t handle) {
  for (const int32_t block : find(handle).blocks) {
    if (at(block).is_known) host_.forget(at(block).hash);
    forget(block);
  }
  release(handle);
}

const std::vector<int32_t>& BlockPool::table(int64_t handle) const { return find(handle).blocks; }

void BlockPool::reset_cache() {
  for (const auto& [hash, block] : index_) at(block).is_known = false;
  index_.clear();
  host_.clear();
  while (evictable_.size() > 0) unused_.push_back(evictable_.pop_oldest());
  for (auto& [handle, table] : tables_) {
    table.hashes.clear();
    table.may_commit = false;
  }
}

std::vector<int32_t> BlockPool::new_blocks() const {
  std::vector<int32_t> blocks;
  std::copy_if(new_blocks_.begin(), new_blocks_.end(), std::back_inserter(blocks),
               [this](int32_t block) { return at(block).is_new; });
  return blocks;
}

std::vector<int32_t> BlockPool::take_new_blocks() {
  std::vector<int32_t> blocks = new_blocks();
  forget_new_blocks();
  return blocks;
}

std::vector<BlockCopy> BlockPool::take_copies() {
  std::vector<BlockCopy> copies;
  copies.swap(copies_);
  for (const BlockCopy& copy : copies) drop(copy.source);
  return copies;
}

void BlockPool::finish_pending() {
  forget_new_blocks();
  if (!copies_.empty()) take_copies();
}

void BlockPool::finish_pending(const std::vector<int32_t>& zeroed) {
  for (const int32_t block : zeroed) at(block).is_new = false;
  std::erase_if(new_blocks_, [this](int32_t block) {
    Block& state = at(block);
    if (!state.is_new) state.is_listed = false;
    return !state.is_new;
  });
  if (!copies_.empty()) take_copies();
}

void BlockPool::forget_new_blocks() {
  for (const int32_t block : new_blocks_) at(block).is_new = at(block).is_listed = false;
  new_blocks_.clear();
}

const BlockPool::Table& BlockPool::find(int64_t handle) const {
  const auto found = tables_.find(handle);
  if (found == tables_.end()) throw std::invalid_argument("handle: unknown sequence " + std::to_string(handle));
  return found->second;
}

BlockPool::Table& BlockPool::find(int64_t handle) {
  return const_cast<Table&>(static_cast<const BlockPool*>(this)->find(handle));
}

int64_t BlockPool::insert(Table table) {
  tables_.emplace(next_handle_, std::move(table));
  return next_handle_++;
}

int64_t BlockPool::blocks_for(int64_t num_tokens) const {
  if (num_tokens < 0) throw std::invalid_argument("num_tokens: must not be negative");
  return num_tokens / block_size_ + (num_tokens % block_size_ != 0);
}

// A block's hash covers its tokens, the salt and its parent's hash, and so all tokens before it.
Hash128 BlockPool::hash_block(const Hash128& parent, uint64_t salt, const Tokens& tokens, int64_t number) const {
  std::memcpy(message_.data(), &parent, sizeof(parent));
  std::memcpy(message_.data() + sizeof(parent) / sizeof(int32_t), &salt, sizeof(salt));
  tokens.read(number * block_size_, std::span(message_).subspan(kMessageHeader));
  return SipHash(hash_key_).hash(message_.data(), message_.size() * sizeof(int32_t));
}

BlockPool::Prefix BlockPool::find_prefix(const Tokens& tokens, uint64_t salt) const {
  Prefix prefix;
  Hash128 hash;
  const int64_t most = (tokens.size() - 1) / block_size_;
  for (int64_t number = 0; number < most; ++number) {
    hash = hash_block(hash, salt, tokens, number);
    const auto found = index_.find(hash);
    const int32_t slot = found == index_.end() ? host_.find(hash) : HostIndex::kNoSlot;
    if (found == index_.end() && slot == HostIndex::kNoSlot) break;
    if (slot != HostIndex::kNoSlot) prefix.host_hits.push_back({prefix.blocks.size(), slot});
    prefix.hashes.push_back(hash);
    prefix.blocks.push_back(slot == HostIndex::kNoSlot ? found->second : kOnHost);
  }
  return prefix;
}

int32_t BlockPool::allocate() {
  int32_t block;
  if (!unused_.empty()) {
    block = unused_.back();
    unused_.pop_back();
  } else {
    block = evictable_.pop_oldest();
    offload(block);
    forget(block);
  }
  Block& state = at(block);
  state.references = 1;
  state.is_new = true;
  if (!state.is_listed) new_blocks_.push_back(block);
  state.is_listed = true;
  return block;
}

void BlockPool::grow(std::vector<int32_t>& blocks, int64_t num_blocks) {
  while (static_cast<int64_t>(blocks.size()) < num_blocks) blocks.push_back(allocate());
}

void BlockPool::hold(int32_t block) {
  if (evictable_.contains(block)) evictable_.remove(block);
  ++at(block).references;
}

void BlockPool::drop(int32_t block) {
  Block& state = at(block);
  if (--state.references > 0) return;
  state.is_new = false;
  if (state.is_known)
    evictable_.append(block);
  else
    unused_.push_back(block);
  const auto queued =
      std::find_if(copies_.begin(), copies_.end(), [block](const BlockCopy& copy) { return copy.target == block; });
  if (queued == copies_.end()) return;
  const int32_t source = queued->source;
  copies_.erase(queued);
  drop(source);
}

// Unless it is, or another block with this content is.
void BlockPool::make_known(int32_t block, const Hash128& hash) {
  if (at(block).is_known || !index_.emplace(hash, block).second) return;
  at(block).hash = hash;
  at(block).is_known = true;
}

// The content of a known block that is about to be handed out. If the host has it, it needs no transfer: known contents
// do not change.
void BlockPool::offload(int32_t block) {
  const Hash128& hash = at(block).hash;
  if (const int32_t present = host_.find(hash); present != HostIndex::kNoSlot) return host_.touch(present);
  const int32_t slot = host_.insert(hash);
  if (slot != HostIndex::kNoSlot) transfers_.push_back({TransferKind::kToHost, block, slot});
}

void BlockPool::forget(int32_t block) {
  if (at(block).is_known) index_.erase(at(block).hash);
  at(block).is_known = false;
}

void BlockPool::open_for_writing(int32_t block) {
  // A queued copy does not mind: it is done before the block is written.
  const auto queued =
      std::count_if(copies_.begin(), copies_.end(), [block](const BlockCopy& copy) { return copy.source == block; });
  if (at(block).references - queued > 1)
    throw std::invalid_argument("num_tokens: cuts into a block that another sequence holds");
  forget(block);
}

// A new block that will hold what `block` does. If that is itself to be copied, both have the same source: copies may
// be done in any order.
int32_t BlockPool::copy_of(int32_t block) {
  for (const BlockCopy& copy : copies_)
    if (copy.target == block) {
      block = copy.source;
      break;
    }
  hold(block);
  const int32_t target = allocate();
  at(target).is_new = false;
  copies_.push_back({block, target});
  return target;
}

void BlockPool::check_integrity() const {
  check_references();
  check_free();
  check_index();
  host_.check_integrity();
}

void BlockPool::check_references() const {
  std::vector<int32_t> counted(blocks_.size(), 0);
  for (const auto& [handle, table] : tables_)
    for (const int32_t block : table.blocks) ++counted[static_cast<size_t>(block)];
  for (const BlockCopy& copy : copies_) ++counted[static_cast<size_t>(copy.source)];
  for (size_t block = 0; block < blocks_.size(); ++block)
    if (counted[block] != blocks_[block].references)
      throw std::runtime_error("block pool: reference counts disagree with the tables");
}

void BlockPool::check_free() const {
  std::vector<bool> is_free(blocks_.size(), false);
  const auto mark = [&](int32_t block, bool is_known) {
    if (is_free[static_cast<size_t>(block)])
      throw std::runtime_error("block pool: block " + std::to_string(block) + " is free twice");
    if (at(block).references != 0) throw std::runtime_error("block pool: a used block is free");
    if (at(block).is_known != is_known) throw std::runtime_error("block pool: a free block is in the wrong list");
    is_free[static_cast<size_t>(block)] = true;
  };
  for (const int32_t block : unused_) mark(block, false);
  for (int32_t block = evictable_.first(); block != evictable_.end(); block = evictable_.next(block)) mark(block, true);
  for (size_t block = 0; block < blocks_.size(); ++block)
    if (blocks_[block].references == 0 && !is_free[block]) throw std::runtime_error("block pool: a block leaked");
}

void BlockPool::check_index() const {
  for (const auto& [hash, block] : index_)
    if (!at(block).is_known || at(block).hash != hash)
      throw std::runtime_error("block pool: the index leads to a block of another content");
  const auto num_known =
      std::count_if(blocks_.begin(), blocks_.end(), [](const Block& block) { return block.is_known; });
  if (num_known != num_cached()) throw std::runtime_error("block pool: a known block is not in the index");
}

}  // namespace llmserve
