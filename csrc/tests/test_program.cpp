// A whole program in C++: a small network over the paged cache, whatever the number of threads, rows and chunks.
#include <algorithm>
#include <array>
#include <filesystem>
#include <thread>
#include <vector>

#include <unistd.h>

#include "cpu/program.h"
#include "tests/tables.h"
#include "tests/weights.h"

namespace llmserve::test {

namespace {

constexpr int kHidden = 64, kVocab = 100, kHeadDim = 16, kMaxTokens = 80, kMaxPosition = 128;

// embed -> norm -> q, k, v heads -> attention -> projection + residual -> gather -> logits -> sample
struct Network {
  Weights embed, qkv, projection, head;
  std::vector<float> norm = std::vector<float>(kHidden, 1.5f);

  explicit Network(Random& random)
      : embed(random_weights(random, DType::kBF16, kVocab, kHidden)),
        qkv(random_weights(random, DType::kQ4_1, 8 * kHeadDim, kHidden)),
        projection(random_weights(random, DType::kQ4_0, kHidden, kHidden)),
        head(random_weights(random, DType::kQ8_0, kVocab, kHidden)) {}
};

const PackedMatrix& add_matrix(Program& program, const Weights& weights, PackedType type, int rows_per_tile) {
  PackedMatrix matrix;
  matrix.type = type;
  matrix.columns = weights.columns;
  matrix.tensors.push_back(weights.view());
  for (int row = 0; row < weights.rows; row += rows_per_tile)
    matrix.sources.push_back({0, row, std::min(rows_per_tile, static_cast<int>(weights.rows) - row)});
  const PackedMatrix* added = program.add_matrix(std::move(matrix));
  program.pack(*added);
  return *added;
}

struct Values {
  const Value *x, *normed, *queries, *attended, *y, *rows, *logits;
};

Values add_values(Program& program) {
  size_t offset = 0;
  program.reserve_arena(1 << 20);
  const auto add = [&](Rows rows, int64_t columns, unsigned forms) {
    const Value* value = program.add_value(rows, columns, forms, offset);
    offset += program.value_bytes(rows, columns, forms);
    return value;
  };
  return {add(Rows::kTokens, kHidden, kFormF32), add(Rows::kTokens, kHidden, kFormQ8),
          add(Rows::kTokens, 64, kFormF32),      add(Rows::kTokens, 64, kFormQ8),
          add(Rows::kTokens, kHidden, kFormF32), add(Rows::kLogits, kHidden, kFormQ8),
          add(Rows::kLogits, kVocab, kFormF32)};
}

void add_attention(Program& program, const Network& network, const Values& values) {
  auto heads = std::make_unique<GemmNode>();
  heads->matrix = &add_matrix(program, network.qkv, PackedType::kQ4_1, kHeadDim);
  heads->in = *values.normed;
  heads->out = *values.queries;
  heads->head_dim = kHeadDim;
  for (int32_t item = 0; item < 8; ++item) {
    const ItemKind kind = item < 4 ? ItemKind::kQuery : item < 6 ? ItemKind::kKey : ItemKind::kValue;
    const int32_t head = item < 4 ? item : (item - 4) % 2;
    heads->items.push_back({kind, item, 1, head * kHeadDim, kHeadDim, head});
  }
  program.add_node(std::move(heads));
  auto attention = std::make_unique<AttentionNode>();
  attention->q = *values.queries;
  attention->out = *values.attended;
  attention->heads = 4;
  attention->kv_heads = 2;
  attention->head_dim = kHeadDim;
  attention->scale = 0.25f;
  program.set_query_heads_per_kv_head(2);
  program.add_node(std::move(attention));
}

std::unique_ptr<GemmNode> plain_gemm(Program& program, const Weights& weights, PackedType type, const Value& in,
                                     const Value& out) {
  auto node = std::make_unique<GemmNode>();
  node->matrix = &add_matrix(program, weights, type, kTile);
  node->in = in;
  node->out = out;
  for (int32_t tile = 0; tile < node->matrix->num_tiles(); ++tile)
    node->items.push_back({ItemKind::kPlain, tile, 1, tile * kTile,
                           std::min<int32_t>(kTile, static_cast<int32_t>(weights.rows) - tile * kTile), 0});
  return node;
}

std::unique_ptr<Program> build(const Network& network, const char* isa, int num_threads) {
  auto program = std::make_unique<Program>(isa, num_threads, ProgramLimits{kMaxTokens, 8, kMaxTokens, kMaxPosition});
  const Values values = add_values(*program);
  program->reserve_weights(1 << 20);
  program->add_node(std::make_unique<ZeroBlocksNode>());
  program->add_node(std::make_unique<CopyBlocksNode>());
  auto embed = std::make_unique<EmbedNode>();
  embed->table = network.embed.view();
  embed->out = *values.x;
  program->add_node(std::move(embed));
  auto norm = std::make_unique<NormNode>();
  norm->in = *values.x;
  norm->out = *values.normed;
  norm->weight = network.norm;
  norm->eps = 1e-5f;
  program->add_node(std::move(norm));
  add_attention(*program, network, values);
  auto projection = plain_gemm(*program, network.projection, PackedType::kQ4_0, *values.attended, *values.y);
  projection->residual = values.x;
  program->add_node(std::move(projection));
  auto gather = std::make_unique<GatherNode>();
  gather->in = *values.y;
  gather->out = *values.rows;
  program->add_node(std::move(gather));
  program->add_node(plain_gemm(*program, network.head, PackedType::kQ8_0, *values.rows, *values.logits));
  auto sample = std::make_unique<SampleNode>();
  sample->logits = *values.logits;
  program->add_node(std::move(sample));
  program->allocate_kv(1, 64, 2, kHeadDim);
  return program;
}

// One step's arrays, every token a logit row.
struct Batch {
  struct Piece {
    int64_t handle;
    int start, count;
  };
  std::vector<int32_t> token_ids, positions, query_start{0}, seq_lens, logit_rows, targets, top_k, num_logprobs;
  std::vector<int64_t> tables, sample_position;
  std::vector<float> temperature, top_p, min_p;
  std::vector<uint64_t> seed;
  std::vector<int32_t> out_tokens, out_ranks, out_top_ids;
  std::vector<float> out_logprobs, out_top_logprobs;

