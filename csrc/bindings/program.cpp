// Binds Program: what the tape compiler calls once, and `run`, which the executor calls every step.
#include "bindings/bindings.h"
#include "cpu/program.h"

#include <cerrno>
#include <system_error>

namespace llmserve {

namespace {

PackedType parse_packed(const std::string& name) {
  std::string known;
  for (int i = 0; i < kNumPackedTypes; ++i) {
    const auto type = static_cast<PackedType>(i);
    if (name == packed_name(type)) return type;
    known += (known.empty() ? "" : ", ") + std::string(packed_name(type));
  }
  throw std::invalid_argument("type: '" + name + "' is not one of " + known);
}

Activation parse_activation(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu2") return Activation::kRelu2;
  throw std::invalid_argument("activation: '" + name + "' is not one of silu, gelu, gelu_tanh, relu2");
}

Elementwise parse_elementwise(const std::string& name) {
  if (name == "add") return Elementwise::kAdd;
  if (name == "scale") return Elementwise::kScale;
  if (name == "act") return Elementwise::kActivate;
  if (name == "gated") return Elementwise::kGated;
  if (name == "forms") return Elementwise::kForms;
  if (name == "permute") return Elementwise::kPermute;
  throw std::invalid_argument("op: '" + name + "' is not one of add, scale, act, gated, forms, permute");
}

Rows parse_rows(const std::string& name) {
  if (name == "tokens") return Rows::kTokens;
  if (name == "logits") return Rows::kLogits;
  throw std::invalid_argument("rows: '" + name + "' is not one of tokens, logits");
}

const PackedMatrix* add_matrix(Program& program, const std::string& type,
                               const std::vector<const BoundTensor*>& tensors, const Array<int32_t>& sources) {
  if (sources.ndim() != 2 || sources.shape(1) != 3) throw std::invalid_argument("sources: shape (tiles, 3) expected");
  PackedMatrix matrix;
  matrix.type = parse_packed(type);
  for (const BoundTensor* tensor : tensors) matrix.tensors.push_back(tensor->view);
  matrix.columns = matrix.tensors.empty() ? 0 : matrix.tensors[0].columns;
  for (py::ssize_t i = 0; i < sources.shape(0); ++i)
    matrix.sources.push_back({sources.at(i, 0), sources.at(i, 1), sources.at(i, 2)});
  return program.add_matrix(std::move(matrix));
}

void add_embed(Program& program, const BoundTensor& table, const BoundTensor* positions, float factor,
               const Value& out) {
  auto node = std::make_unique<EmbedNode>();
  node->table = table.view;
  if (positions != nullptr) node->positions = positions->view;
  node->factor = factor;
  node->out = out;
  program.add_node(std::move(node));
}

void add_norm(Program& program, const std::string& kind, const Value& in, const Value& out, const py::object& weight,
              const py::object& bias, float eps) {
  auto node = std::make_unique<NormNode>();
  node->norm = kind == "layer" ? NormKind::kLayer : NormKind::kRms;
  node->in = in;
  node->out = out;
  node->weight = to_vector<float>(weight);
  node->bias = to_vector<float>(bias);
  node->eps = eps;
  if (static_cast<int64_t>(node->weight.size()) != in.columns)
    throw std::invalid_argument("weight: one entry per column expected");
  program.add_node(std::move(node));
}

void add_gather(Program& program, const Value& in, const Value& out) {
  auto node = std::make_unique<GatherNode>();
  node->in = in;
  node->out = out;
  program.add_node(std::move(node));
}

void add_elementwise(Program& program, const std::string& op, const Value& x, const Value* y, const Value& out,
                     const std::string& activation, float by, const py::object& order) {
  auto node = std::make_unique<ElementwiseNode>();
  node->op = parse_elementwise(op);
  node->x = x;
  if (y != nullptr) node->y = *y;
  node->out = out;
  node->activation = parse_activation(activation);
  node->by = by;
  node->order = to_vector<int32_t>(order);
  if (node->op == Elementwise::kPermute && static_cast<int64_t>(node->order.size()) != out.columns)
    throw std::invalid_argument("order: one entry per column expected");
  for (const int32_t column : node->order)
    if (column < 0 || column >= x.columns) throw std::invalid_argument("order: a column is out of range");
  program.add_node(std::move(node));
}

std::unique_ptr<GemmNode> make_gemm(const PackedMatrix& matrix, const Value& in, const Value* out,
                                    const Array<int32_t>& items, bool exact) {
  if (items.ndim() != 2 || items.shape(1) != 6) throw std::invalid_argument("items: shape (items, 6) expected");
  auto node = std::make_unique<GemmNode>();
  node->matrix = &matrix;
  node->in = in;
  if (out != nullptr) node->out = *out;
  node->exact = exact;
  for (py::ssize_t i = 0; i < items.shape(0); ++i) {
    const GemmItem item{static_cast<ItemKind>(items.at(i, 0)),
                        items.at(i, 1),
                        items.at(i, 2),
                        items.at(i, 3),
                        items.at(i, 4),
                        items.at(i, 5)};
    if (item.first_tile < 0 || item.num_tiles < 1 || item.first_tile + item.num_tiles > matrix.num_tiles())
      throw std::invalid_argument("items: tiles out of range");
    node->items.push_back(item);
  }
  if (matrix.columns != in.columns) throw std::invalid_argument("in: its columns differ from the matrix's");
  return node;
}

void add_gemm(Program& program, const PackedMatrix& matrix, const Value& in, const Value* out,
              const Array<int32_t>& items, bool exact, const py::object& bias, const Value* residual,
              const std::string& activation, float factor, float softcap, const Value* maxima) {
  auto node = make_gemm(matrix, in, out, items, exact);
  node->bias = to_vector<float>(bias);
  node->residual = residual;
  node->maxima = maxima;
  node->activation = parse_activation(activation);
  node->factor = factor;
  node->softcap = softcap;
  program.add_node(std::move(node));
}

void add_heads(Program& program, const PackedMatrix& matrix, const Value& in, const Value* out,
               const Array<int32_t>& items, bool exact, const py::object& bias, const RopeTable* rope,
               const py::object& query_norm, const py::object& key_norm, float norm_eps, int head_dim, int layer) {
  auto node = make_gemm(matrix, in, out, items, exact);
  node->bias = to_vector<float>(bias);
  node->rope = rope;
  node->query_norm = to_vector<float>(query_norm);
  node->key_norm = to_vector<float>(key_norm);
  node->norm_eps = norm_eps;
  node->head_dim = head_dim;
  node->layer = layer;
  program.add_node(std::move(node));
}

void add_attention(Program& program, const Value& q, const Value& out, int heads, int kv_heads, int head_dim,
                   int window, int layer, float scale, bool bidirectional, float softcap, const py::object& sinks) {
  auto node = std::make_unique<AttentionNode>();
  node->q = q;
  node->out = out;
  node->heads = heads;
  node->kv_heads = kv_heads;
  node->head_dim = head_dim;
  node->window = window;
  node->layer = layer;
  node->scale = scale;
  node->bidirectional = bidirectional;
  node->softcap = softcap;
  node->sinks = to_vector<float>(sinks);
  if (!node->sinks.empty() && static_cast<int>(node->sinks.size()) != heads)
    throw std::invalid_argument("sinks: one for each of " + std::to_string(heads) + " heads expected");
  program.set_query_heads_per_kv_head(heads / kv_heads);
  program.add_node(std::move(node));
}

// A pybind11 list of states becomes pointers, None a null one; the caller's list keeps the states alive.
void set_states(StepArrays& step, const std::vector<SamplingState*>& states) {
  if (states.empty()) return;
  if (static_cast<int>(states.size()) != step.num_rows)
    throw std::invalid_argument("states: none, or one entry per logit row expected");
  step.states = states.data();
}

void set_masks(StepArrays& step, const Array<int32_t>& mask_rows, const Array<uint32_t>& masks) {
  if (mask_rows.size() == 0) return;
  if (masks.ndim() != 2) throw std::invalid_argument("masks: shape (masks, words) expected");
  step.mask_rows = checked(mask_rows, step.num_rows, "mask_rows");
  for (int row = 0; row < step.num_rows; ++row)
    if (step.mask_rows[row] < -1 || step.mask_rows[row] >= masks.shape(0))
      throw std::invalid_argument("mask_rows: row " + std::to_string(row) + " is out of range");
  step.masks = masks.data();
  step.mask_words = masks.shape(1);
}

// The step's arrays, in the order of the Python StepInput; outputs last, then what only some steps have.
bool run_step(Program& program, BlockPool& blocks, const Array<int32_t>& token_ids, const Array<int32_t>& positions,
              const Array<int32_t>& query_start, const Array<int32_t>& seq_lens, const Array<int64_t>& block_tables,
              const Array<int32_t>& logit_rows, const Array<int32_t>& targets, const Array<float>& temperature,
              const Array<int32_t>& top_k, const Array<float>& top_p, const Array<float>& min_p,
              const Array<uint64_t>& seed, const Array<int64_t>& sample_position, const Array<int32_t>& num_logprobs,
              Array<int32_t>& out_token_ids, Array<float>& out_logprobs, Array<int32_t>& out_ranks,
              Array<int32_t>& out_top_ids, Array<float>& out_top_logprobs, const std::vector<SamplingState*>& states,
              const std::optional<Array<int32_t>>& mask_rows, const std::optional<Array<uint32_t>>& masks) {
  const py::ssize_t tokens = token_ids.size(), seqs = seq_lens.size(), rows = logit_rows.size();
  StepArrays step;
  step.num_tokens = static_cast<int>(tokens);
  step.num_seqs = static_cast<int>(seqs);
  step.num_rows = static_cast<int>(rows);
  step.token_ids = token_ids.data();
  step.positions = checked(positions, tokens, "positions");
  step.query_start = checked(query_start, seqs + 1, "query_start");
  step.seq_lens = seq_lens.data();
  step.block_tables = checked(block_tables, seqs, "block_tables");
  step.logit_rows = logit_rows.data();
  step.targets = checked(targets, rows, "targets");
  step.temperature = checked(temperature, rows, "temperature");
  step.top_k = checked(top_k, rows, "top_k");
  step.top_p = checked(top_p, rows, "top_p");
  step.min_p = checked(min_p, rows, "min_p");
  step.seed = checked(seed, rows, "seed");
  step.sample_position = checked(sample_position, rows, "sample_position");
  step.num_logprobs = checked(num_logprobs, rows, "num_logprobs");
  step.max_top = rows == 0 ? 0 : static_cast<int>(out_top_ids.size() / rows);
  for (py::ssize_t row = 0; row < rows; ++row)
    if (step.num_logprobs[row] > step.max_top) throw std::invalid_argument("out_top_ids: too few columns");
  checked(out_token_ids, rows, "out_token_ids");
  checked(out_logprobs, rows, "out_logprobs");
  checked(out_ranks, rows, "out_ranks");
  checked(out_top_logprobs, out_top_ids.size(), "out_top_logprobs");
  step.out_token_ids = out_token_ids.mutable_data();
  step.out_logprobs = out_logprobs.mutable_data();
  step.out_ranks = out_ranks.mutable_data();
  step.out_top_ids = out_top_ids.mutable_data();
  step.out_top_logprobs = out_top_logprobs.mutable_data();
  set_states(step, states);
  if (mask_rows && masks) set_masks(step, *mask_rows, *masks);
  py::gil_scoped_release released;
  return program.run(step, blocks);
}

py::array_t<float> read_value(const Program& program, const Value& value, int64_t num_rows) {
  if (value.f32 == nullptr) throw std::invalid_argument("value: it has no float32 form");
  if (num_rows < 0 || num_rows > program.max_rows(value.rows)) throw std::invalid_argument("num_rows: out of range");
  py::array_t<float> out({static_cast<py::ssize_t>(num_rows), static_cast<py::ssize_t>(value.columns)});
  std::copy_n(value.f32, num_rows * value.columns, out.mutable_data());
  return out;
}

// What the system refused becomes an OSError with its number.
void translate_system_error(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
  }
}

void bind_builders(py::class_<Program>& program) {
  constexpr auto reference = py::return_value_policy::reference_internal;
  program.def("reserve_arena", &Program::reserve_arena, py::arg("num_bytes"))
      .def(
          "value_bytes",
          [](const Program& self, const std::string& rows, int64_t columns, unsigned forms) {
            return self.value_bytes(parse_rows(rows), columns, forms);
          },
          py::arg("rows"), py::arg("columns"), py::arg("forms"), "Arena bytes of a value.")
      .def(
          "add_value",
          [](Program& self, const std::string& rows, int64_t columns, unsigned forms, size_t offset) {
            return self.add_value(parse_rows(rows), columns, forms, offset);
          },
          py::arg("rows"), py::arg("columns"), py::arg("forms"), py::arg("offset"), reference)
      .def("reserve_weights", &Program::reserve_weights, py::arg("num_bytes"))
      .def("add_matrix", &add_matrix, py::arg("packed_type"), py::arg("tensors"), py::arg("sources"), reference,
           py::keep_alive<1, 3>())
      .def("pack", &Program::pack, py::arg("matrix"), py::call_guard<py::gil_scoped_release>())
      .def("prefetch", &Program::prefetch, py::arg("matrix"), py::kw_only(), py::arg("sample"))
      .def("write", &Program::write, py::arg("matrix"), py::arg("descriptor"), py::arg("offset"),
           py::call_guard<py::gil_scoped_release>())
      .def("map_weights", &Program::map_weights, py::arg("descriptor"), py::arg("offset"))
      .def("checksum", py::overload_cast<const PackedMatrix&>(&Program::checksum_of), py::arg("matrix"),
           py::call_guard<py::gil_scoped_release>())
      .def("checksum_sample", &Program::checksum_of_sample, py::arg("matrix"), py::call_guard<py::gil_scoped_release>())
      .def(
          "add_rope",
          [](Program& self, const py::object& cosine, const py::object& sine, int rotary_dim, bool interleaved) {
            return self.add_rope({to_vector<float>(cosine), to_vector<float>(sine), rotary_dim, interleaved});
          },
          py::arg("cosine"), py::arg("sine"), py::arg("rotary_dim"), py::arg("interleaved"), reference)
      .def("add_zero_blocks", [](Program& self) { self.add_node(std::make_unique<ZeroBlocksNode>()); })
      .def("add_copy_blocks", [](Program& self) { self.add_node(std::make_unique<CopyBlocksNode>()); })
      .def("add_embed", &add_embed, py::arg("table"), py::arg("positions"), py::arg("factor"), py::arg("out"),
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
      .def("add_norm", &add_norm, py::arg("kind"), py::arg("x"), py::arg("out"), py::arg("weight"), py::arg("bias"),
           py::arg("eps"))
      .def("add_gather", &add_gather, py::arg("x"), py::arg("out"))
      .def("add_elementwise", &add_elementwise, py::arg("op"), py::arg("x"), py::arg("y"), py::arg("out"),
           py::arg("activation") = "silu", py::arg("by") = 1.0f, py::arg("order") = py::none())
      .def("add_gemm", &add_gemm, py::arg("matrix"), py::arg("x"), py::arg("out"), py::arg("items"), py::arg("exact"),
           py::arg("bias") = py::none(), py::arg("residual") = nullptr, py::arg("activation") = "silu",
           py::arg("factor") = 1.0f, py::arg("softcap") = 0.0f, py::arg("maxima") = nullptr)
      .def("add_heads", &add_heads, py::arg("matrix"), py::arg("x"), py::arg("out"), py::arg("items"), py::arg("exact"),
           py::arg("bias"), py::arg("rope"), py::arg("query_norm"), py::arg("key_norm"), py::arg("norm_eps"),
           py::arg("head_dim"), py::arg("layer"))
      .def("add_attention", &add_attention, py::arg("q"), py::arg("out"), py::arg("heads"), py::arg("kv_heads"),
           py::arg("head_dim"), py::arg("window"), py::arg("layer"), py::arg("scale"), py::arg("bidirectional"),
           py::arg("softcap"), py::arg("sinks"))
      .def(
          "add_sample",
          [](Program& self, const Value& logits, const Value* maxima) {
            auto node = std::make_unique<SampleNode>();
            node->logits = logits;
            node->maxima = maxima;
            self.add_node(std::move(node));
          },
          py::arg("logits"), py::arg("maxima") = nullptr);
}

}  // namespace

void bind_program(py::module_& module) {
  py::register_local_exception_translator(translate_system_error);
  py::class_<Value>(module, "Value", "An activation in a program's arena.");
  py::class_<PackedMatrix>(module, "PackedMatrix", "A weight in the packed layout.")
      .def_property_readonly("num_bytes", &PackedMatrix::num_bytes);
  py::class_<RopeTable>(module, "RopeTable", "Rotary tables of a program.");

  py::class_<Program> program(module, "Program", "A compiled network; `run` is one call per step.");
  program.def(py::init([](const std::string& isa, int num_threads, int max_num_tokens, int max_num_seqs,
                          int max_logit_rows, int max_position) {
                return std::make_unique<Program>(
                    isa, num_threads, ProgramLimits{max_num_tokens, max_num_seqs, max_logit_rows, max_position});
              }),
              py::arg("isa"), py::arg("num_threads"), py::kw_only(), py::arg("max_num_tokens"), py::arg("max_num_seqs"),
              py::arg("max_logit_rows"), py::arg("max_position"));
  bind_builders(program);
  program
      .def("allocate_kv", &Program::allocate_kv, py::arg("num_layers"), py::arg("num_blocks"), py::arg("kv_heads"),
           py::arg("head_dim"), py::arg("int8") = false)
      .def("attach_progress", &Program::attach_progress, py::arg("cell"))
      .def("run", &run_step, py::arg("blocks"), py::arg("token_ids"), py::arg("positions"), py::arg("query_start"),
           py::arg("seq_lens"), py::arg("block_tables"), py::arg("logit_rows"), py::arg("targets"),
           py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("seed"),
           py::arg("sample_position"), py::arg("num_logprobs"), py::arg("out_token_ids"), py::arg("out_logprobs"),
           py::arg("out_ranks"), py::arg("out_top_ids"), py::arg("out_top_logprobs"), py::kw_only(),
           py::arg("states") = py::tuple(), py::arg("mask_rows") = py::none(), py::arg("masks") = py::none())
      .def("read", &read_value, py::arg("value"), py::arg("num_rows"))
      .def("take_times",
           [](Program& self) {
             py::dict times;
             for (const NodeTime& time : self.take_times())
               times[py::str(time.kind)] = py::make_tuple(time.seconds, time.count);
             return times;
           })
      .def_property_readonly("last_start_s", &Program::last_start_s)
      .def_property_readonly("isa", [](const Program& self) { return self.kernels().name; })
      .def_property_readonly("num_threads", &Program::num_threads);

  module.def(
      "matrix_bytes",
      [](const std::string& type, int64_t columns, int64_t num_tiles) {
        return tile_bytes(parse_packed(type), columns) * static_cast<size_t>(num_tiles);
      },
      py::arg("packed_type"), py::arg("columns"), py::arg("num_tiles"), "Bytes of a packed matrix.");
  module.attr("LAYOUT_VERSION") = kLayoutVersion;
  module.def("kv_block_bytes", &KvCache::bytes_per_block, py::arg("num_layers"), py::arg("kv_heads"),
             py::arg("head_dim"), py::arg("int8"), "Bytes of one KV block over all layers.");
  module.def(
      "best_isa", [](const std::string& limit) { return choose_kernels(limit.c_str()).name; }, py::arg("limit") = "",
      "The kernel table this machine would use.");
}

}  // namespace llmserve
