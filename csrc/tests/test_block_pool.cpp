// The block pool against a twin that only counts, under random operations.
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

}  // namespace

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
  BlockPool pool(4, 16);
  CHECK_THROWS(std::invalid_argument, pool.reserve({7}, {1}));
  CHECK_THROWS(std::invalid_argument, pool.reserve({7}, {}));
  CHECK_THROWS(std::invalid_argument, pool.truncate(7, 0));
  CHECK_THROWS(std::invalid_argument, pool.release(7));
}

}  // namespace llmserve::test
