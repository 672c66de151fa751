// The block pool against a twin that only counts, under random operations.
#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>

#include "core/block_pool.h"
#include "tests/check.h"

namespace llmserve::test {

namespace {

// What a pool must keep: how many blocks each sequence has. Which ones is checked by the pool's own tables.
struct Twin {
  int64_t num_blocks, block_size;
  std::map<int64_t, int64_t> held;

  int64_t num_free() const {
    int64_t left = num_blocks;
    for (const auto& [handle, count] : held) left -= count;
    return left;
  }
  int64_t blocks_for(int64_t num_tokens) const { return (num_tokens + block_size - 1) / block_size; }
  size_t reserve(const std::vector<int64_t>& handles, const std::vector<int64_t>& num_tokens) {
    for (size_t i = 0; i < handles.size(); ++i) {
      const int64_t more = blocks_for(num_tokens[i]) - held[handles[i]];
      if (more > num_free()) return i;
      if (more > 0) held[handles[i]] += more;
    }
    return handles.size();
  }
};

int64_t any_handle(Random& random, const Twin& twin) {
  auto chosen = twin.held.begin();
  std::advance(chosen, random.integer(0, static_cast<int64_t>(twin.held.size()) - 1));
  return chosen->first;
}

void compare(const BlockPool& pool, const Twin& twin) {
  pool.check_integrity();
  CHECK(pool.num_free() == twin.num_free());
  std::set<int32_t> seen;
  for (const auto& [handle, count] : twin.held) {
    CHECK(static_cast<int64_t>(pool.table(handle).size()) == count, "sequence ", handle);
    for (const int32_t block : pool.table(handle)) {
      CHECK(block >= 0 && block < twin.num_blocks, "block ", block);
      CHECK(seen.insert(block).second, "block ", block, " has two owners");
    }
  }
}

void reserve_some(Random& random, BlockPool& pool, Twin& twin) {
  std::vector<int64_t> handles, num_tokens;
  for (int64_t i = random.integer(1, 4); i > 0; --i) {
    handles.push_back(any_handle(random, twin));
    num_tokens.push_back(random.integer(0, twin.num_blocks * twin.block_size / 2));
  }
  std::map<int64_t, std::vector<int32_t>> before;
  for (const int64_t handle : handles) before[handle] = pool.table(handle);
  const size_t admitted = pool.reserve(handles, num_tokens);
  CHECK(admitted == twin.reserve(handles, num_tokens));
  for (const auto& [handle, table] : before)
    for (size_t i = 0; i < table.size(); ++i) CHECK(pool.table(handle)[i] == table[i], "a table changed at its front");
}

void act_once(Random& random, BlockPool& pool, Twin& twin) {
  if (twin.held.empty() || random.chance(0.2)) {
    CHECK(twin.held.emplace(pool.create(), 0).second, "a handle came back");
    return;
  }
  if (random.chance(0.6)) return reserve_some(random, pool, twin);
  const int64_t handle = any_handle(random, twin);
  if (random.chance(0.5)) {
    const int64_t num_tokens = random.integer(0, twin.num_blocks * twin.block_size / 4);
    pool.truncate(handle, num_tokens);
    twin.held[handle] = std::min(twin.held[handle], twin.blocks_for(num_tokens));
  } else {
    pool.release(handle);
    twin.held.erase(handle);
    CHECK_THROWS(std::invalid_argument, pool.table(handle));
  }
}

// A sequence over a small alphabet, so that prefixes are often shared.
struct Text {
  int64_t handle;
  std::vector<int32_t> ids;
  int64_t num_computed;
};

std::vector<int32_t> random_ids(Random& random) {
  std::vector<int32_t> ids(static_cast<size_t>(random.integer(1, 30)));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.integer(0, 1));
  return ids;
}

void admit_some(Random& random, BlockPool& pool, std::vector<Text>& texts) {
  std::vector<Text> arriving(static_cast<size_t>(random.integer(1, 3)));
  std::vector<TokenSpan> spans;
  for (Text& text : arriving) {
    text = {pool.create(), random_ids(random), 0};
    spans.emplace_back(text.ids);
  }
  std::vector<Admission> admissions;
  for (size_t i = 0; i < arriving.size(); ++i)
    admissions.push_back({arriving[i].handle, &spans[i], random.bits() % 2, spans[i].size(), random.chance(0.9)});
  const int64_t found = pool.match(spans[0], admissions[0].salt);
  const std::vector<int64_t> num_cached = pool.admit(admissions);
  if (!num_cached.empty()) CHECK(num_cached[0] == (admissions[0].reads_cache ? found : 0));
  for (size_t i = 0; i < arriving.size(); ++i) {
    if (i >= num_cached.size()) {
      CHECK(pool.table(arriving[i].handle).empty(), "a table that did not fit is left alone");
      pool.release(arriving[i].handle);
      continue;
    }
    CHECK(num_cached[i] < spans[i].size());
    arriving[i].num_computed = num_cached[i];
    texts.push_back(std::move(arriving[i]));
  }
}

void change_one(Random& random, BlockPool& pool, std::vector<Text>& texts) {
  const auto chosen = static_cast<size_t>(random.integer(0, static_cast<int64_t>(texts.size()) - 1));
  Text& text = texts[chosen];
  const auto length = static_cast<int64_t>(text.ids.size());
  const int64_t some = random.integer(0, text.num_computed);
  switch (random.integer(0, 3)) {
    case 0:
      text.num_computed = random.integer(text.num_computed, length);
      return pool.commit(text.handle, TokenSpan(text.ids), text.num_computed);
    case 1:
      try {
        std::vector<int32_t> ids(text.ids.begin(), text.ids.begin() + some);
        texts.push_back({pool.fork(text.handle, some), std::move(ids), some});
      } catch (const OutOfBlocks&) {
        CHECK(pool.num_free() == 0);
      }
      return;
    case 2:
      try {
        pool.truncate(text.handle, some);
        text.ids.resize(static_cast<size_t>(some));
        text.num_computed = some;
      } catch (const std::invalid_argument&) {
        CHECK(some % pool.block_size() != 0, "whole blocks can always be given back");
      }
      return;
    default: pool.release(text.handle); texts.erase(texts.begin() + static_cast<int64_t>(chosen));
  }
}

void check_transfers(BlockPool& pool) {
  for (const Transfer& transfer : pool.take_transfers()) {
    const bool to_host = transfer.kind == TransferKind::kToHost;
    const int32_t block = to_host ? transfer.source : transfer.target;
    const int32_t slot = to_host ? transfer.target : transfer.source;
    CHECK(block >= 0 && block < pool.num_blocks() && slot >= 0 && slot < pool.num_host_blocks());
  }
}

// Both memories, by block and slot: all tokens that a block's content depends on.
struct Memories {
  std::vector<std::vector<int32_t>> device, host;

