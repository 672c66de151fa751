#include "options.h"

#include <algorithm>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace llmserve::bench {

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> words;
  std::stringstream stream(text);
  for (std::string word; std::getline(stream, word, ',');) words.push_back(word);
  return words;
}

PackedType type_named(const std::string& name) {
  for (const PackedType type : all_types())
    if (name == describe(type).name) return type;
  throw std::invalid_argument("--types: there is no type " + name);
}

Shape shape_named(const std::string& name) {
  for (const Shape& shape : kShapes)
    if (name == shape.name) return shape;
  throw std::invalid_argument("--shapes: there is no shape " + name);
}

double number(const std::string& option, const std::string& text, double low, double high) {
  try {
    size_t used = 0;
    const double value = std::stod(text, &used);
    if (used == text.size() && value >= low && value <= high) return value;
  } catch (const std::logic_error&) {  // said below
  }
  throw std::invalid_argument(option + ": " + text + " is not a number within its limits");
}

int integer(const std::string& option, const std::string& text, int high) {
  return static_cast<int>(number(option, text, 1, high));
}

void make_quick(Options& options) {
  options.shapes = {shape_named("llama-3.2-1b")};
  options.m = {1, 16, 512};
  options.parts = {"o", "gate_up"};
  options.seconds = 4.0;
  options.rounds = 3;
}

void set(Options& options, const std::string& option, const std::string& value) {
  const std::vector<std::string> words = split(value);
  if (option == "--types") {
    std::transform(words.begin(), words.end(), std::back_inserter(options.types), type_named);
  } else if (option == "--m") {
    options.m.clear();
    for (const std::string& word : words) options.m.push_back(integer(option, word, 4096));
  } else if (option == "--shapes") {
    options.shapes.clear();
    std::transform(words.begin(), words.end(), std::back_inserter(options.shapes), shape_named);
  } else if (option == "--parts") {
    options.parts = words;
  } else if (option == "--isa") {
    options.isa = value;
  } else if (option == "--threads") {
    options.threads = integer(option, value, 1024);
  } else if (option == "--seconds") {
    options.seconds = number(option, value, 0.1, 3600);
  } else if (option == "--rounds") {
    options.rounds = integer(option, value, 100);
  } else if (option == "--commit") {
    options.commit = value;
  } else {
    throw std::invalid_argument("there is no option " + option);
  }
}

}  // namespace

bool Options::has_part(const Matrix& matrix) const {
  return parts.empty() || std::find(parts.begin(), parts.end(), matrix.part_name()) != parts.end();
}

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  options.shapes.assign(std::begin(kShapes), std::end(kShapes));
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--quick") {
      make_quick(options);
      continue;
    }
    if (i + 1 == arguments.size()) throw std::invalid_argument(arguments[i] + ": a value is missing");
    set(options, arguments[i], arguments[i + 1]);
    ++i;
  }
  if (options.types.empty())
    for (const PackedType type : all_types())
      if (describe(type).by_default) options.types.push_back(type);
  return options;
}

std::string usage() {
  std::string text =
      "llmserve_kernel_bench [--quick] [--types A,B] [--m 1,16] [--shapes A,B] [--parts A,B] [--isa avx2]\n"
      "                      [--threads N] [--seconds S] [--rounds N] [--commit TEXT]\n"
      "--quick comes first: what follows it overrides it.\ntypes: ";
  for (const PackedType type : all_types()) text += std::string(describe(type).name) + " ";
  text += "\nshapes: ";
  for (const Shape& shape : kShapes) text += std::string(shape.name) + " ";
  text += "\nparts: ";
  for (const char* name : kPartNames) text += std::string(name) + " ";
  return text + "\n";
}

}  // namespace llmserve::bench
