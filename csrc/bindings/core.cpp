// Binds TensorView, ProgressCell, StepLease and Philox.
#include "bindings/bindings.h"
#include "core/memory.h"
#include "core/philox.h"
#include "core/progress.h"
#include "core/step_lease.h"
#include "core/thread_pool.h"

namespace llmserve {

namespace {

DType parse_dtype(const std::string& name) {
  std::string known;
  for (const DType type : kDTypes) {
    if (name == dtype_name(type)) return type;
    known += (known.empty() ? "" : ", ") + std::string(dtype_name(type));
  }
  throw std::invalid_argument("dtype: '" + name + "' is not one of " + known);
}

BoundTensor make_tensor(const py::buffer& data, const std::string& dtype, int64_t rows, int64_t columns,
                        const std::string& name) {
  const py::buffer_info info = data.request();
  BoundTensor bound;
  bound.view = {info.ptr, parse_dtype(dtype), rows, columns};
  bound.view.check(name, static_cast<size_t>(info.size) * static_cast<size_t>(info.itemsize));
  bound.owner = data;
  return bound;
}

}  // namespace

void bind_core(py::module_& module) {
  py::class_<BoundTensor>(module, "TensorView", "A checkpoint tensor, checked once; keeps its bytes alive.")
      .def(py::init(&make_tensor), py::arg("data"), py::arg("dtype"), py::arg("rows"), py::arg("columns"),
           py::arg("name"))
      .def("prefetch",
           [](const BoundTensor& t) {
             prefetch_bytes(t.view.data, static_cast<size_t>(t.view.row(t.view.rows) - t.view.row(0)));
           })
      .def_property_readonly("rows", [](const BoundTensor& t) { return t.view.rows; })
      .def_property_readonly("columns", [](const BoundTensor& t) { return t.view.columns; })
      .def_property_readonly("dtype", [](const BoundTensor& t) { return dtype_name(t.view.dtype); });

  py::class_<ProgressCell, std::shared_ptr<ProgressCell>>(module, "ProgressCell",
                                                          "Progress counter and abort flag shared by two processes.")
      .def(py::init<const std::string&, bool>(), py::arg("path"), py::arg("create"))
      .def("bump", &ProgressCell::bump)
      .def_property_readonly("value", &ProgressCell::value)
      .def_property_readonly("moved_s", &ProgressCell::moved_s)
      .def("take", &ProgressCell::take)
      .def("abandon", &ProgressCell::abandon, py::arg("num_requests"))
      .def_property("abort", &ProgressCell::abort, &ProgressCell::set_abort);

  py::class_<StepLease, std::shared_ptr<StepLease>>(module, "StepLease", "Turns of several engines on the same cores.")
      .def(py::init<const std::string&, std::vector<int>, std::shared_ptr<ProgressCell>, double>(), py::arg("path"),
           py::kw_only(), py::arg("cores") = std::vector<int>{}, py::arg("watched") = py::none(),
           py::arg("patience_s") = 2.0)
      .def("__enter__", &StepLease::acquire, py::call_guard<py::gil_scoped_release>())
      .def("__exit__", [](StepLease& self, const py::args&) { self.release(); })
      .def_property_readonly("held", &StepLease::held);

  module.def("num_available_cores", &num_available_cores, "Cores this process may run on.");
  module.def(
      "philox4x32",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        const PhiloxBlock out = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
        return std::array<uint32_t, 4>{out.word[0], out.word[1], out.word[2], out.word[3]};
      },
      py::arg("counter"), py::arg("key"), "One Philox4x32-10 block.");
}

}  // namespace llmserve