  void move(const std::vector<Transfer>& transfers) {
    for (const Transfer& transfer : transfers) {
      const auto source = static_cast<size_t>(transfer.source), target = static_cast<size_t>(transfer.target);
      if (transfer.kind == TransferKind::kToHost)
        host[target] = device[source];
      else
        device[target] = host[source];
    }
  }
};

int64_t admit_one(BlockPool& pool, int64_t handle, const std::vector<int32_t>& ids) {
  const TokenSpan span(ids);
  const std::vector<int64_t> num_cached = pool.admit({{handle, &span, 0, span.size(), true}});
  CHECK(num_cached.size() == 1);
  return num_cached[0];
}

}  // namespace

TEST(block_pool_keeps_its_integrity_with_cache_and_forks) {
  for (int round = 0; round < 30; ++round) {
    const auto num_blocks = static_cast<int32_t>(random.integer(1, 40));
    const auto num_host_blocks = static_cast<int32_t>(std::max<int64_t>(random.integer(-5, 20), 0));
    BlockPool pool(num_blocks, static_cast<int32_t>(random.integer(1, 6)), {random.bits(), random.bits()},
                   num_host_blocks);
    std::vector<Text> texts;
    for (int action = 0; action < 300; ++action) {
      if (texts.empty() || random.chance(0.25))
        admit_some(random, pool, texts);
      else
        change_one(random, pool, texts);
      if (random.chance(0.2)) pool.finish_pending();
      if (random.chance(0.2) || num_host_blocks == 0) check_transfers(pool);
      if (random.chance(0.01)) pool.reset_cache();
      pool.check_integrity();
      for (const Text& text : texts)
        CHECK(static_cast<int64_t>(pool.table(text.handle).size()) * pool.block_size() >= text.num_computed);
    }
    for (const Text& text : texts) pool.release(text.handle);
    CHECK(pool.num_free() == num_blocks);
    pool.check_integrity();
  }
}