  explicit Batch(const std::vector<Piece>& pieces) {
    for (const Piece& piece : pieces) {
      for (int i = 0; i < piece.count; ++i) add_token(piece, piece.start + i);
      query_start.push_back(static_cast<int32_t>(token_ids.size()));
      seq_lens.push_back(piece.start + piece.count);
      tables.push_back(piece.handle);
    }
    out_tokens.resize(token_ids.size());
    out_ranks.resize(token_ids.size());
    out_logprobs.resize(token_ids.size());
  }

  void add_token(const Piece& piece, int position) {
    // The text of a sequence is a function of its handle, so that it can be computed again in other pieces.
    token_ids.push_back(static_cast<int32_t>((piece.handle % 8 * 31 + position * 7) % kVocab));
    positions.push_back(position);
    logit_rows.push_back(static_cast<int32_t>(logit_rows.size()));
    targets.push_back(-1);
    temperature.push_back(0.8f);
    top_k.push_back(position % 3 == 0 ? 5 : 0);
    top_p.push_back(position % 3 == 1 ? 0.9f : 1.0f);
    min_p.push_back(0.0f);
    seed.push_back(42);
    sample_position.push_back(position + 1);
    num_logprobs.push_back(0);
  }

  StepArrays arrays() {
    StepArrays step;
    step.num_tokens = step.num_rows = static_cast<int>(token_ids.size());
    step.num_seqs = static_cast<int>(seq_lens.size());
    step.token_ids = token_ids.data();
    step.positions = positions.data();
    step.query_start = query_start.data();
    step.seq_lens = seq_lens.data();
    step.block_tables = tables.data();
    step.logit_rows = logit_rows.data();
    step.targets = targets.data();
    step.temperature = temperature.data();
    step.top_k = top_k.data();
    step.top_p = top_p.data();
    step.min_p = min_p.data();
    step.seed = seed.data();
    step.sample_position = sample_position.data();
    step.num_logprobs = num_logprobs.data();
    step.out_token_ids = out_tokens.data();
    step.out_logprobs = out_logprobs.data();
    step.out_ranks = out_ranks.data();
    step.out_top_ids = out_top_ids.data();
    step.out_top_logprobs = out_top_logprobs.data();
    return step;
  }
};

struct Result {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;

