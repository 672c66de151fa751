// Binds BlockPool. Token ids come as lists, which are converted only as far as they are looked at, or as arrays.
#include <limits>
#include <memory>

#include "bindings/bindings.h"
#include "core/block_pool.h"

namespace llmserve {

namespace {

int32_t to_token(PyObject* item) {
  const long value = PyLong_AsLong(item);
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("token_ids: " + std::to_string(value) + " is out of range");
  return static_cast<int32_t>(value);
}

class ListTokens final : public Tokens {
 public:
  explicit ListTokens(py::list ids) : ids_(std::move(ids)) {}
  int64_t size() const override { return PyList_GET_SIZE(ids_.ptr()); }
  void read(int64_t first, std::span<int32_t> out) const override {
    for (size_t i = 0; i < out.size(); ++i)
      out[i] = to_token(PyList_GET_ITEM(ids_.ptr(), first + static_cast<int64_t>(i)));
  }

 private:
  py::list ids_;
};

class ArrayTokens final : public Tokens {
 public:
  explicit ArrayTokens(Array<int32_t> ids) : ids_(std::move(ids)) {
    if (ids_.ndim() != 1) throw std::invalid_argument("token_ids: one dimension expected");
  }
  int64_t size() const override { return ids_.size(); }
  void read(int64_t first, std::span<int32_t> out) const override {
    std::copy_n(ids_.data() + first, out.size(), out.begin());
  }