TEST(block_pool_finds_what_was_committed) {
  BlockPool pool(16, 4, {1, 2});
  const std::vector<int32_t> ids = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  const int64_t first = pool.create(), second = pool.create();
  CHECK(admit_one(pool, first, ids) == 0);
  pool.commit(first, TokenSpan(ids), 7);
  CHECK(pool.num_cached() == 1, "a partial block stays private");
  pool.commit(first, TokenSpan(ids), 9);
  CHECK(admit_one(pool, second, ids) == 8);
  CHECK(pool.table(first)[1] == pool.table(second)[1] && pool.table(first)[2] != pool.table(second)[2]);
  CHECK(pool.match(TokenSpan(ids), 1) == 0, "another salt");
  CHECK(pool.match(TokenSpan(std::vector<int32_t>(ids.begin(), ids.begin() + 8)), 0) == 4, "one token is left");
  pool.release(first);
  pool.release(second);
  CHECK(pool.num_free() == 16 && pool.num_cached() == 2);
}

TEST(block_pool_copies_from_one_source_though_a_copy_is_forked) {
  BlockPool pool(8, 4);
  const int64_t parent = pool.create();
  CHECK(pool.reserve({parent}, {6}) == 1);
  pool.finish_pending();
  const int64_t child = pool.fork(parent, 6), grandchild = pool.fork(child, 5);
  const int32_t source = pool.table(parent)[1];
  CHECK(pool.copies().size() == 2);
  for (const BlockCopy& copy : pool.copies()) CHECK(copy.source == source);
  CHECK(pool.new_blocks().empty(), "what is copied need not be zeroed");
  pool.release(child);
  CHECK(pool.copies().size() == 1 && pool.copies()[0].target == pool.table(grandchild)[1]);
  pool.release(parent);
  CHECK(pool.num_free() == 8 - 3, "the copy holds its source");
  pool.finish_pending();
  CHECK(pool.num_free() == 8 - 2);
}

TEST(block_pool_agrees_with_its_twin) {
  for (int round = 0; round < 20; ++round) {
    const auto num_blocks = static_cast<int32_t>(random.integer(1, 40));
    const auto block_size = static_cast<int32_t>(random.integer(1, 20));
    BlockPool pool(num_blocks, block_size);
    Twin twin{num_blocks, block_size, {}};
    for (int action = 0; action < 300; ++action) {
      act_once(random, pool, twin);
      compare(pool, twin);
    }
    while (!twin.held.empty()) {
      pool.release(twin.held.begin()->first);
      twin.held.erase(twin.held.begin());
    }
    CHECK(pool.num_free() == num_blocks);
  }
}

