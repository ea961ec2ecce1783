// qc_run: runs a compiled library on arrays, or measures it. Needs nothing but the library.
#include <sys/stat.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "npy.hpp"
#include "qcompiler/qcompiler.hpp"

namespace {

constexpr const char* kUsage =
    "usage: qc_run MODEL.so --input NAME=X.npy ... --output DIR [--threads N] [--bench ITERATIONS]\n"
    "\n"
    "Run MODEL.so once and write every output as DIR/NAME.npy (characters outside A-Z a-z 0-9 . _ - become _).\n"
    "  --input NAME=X.npy   an array for one input; repeat for more\n"
    "  --output DIR         folder for the outputs; it is made when missing. Optional with --bench\n"
    "  --threads N          threads of one run (default 1)\n"
    "  --bench ITERATIONS   then measure that many runs, and print minimum, median and p99 in seconds as JSON.\n"
    "                       Without --output, inputs that are not given are zeros: int8 kernels take the same time for any values\n"
    "exit status: 0 done, 2 usage or bad input\n";

struct Arguments {
  std::string model, output;
  std::map<std::string, std::string> inputs;
  int threads = 1;
  int iterations = 0;
};

int positive(const std::string& option, const std::string& text, int limit) {
  const bool digits = !text.empty() && text.size() < 10 && std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
  const int value = digits ? std::stoi(text) : 0;
  if (value < 1 || value > limit) throw std::runtime_error(option + " " + text + ": expected a number from 1 to " + std::to_string(limit));
  return value;
}

Arguments parse(int count, char** words) {
  Arguments arguments;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word.compare(0, 2, "--") != 0) {
      if (!arguments.model.empty()) throw std::runtime_error("two libraries given: " + arguments.model + " and " + word);
      arguments.model = word;
      continue;
    }
    if (word != "--input" && word != "--output" && word != "--threads" && word != "--bench") throw std::runtime_error("unknown option " + word);
    if (i + 1 == count) throw std::runtime_error(word + " wants a value");
    const std::string value = words[++i];
    if (word == "--threads") {
      arguments.threads = positive(word, value, 1024);
    } else if (word == "--bench") {
      arguments.iterations = positive(word, value, 100000000);
    } else if (word == "--output") {
      arguments.output = value;
    } else {
      const std::size_t equals = value.find('=');
      if (equals == std::string::npos || equals == 0 || equals + 1 == value.size()) throw std::runtime_error("--input " + value + ": expected NAME=FILE.npy");
      if (!arguments.inputs.emplace(value.substr(0, equals), value.substr(equals + 1)).second)
        throw std::runtime_error("--input " + value.substr(0, equals) + " is given twice");
    }
  }
  if (arguments.model.empty()) throw std::runtime_error("no library given");
  if (arguments.output.empty() && !arguments.iterations) throw std::runtime_error("give --output DIR, or --bench ITERATIONS to measure only");
  return arguments;
}

void set_input(qcompiler::Tensor tensor, const std::string& path) {
  const npy::Array array = npy::read(path);
  const std::string descr = npy::type_of(tensor.dtype()).descr;
  if (array.dtype != tensor.dtype()) throw std::runtime_error(path + ": has elements of type " + npy::type_of(array.dtype).descr + ", input '" + tensor.name() + "' wants " + descr);
  if (array.shape != tensor.shape())
    throw std::runtime_error(path + ": has shape " + tensor.text(array.shape) + ", input '" + tensor.name() + "' wants " + tensor.text(tensor.shape()));
  std::memcpy(tensor.raw_data(), array.data.data(), tensor.bytes());
}

// A port's name as a file name; `taken` keeps two names from becoming one file.
std::string file_name(std::string name, std::set<std::string>& taken) {
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c)) && !std::strchr("._-", c)) c = '_';
  if (name.empty() || name[0] == '.') name.insert(0, "_");
  if (name.size() > 200) name.resize(200);
  std::string unique = name;
  for (int i = 1; !taken.insert(unique).second; ++i) unique = name + "_" + std::to_string(i);
  return unique + ".npy";
}

void measure(qcompiler::Session& session, const Arguments& arguments) {
  using clock = std::chrono::steady_clock;
  for (int i = 0; i < std::min(arguments.iterations, 10); ++i) session.run();
  std::vector<double> seconds;
  for (int i = 0; i < arguments.iterations; ++i) {
    const auto start = clock::now();
    session.run();
    seconds.push_back(std::chrono::duration<double>(clock::now() - start).count());
  }
  std::sort(seconds.begin(), seconds.end());
  const auto quantile = [&](double q) { return seconds[static_cast<std::size_t>(std::ceil(q * static_cast<double>(seconds.size()))) - 1]; };
  std::printf("{\"target\": \"%s\", \"threads\": %d, \"iterations\": %d, \"seconds\": {\"minimum\": %.9f, \"median\": %.9f, \"p99\": %.9f}}\n",
              session.target().c_str(), arguments.threads, arguments.iterations, seconds.front(), quantile(0.5), quantile(0.99));
}

void run(const Arguments& arguments) {
  qcompiler::Session session(arguments.model, {arguments.threads});
  for (const auto& [name, path] : arguments.inputs) set_input(session.input(name), path);
  for (qcompiler::Tensor tensor : session.inputs())
    if (!arguments.inputs.count(tensor.name())) {
      if (!arguments.output.empty())
        throw std::runtime_error("input '" + tensor.name() + "' is missing: give --input " + tensor.name() + "=FILE.npy, " +
                                 npy::type_of(tensor.dtype()).descr + " of shape " + tensor.text(tensor.shape()));
      std::memset(tensor.raw_data(), 0, tensor.bytes());
    }
  if (!arguments.output.empty()) {
    if (mkdir(arguments.output.c_str(), 0777) != 0 && errno != EEXIST) throw std::runtime_error(arguments.output + ": can't be made: " + std::strerror(errno));
    session.run();
    std::set<std::string> taken;
    for (qcompiler::Tensor tensor : session.outputs())
      npy::write(arguments.output + "/" + file_name(tensor.name(), taken), tensor.dtype(), tensor.shape(), tensor.raw_data(), tensor.bytes());
  }
  if (arguments.iterations) measure(session, arguments);
}

}  // namespace

int main(int count, char** words) {
  if (count == 2 && (std::strcmp(words[1], "--help") == 0 || std::strcmp(words[1], "-h") == 0)) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  try {
    run(parse(count, words));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    if (count == 1) std::fputs(kUsage, stderr);
    return 2;
  }
  return 0;
}