  bool operator==(const Result& other) const {
    return tokens == other.tokens && std::memcmp(logprobs.data(), other.logprobs.data(), logprobs.size() * 4) == 0;
  }
};

// Computes sequence `number` of `length` tokens in chunks, and gives what every position yields.
Result in_chunks(Program& program, BlockPool& pool, int number, int length, int chunk) {
  int64_t handle = pool.create();
  while (handle % 8 != number) {
    pool.release(handle);
    handle = pool.create();
  }
  CHECK(pool.reserve({handle}, {length}) == 1);
  Result result;
  for (int start = 0; start < length; start += chunk) {
    Batch batch({{handle, start, std::min(chunk, length - start)}});
    CHECK(program.run(batch.arrays(), pool));
    result.tokens.insert(result.tokens.end(), batch.out_tokens.begin(), batch.out_tokens.end());
    result.logprobs.insert(result.logprobs.end(), batch.out_logprobs.begin(), batch.out_logprobs.end());
  }
  pool.release(handle);
  return result;
}

std::vector<const char*> isa_levels() {
  std::vector<const char*> levels;
  for (const auto& [name, kernels] : tables())
    if (name.find('+') == std::string::npos) levels.push_back(kernels.name);
  return levels;
}

}  // namespace

TEST(program_results_do_not_depend_on_threads_or_chunks) {
  const Network network(random);
  for (const char* isa : isa_levels()) {
    std::vector<Result> results;
    for (const int num_threads : {1, 2, 3, 4}) {  // some share the tiles of a matrix evenly, some do not
      const auto program = build(network, isa, num_threads);
      BlockPool pool(64, 16);
      for (const int chunk : {1, 7, 9, 65, 70}) results.push_back(in_chunks(*program, pool, 3, 70, chunk));
      CHECK(pool.num_free() == 64);
    }
    for (const Result& result : results) CHECK(result == results[0], isa);
  }
}

TEST(program_sequences_of_one_step_do_not_mix) {
  const Network network(random);
  for (const char* isa : isa_levels()) {
    const auto program = build(network, isa, 2);
    BlockPool pool(64, 16);
    std::vector<Batch::Piece> pieces;
    for (int number = 0; number < 4; ++number) pieces.push_back({pool.create(), 0, 5 + 7 * number});
    for (const auto& piece : pieces) CHECK(pool.reserve({piece.handle}, {piece.count}) == 1);
    Batch batch(pieces);
    CHECK(program->run(batch.arrays(), pool));
    for (size_t i = 0; i < pieces.size(); ++i) {
      const auto& [handle, start, count] = pieces[i];
      const Result alone = in_chunks(*program, pool, static_cast<int>(handle % 8), count, count);
      const auto first = static_cast<size_t>(batch.query_start[i]);
      for (size_t row = 0; row < alone.tokens.size(); ++row) {
        CHECK(alone.tokens[row] == batch.out_tokens[first + row], isa, " sequence ", i);
        CHECK(std::memcmp(&alone.logprobs[row], &batch.out_logprobs[first + row], 4) == 0, isa, " sequence ", i);
      }
    }
  }
}

TEST(program_obeys_the_abort_flag_and_runs_again) {
  const Network network(random);
  const std::string path = join(std::filesystem::temp_directory_path().string(), "/llmserve_tests_progress_", getpid());
  const auto cell = std::make_shared<ProgressCell>(path, true);
  unlink(path.c_str());
  const auto program = build(network, "", 3);
  program->attach_progress(cell);
  BlockPool pool(64, 16);
  const int64_t handle = pool.create();
  CHECK(pool.reserve({handle}, {60}) == 1);
  Batch batch({{handle, 0, 60}});
  CHECK(program->run(batch.arrays(), pool));
  const uint64_t nodes = cell->value();
  CHECK(nodes >= 8);
  cell->set_abort(true);
  CHECK(!program->run(batch.arrays(), pool));
  CHECK(cell->value() == nodes + 1, "the first node is the last");
  cell->set_abort(false);
  const std::vector<float> before = batch.out_logprobs;
  CHECK(program->run(batch.arrays(), pool));
  CHECK(before == batch.out_logprobs);
  std::atomic<bool> stopping{false};
  std::thread watcher([&] {
    while (!stopping) cell->set_abort(cell->value() % 2 == 0);
  });
  for (int run = 0; run < 200; ++run) program->run(batch.arrays(), pool);
  stopping = true;
  watcher.join();
}

// Parent and child go on in the step that copies: the child with a text of its own, neither seeing the other.
TEST(program_forks_a_sequence_in_the_middle_of_a_block) {
  const Network network(random);
  for (const char* isa : isa_levels()) {
    const auto program = build(network, isa, 3);
    BlockPool pool(64, 16);
    const int64_t parent = pool.create();
    CHECK(pool.reserve({parent}, {40}) == 1);
    CHECK(program->run(Batch({{parent, 0, 25}}).arrays(), pool));
    const int64_t child = pool.fork(parent, 25);
    CHECK(pool.reserve({child}, {40}) == 1);
    // A step's text follows from the handle; the child's must begin as the parent's, so its own starts at the fork.
    Batch both({{parent, 25, 15}, {child, 25, 15}});
    CHECK(program->run(both.arrays(), pool));
    CHECK(pool.copies().empty());
    Batch again({{parent, 25, 15}});
    CHECK(program->run(again.arrays(), pool));
    const int64_t alone = pool.create();
    CHECK(pool.reserve({alone}, {40}) == 1);
    Batch head({{parent, 0, 25}}), tail({{child, 25, 15}});
    head.tables[0] = tail.tables[0] = alone;
    CHECK(program->run(head.arrays(), pool));
    CHECK(program->run(tail.arrays(), pool));
    CHECK(std::equal(again.out_logprobs.begin(), again.out_logprobs.end(), both.out_logprobs.begin()), isa, " parent");
    CHECK(std::equal(tail.out_logprobs.begin(), tail.out_logprobs.end(), both.out_logprobs.begin() + 15), isa,
          " child");
  }
}

TEST(program_that_is_aborted_or_refuses_leaves_copies_and_zeroing_to_the_next_step) {
  const Network network(random);
  const std::string path = join(std::filesystem::temp_directory_path().string(), "/llmserve_tests_pending_", getpid());
  const auto cell = std::make_shared<ProgressCell>(path, true);
  unlink(path.c_str());
  const auto program = build(network, "", 2);
  program->attach_progress(cell);
  BlockPool pool(64, 16);
  const int64_t parent = pool.create(), expected = pool.create();
  CHECK(pool.reserve({parent, expected}, {20, 40}) == 2);
  CHECK(program->run(Batch({{parent, 0, 20}}).arrays(), pool));
  Batch head({{parent, 0, 20}});
  head.tables[0] = expected;
  CHECK(program->run(head.arrays(), pool));
  const int64_t child = pool.fork(parent, 20);
  pool.release(parent);
  CHECK(pool.reserve({child}, {40}) == 1);
  Batch bad({{child, 20, 20}}), batch({{child, 20, 20}}), wanted({{child, 20, 20}});
  bad.positions[3] = 7;
  CHECK_THROWS(std::invalid_argument, program->run(bad.arrays(), pool));
  cell->set_abort(true);
  CHECK(!program->run(batch.arrays(), pool));
  cell->set_abort(false);
  // The child's last block, and that of `expected`, which no step has reached yet.
  CHECK(pool.copies().size() == 1 && pool.new_blocks().size() == 2);
  CHECK(program->run(batch.arrays(), pool));
  CHECK(pool.copies().empty() && pool.new_blocks().size() == 1);
  wanted.tables[0] = expected;
  CHECK(program->run(wanted.arrays(), pool));
  CHECK(pool.new_blocks().empty());
  CHECK(wanted.out_logprobs == batch.out_logprobs);
}

TEST(program_zeroes_the_new_blocks_that_a_step_does_not_fill) {
  BlockPool pool(64, 16);
  const int64_t handle = pool.create();
  CHECK(pool.reserve({handle}, {60}) == 1);
  const std::vector<int32_t>& table = pool.table(handle);
  const auto blank_of = [&](int start, int count) {
    Batch batch({{handle, start, count}});
    Step step;
    step.prepare(batch.arrays(), pool, 256, 8);
    CHECK(step.new_blocks.size() == static_cast<size_t>((start + count + 15) / 16), "all are new");
    return step.blank_blocks;
  };
  const auto blocks = [&](std::initializer_list<size_t> places) {
    std::vector<int32_t> named;
    for (const size_t place : places) named.push_back(table[place]);
    std::sort(named.begin(), named.end());
    return named;
  };
  CHECK(blank_of(0, 32) == blocks({}));
  CHECK(blank_of(0, 33) == blocks({2}));
  CHECK(blank_of(0, 31) == blocks({1}));
  CHECK(blank_of(1, 31) == blocks({0}));
  CHECK(blank_of(16, 44) == blocks({0, 3}));
}

TEST(program_refuses_contradicting_arrays) {
  const Network network(random);
  const auto program = build(network, "scalar", 1);
  BlockPool pool(64, 16);
  const int64_t handle = pool.create(), second = pool.create();
  CHECK(pool.reserve({handle, second}, {40, 40}) == 2);
  const auto refuses = [&](void (*change)(Batch& batch), const char* what) {
    Batch batch({{handle, 0, 4}, {second, 0, 4}});
    change(batch);
    bool refused = false;
    try {
      program->run(batch.arrays(), pool);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused, what);
  };
  refuses([](Batch& b) { b.query_start[2] = 7; }, "tokens without a sequence");
  refuses([](Batch& b) { b.query_start[0] = 1; }, "a first sequence that starts late");
  refuses([](Batch& b) { b.query_start[1] = 0; }, "a sequence without tokens");
  refuses([](Batch& b) { b.positions[2] = 5; }, "positions with a gap");
  refuses([](Batch& b) { b.seq_lens[1] = 100; }, "more tokens than blocks");
  refuses([](Batch& b) { b.seq_lens[1] = 2; }, "a negative start");
  refuses([](Batch& b) { b.tables[0] = 99; }, "an unknown handle");
  refuses([](Batch& b) { b.logit_rows[0] = 8; }, "a logit row past the tokens");
  refuses([](Batch& b) { b.logit_rows[0] = -1; }, "a negative logit row");
}

// What these arrays name would be read or written outside of any buffer.
TEST(program_refuses_arrays_that_name_what_is_not_there) {
  const Network network(random);
  const auto program = build(network, "scalar", 1);
  BlockPool pool(64, 16);
  const int64_t handle = pool.create(), second = pool.create();
  CHECK(pool.reserve({handle, second}, {64, 64}) == 2);
  const auto refuses = [&](void (*change)(Batch& batch), const char* what) {
    Batch batch({{handle, 0, 4}, {second, 0, 4}});
    change(batch);
    bool refused = false;
    try {
      program->run(batch.arrays(), pool);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused, what);
  };
  refuses([](Batch& b) { b.token_ids[3] = kVocab; }, "a token past the vocabulary");
  refuses([](Batch& b) { b.token_ids[3] = -1; }, "a negative token");
  refuses([](Batch& b) { b.targets[3] = kVocab; }, "a target past the vocabulary");
  refuses(
      [](Batch& b) {
        b.query_start[1] = 20;
        b.seq_lens[0] = 20;
      },
      "a sequence that ends past the step");
}

TEST(program_refuses_a_block_pool_of_another_cache) {
  const Network network(random);
  const auto program = build(network, "scalar", 1);
  for (BlockPool pool : {BlockPool(65, 16), BlockPool(64, 8), BlockPool(64, 16, {}, 1)}) {
    const int64_t handle = pool.create();
    CHECK(pool.reserve({handle}, {4}) == 1);
    Batch batch({{handle, 0, 4}});
    CHECK_THROWS(std::invalid_argument, program->run(batch.arrays(), pool));
  }
}

}  // namespace llmserve::test