TEST(block_pool_brings_back_what_moved_to_the_host) {
  int64_t num_cached = 0;
  for (int round = 0; round < 40; ++round) {
    const auto num_blocks = static_cast<int32_t>(random.integer(8, 16)),
               num_host = static_cast<int32_t>(1 << round % 6);
    BlockPool pool(num_blocks, 2, {random.bits(), random.bits()}, num_host);
    Memories memories{std::vector<std::vector<int32_t>>(static_cast<size_t>(num_blocks)),
                      std::vector<std::vector<int32_t>>(static_cast<size_t>(num_host))};
    for (int arrival = 0; arrival < 100; ++arrival) {
      std::vector<int32_t> ids = random_ids(random);
      ids.resize(std::min<size_t>(ids.size(), 16));
      const int64_t handle = pool.create(), cached = admit_one(pool, handle, ids);
      num_cached += cached;
      if (random.chance(0.2)) {  // gone before a step: what is pending stays in its order
        pool.release(handle);
        continue;
      }
      memories.move(pool.take_transfers());
      for (size_t end = 2; end <= ids.size(); end += 2) {
        std::vector<int32_t>& content = memories.device[static_cast<size_t>(pool.table(handle)[end / 2 - 1])];
        const std::vector<int32_t> prefix(ids.begin(), ids.begin() + static_cast<int64_t>(end));
        if (static_cast<int64_t>(end) > cached) content = prefix;
        CHECK(content == prefix, "a cached block holds something else");
      }
      pool.commit(handle, TokenSpan(ids), static_cast<int64_t>(ids.size()));
      if (random.chance(0.05))
        pool.discard(handle);
      else
        pool.release(handle);
      pool.check_integrity();
    }
  }
  CHECK(num_cached > 1000, "hardly anything was found: ", num_cached);
}

TEST(block_pool_reads_a_slot_before_it_gives_it_away) {
  BlockPool pool(2, 1, {}, 1);
  for (const int32_t id : {1, 2, 3}) {
    const int64_t handle = pool.create();
    CHECK(admit_one(pool, handle, {id}) == 0);
    pool.commit(handle, TokenSpan(std::vector<int32_t>{id}), 1);
    pool.release(handle);
  }
  CHECK(pool.take_transfers().size() == 1 && pool.num_host_cached() == 1);
  const int64_t handle = pool.create();
  CHECK(admit_one(pool, handle, {1, 4}) == 1);
  const std::vector<Transfer> transfers = pool.take_transfers();
  CHECK(transfers.size() == 2, "the first block evicted finds no slot: the only one is to be read");
  CHECK(transfers[0].kind == TransferKind::kToDevice && transfers[0].target == pool.table(handle)[0]);
  CHECK(transfers[1].kind == TransferKind::kToHost && transfers[1].source == pool.table(handle)[1]);
  CHECK(transfers[0].source == transfers[1].target);
  pool.check_integrity();
}

TEST(block_pool_names_new_blocks_once) {
  BlockPool pool(8, 4);
  const int64_t first = pool.create();
  CHECK(pool.reserve({first}, {9}) == 1);
  const std::vector<int32_t> named = pool.take_new_blocks();
  CHECK(std::set<int32_t>(named.begin(), named.end()) ==
        std::set<int32_t>(pool.table(first).begin(), pool.table(first).end()));
  CHECK(pool.take_new_blocks().empty());
}

// Two workers would zero the same block at the same time.
TEST(block_pool_names_a_block_once_though_it_changed_hands) {
  BlockPool pool(4, 4);
  const int64_t first = pool.create();
  CHECK(pool.reserve({first}, {16}) == 1);
  pool.release(first);
  const int64_t second = pool.create();
  CHECK(pool.reserve({second}, {16}) == 1);
  const std::vector<int32_t> named = pool.take_new_blocks();
  CHECK(named.size() == std::set<int32_t>(named.begin(), named.end()).size(), "a block is named twice");
}

TEST(block_pool_refuses_nonsense) {
  CHECK_THROWS(std::invalid_argument, BlockPool(0, 16));
  CHECK_THROWS(std::invalid_argument, BlockPool(4, 0));
  CHECK_THROWS(std::invalid_argument, BlockPool(4, 16, {}, -1));
  BlockPool pool(4, 16);
  CHECK_THROWS(std::invalid_argument, pool.reserve({7}, {1}));
  CHECK_THROWS(std::invalid_argument, pool.reserve({7}, {}));
  CHECK_THROWS(std::invalid_argument, pool.truncate(7, 0));
  CHECK_THROWS(std::invalid_argument, pool.release(7));
}

}  // namespace llmserve::test