 private:
  Array<int32_t> ids_;
};

std::unique_ptr<Tokens> tokens_of(const py::object& ids) {
  if (PyList_Check(ids.ptr())) return std::make_unique<ListTokens>(py::reinterpret_borrow<py::list>(ids));
  if (py::isinstance<Array<int32_t>>(ids)) return std::make_unique<ArrayTokens>(ids.cast<Array<int32_t>>());
  return std::make_unique<ListTokens>(py::list(ids));
}

// A transaction must not meet a list that turns out to hold something else than tokens: all are read before it.
std::unique_ptr<Tokens> tokens_read_ahead(const py::object& ids) {
  std::unique_ptr<Tokens> tokens = tokens_of(ids);
  if (dynamic_cast<ArrayTokens*>(tokens.get()) != nullptr) return tokens;
  Array<int32_t> read(tokens->size());
  tokens->read(0, {read.mutable_data(), static_cast<size_t>(read.size())});
  return std::make_unique<ArrayTokens>(std::move(read));
}

// 128 bits of a non-negative Python int. Throws OverflowError.
Hash128 parse_key(const py::int_& key) {
  const auto bytes = key.attr("to_bytes")(16, "little").cast<std::string>();
  Hash128 parsed;
  std::memcpy(&parsed, bytes.data(), sizeof(parsed));
  return parsed;
}

std::vector<int64_t> admit(BlockPool& pool, const std::vector<int64_t>& handles, const py::sequence& token_ids,
                           const std::vector<uint64_t>& salts, const std::vector<int64_t>& num_tokens,
                           const std::vector<bool>& reads_cache) {
  const size_t count = handles.size();
  if (token_ids.size() != count || salts.size() != count || num_tokens.size() != count || reads_cache.size() != count)
    throw std::invalid_argument("handles: every argument needs one entry per handle");
  std::vector<std::unique_ptr<Tokens>> tokens;
  std::vector<Admission> admissions;
  for (size_t i = 0; i < count; ++i) {
    tokens.push_back(tokens_read_ahead(token_ids[i]));
    admissions.push_back({handles[i], tokens.back().get(), salts[i], num_tokens[i], reads_cache[i]});
  }
  return pool.admit(admissions);
}

std::vector<std::pair<int32_t, int32_t>> take_copies(BlockPool& pool) {
  std::vector<std::pair<int32_t, int32_t>> pairs;
  for (const BlockCopy& copy : pool.take_copies()) pairs.emplace_back(copy.source, copy.target);
  return pairs;
}

std::vector<std::tuple<const char*, int32_t, int32_t>> take_transfers(BlockPool& pool) {
  std::vector<std::tuple<const char*, int32_t, int32_t>> transfers;
  for (const Transfer& transfer : pool.take_transfers())
    transfers.emplace_back(transfer.kind == TransferKind::kToHost ? "to_host" : "to_device", transfer.source,
                           transfer.target);
  return transfers;
}

// Brings the first rows of `tables`, one for each handle, up to date, and returns the flat indices of what changed.
// What lies behind a row's own blocks stays as it is.
Array<int64_t> sync_tables(const BlockPool& pool, const std::vector<int64_t>& handles, py::array tables) {
  // Not an argument of type Array: an array of another type would be converted, and the copy written.
  if (!py::isinstance<Array<int32_t>>(tables) || tables.ndim() != 2 || !tables.writeable())
    throw std::invalid_argument("tables: a writeable int32 array of two dense dimensions expected");
  const auto width = static_cast<size_t>(tables.shape(1));
  if (handles.size() > static_cast<size_t>(tables.shape(0)))
    throw std::invalid_argument("tables: fewer rows than handles");
  auto* row = static_cast<int32_t*>(tables.mutable_data());
  std::vector<int64_t> changed;
  for (size_t i = 0; i < handles.size(); ++i, row += width) {
    const std::vector<int32_t>& blocks = pool.table(handles[i]);
    if (blocks.size() > width) throw std::invalid_argument("tables: a sequence has more blocks than a row takes");
    for (size_t j = 0; j < blocks.size(); ++j) {
      if (row[j] == blocks[j]) continue;
      row[j] = blocks[j];
      changed.push_back(static_cast<int64_t>(i * width + j));
    }
  }
  return Array<int64_t>(static_cast<py::ssize_t>(changed.size()), changed.data());
}

void bind_sequences(py::class_<BlockPool, std::shared_ptr<BlockPool>>& pool) {
  pool.def("create", &BlockPool::create)
      .def("reserve", &BlockPool::reserve, py::arg("handles"), py::arg("num_tokens"))
      .def("admit", &admit, py::arg("handles"), py::arg("token_ids"), py::arg("salts"), py::arg("num_tokens"),
           py::arg("reads_cache"))
      .def(
          "commit",
          [](BlockPool& self, int64_t handle, const py::object& token_ids, int64_t num_computed) {
            self.commit(handle, *tokens_of(token_ids), num_computed);
          },
          py::arg("handle"), py::arg("token_ids"), py::arg("num_computed"))
      .def("fork", &BlockPool::fork, py::arg("handle"), py::arg("num_tokens"))
      .def("truncate", &BlockPool::truncate, py::arg("handle"), py::arg("num_tokens"))
      .def("release", &BlockPool::release, py::arg("handle"))
      .def("discard", &BlockPool::discard, py::arg("handle"))
      .def("table", &BlockPool::table, py::arg("handle"))
      .def("sync_tables", &sync_tables, py::arg("handles"), py::arg("tables"));
}

}  // namespace

void bind_block_pool(py::module_& module) {
  py::class_<BlockPool, std::shared_ptr<BlockPool>> pool(module, "BlockPool",
                                                         "Block tables of the paged KV cache and its prefix cache.");
  pool.def(py::init([](int32_t num_blocks, int32_t block_size, const py::int_& hash_key, int32_t num_host_blocks) {
             return std::make_shared<BlockPool>(num_blocks, block_size, parse_key(hash_key), num_host_blocks);
           }),
           py::arg("num_blocks"), py::arg("block_size"), py::arg("hash_key") = 0, py::arg("num_host_blocks") = 0);
  bind_sequences(pool);
  pool.def(
          "match",
          [](const BlockPool& self, const py::object& token_ids, uint64_t salt) {
            return self.match(*tokens_of(token_ids), salt);
          },
          py::arg("token_ids"), py::arg("salt"))
      .def("reset_cache", &BlockPool::reset_cache)
      .def("take_transfers", &take_transfers)
      .def("take_copies", &take_copies)
      .def("take_new_blocks", &BlockPool::take_new_blocks)
      .def("check_integrity", &BlockPool::check_integrity)
      .def_property_readonly("num_blocks", &BlockPool::num_blocks)
      .def_property_readonly("num_free", &BlockPool::num_free)
      .def_property_readonly("num_cached", &BlockPool::num_cached)
      .def_property_readonly("num_host_blocks", &BlockPool::num_host_blocks)
      .def_property_readonly("num_host_cached", &BlockPool::num_host_cached)
      .def_property_readonly("num_host_hits", &BlockPool::num_host_hits)
      .def_property_readonly("block_size", &BlockPool::block_size);
}

}  // namespace llmserve
